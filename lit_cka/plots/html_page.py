"""One page of HTML that needs nothing else: a template with its style, scripts and data in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any


def html_page(template: str, style: str, scripts: Sequence[str], *, title: str, data: Any) -> bytes:
    """Returns the page. It may run its own scripts and show pictures that are in it, and load nothing.

    Args:
        template: name of the file among the assets, with places such as `{{title}}` in it.
        style: likewise.
        scripts: likewise; all in one, in this order.
        title: text.
        data: JSON, for the scripts.
    """
    assets = files("lit_cka.plots") / "assets"
    css = assets.joinpath(style).read_text("utf-8")
    script = "\n".join(assets.joinpath(name).read_text("utf-8") for name in scripts)
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(css)}; img-src data:; base-uri 'none'"
    parts = {
        "title": html.escape(title),
        "policy": policy,
        "style": css,
        # A string of JSON may hold "</script>"; escaped, it is the same string, and no markup.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": script,
    }
    # All at once: names are not searched for placeholders.
    text = assets.joinpath(template).read_text("utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], text)
    # Half a surrogate pair (from a file name, say) has no UTF-8; the reader sees the replacement character.
    return page.encode("utf-8", "xmlcharrefreplace")


def _hash(source: str) -> str:
    """Returns how a content security policy names the one inline script or style that it lets in."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}'"
