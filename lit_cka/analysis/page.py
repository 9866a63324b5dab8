"""The page of a results folder: `write_page`, one HTML file that opens without a server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import quote

from lit_cka.files import write_text

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6169; --line: #d9dce0; --back: #fff; --link: #0060a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a5acb5; --line: #3a3f46; --back: #16181b; --link: #7ab8f0; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
a { color: var(--link); } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; padding: 4px; box-sizing: border-box; }
figure { margin: 1rem 0; } ul { padding-left: 1.2rem; }
"""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        heading: its title.
        text: paragraphs.
        table: rows of the same keys; numbers are shown with four digits.
        images: descriptions by file name.
        links: what to read by file name.
    """

    heading: str
    text: Sequence[str] = ()
    table: Sequence[Mapping[str, object]] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)


def write_page(folder: str | os.PathLike[str], title: str, sections: Sequence[Section], *, about: str = "") -> Path:
    """Write `index.html`, which shows the sections and links every file in the folder. All text is escaped.

    Args:
        folder: where the other files are already.
        title: of the page.
        sections: in order.
        about: one paragraph below the title.
    """
    folder = Path(folder)
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    body = "".join(map(_section, sections))
    links = "".join(f'<li><a href="{quote(name)}">{escape(name)}</a></li>' for name in files if name != "index.html")
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' file:; "
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(about)}</p>{body}'
        f"<section><h2>Files</h2><ul>{links}</ul></section></main></body></html>\n"
    )
    return write_text(folder / "index.html", html)


def _section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    for name, shown in section.links.items():
        parts.append(f'<p><a href="{quote(name)}">{escape(shown)}</a></p>')
    if section.table:
        columns = list(section.table[0])
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(_text(row.get(column)))}</td>" for column in columns) + "</tr>"
            for row in section.table
        )
        parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
    for name, description in section.images.items():
        parts.append(f'<figure><img src="{quote(name)}" alt="{escape(description)}"></figure>')
    return "".join(parts) + "</section>"


def _text(value: object) -> str:
    if value is None or value != value:
        return "undefined" if value is not None else ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
