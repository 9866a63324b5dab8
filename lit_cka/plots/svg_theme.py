"""Figures that follow the reader's light or dark theme: a style sheet inside the SVG file itself, `follow_theme`.

It is in force wherever the file is shown, also as the image of a page. Programs that know no style sheets draw the
light figure, as matplotlib wrote it.
"""

from __future__ import annotations

import re

# On the data's own colours: white and black there stay what they are. A shade beside the pure ones tells them apart.
ON_DARK, ON_LIGHT = "#fefefe", "#010101"

_INK, _GROUND = (0xE8, 0xEA, 0xED), (0x16, 0x18, 0x1B)  # of text and of what is behind it, in the dark
_OWN_SHADES = {"#d9d9d9": "#5a5f66"}  # the grey of cells without a value
_GREYS = re.compile(r"(fill|stroke): (#([0-9a-f]{2})\3\3)\b")


def follow_theme(svg: str) -> str:
    """Returns the SVG with its greys turned round where the reader prefers a dark theme: ink on white becomes light on
    dark, and colours stay.

    A grey g in [0, 255], such as `fill: #ebebeb`, becomes ink + g / 255 (ground - ink), each channel by itself. Texts
    in matplotlib's default black have no colour in the file, and take that of the root.

    Args:
        svg: what matplotlib wrote.

    Example:
        >>> shown = follow_theme('<svg xmlns="http://www.w3.org/2000/svg"><path style="fill: #ffffff"/></svg>')
        >>> '[style*="fill: #ffffff"] { fill: #16181b !important }' in shown
        True
    """
    rules = [f":root {{ fill: {_turned(0)} }}"]
    for kind, color in sorted({(kind, color) for kind, color, _ in _GREYS.findall(svg)}):
        if color not in (ON_DARK, ON_LIGHT):
            turned = _OWN_SHADES.get(color) or _turned(int(color[1:3], 16))
            rules.append(f'[style*="{kind}: {color}"] {{ {kind}: {turned} !important }}')
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    return re.sub(r"<svg\b[^>]*>", lambda root: root[0] + style, svg, count=1)


def _turned(grey: int) -> str:
    channels = (round(ink + grey / 255 * (ground - ink)) for ink, ground in zip(_INK, _GROUND, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in channels)
