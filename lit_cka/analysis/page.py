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
.wide:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
td { white-space: nowrap; } th[title] { text-decoration: underline dotted; text-underline-offset: .2em; cursor: help; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
dl { display: grid; grid-template-columns: fit-content(12rem) minmax(0, 1fr); gap: .2rem 1rem; font-size: .9rem; }
dt { font-weight: 600; overflow-wrap: anywhere; } dd { margin: 0; color: var(--soft); }
p, h1, h2, li, figcaption { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; border-radius: 4px; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .9rem; } ul { padding-left: 1.2rem; }
iframe { display: block; border: 1px solid var(--line); border-radius: 6px; height: 54rem;
  --wide: min(100vw - 2rem, 90rem); width: var(--wide); margin: 1rem calc(50% - var(--wide) / 2); }
@media (max-width: 44rem) {
  th, td { padding: .25rem .4rem; } dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .4rem; }
}
"""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        heading: its title.
        text: paragraphs.
        table: rows of the same keys; numbers are shown with four digits.
        explanations: a sentence by the name of a column, or by what a row's first cell says: shown when the pointer
            rests on it, and below the table.
        images: descriptions by file name; SVG files follow the reader's theme.
        links: what to read by file name.
        frames: titles by the file name of pages to show within this one.
    """

    heading: str
    text: Sequence[str] = ()
    table: Sequence[Mapping[str, object]] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    explanations: Mapping[str, str] = field(default_factory=dict)
    frames: Mapping[str, str] = field(default_factory=dict)


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
        "frame-src 'self' file:; style-src 'unsafe-inline'\">"
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
    for name, title in section.frames.items():
        parts.append(f'<iframe src="{quote(name)}" title="{escape(title)}"></iframe>')
    if section.table:
        parts.append(_table(section.table, section.explanations))
    for name, description in section.images.items():
        shown = escape(description)
        parts.append(f'<figure><img src="{quote(name)}" alt="{shown}"><figcaption>{shown}</figcaption></figure>')
    return "".join(parts) + "</section>"


def _table(rows: Sequence[Mapping[str, object]], explanations: Mapping[str, str]) -> str:
    """Returns a table that scrolls within its box, and below it what its columns and rows are."""
    columns = list(rows[0])

    def hint(name: object) -> str:
        sentence = explanations.get(str(name))
        return f' title="{escape(sentence)}"' if sentence else ""

    head = "".join(f'<th scope="col"{hint(column)}>{escape(column)}</th>' for column in columns)
    body = ""
    for row in rows:
        cells = [f"<td>{escape(_text(row.get(column)))}</td>" for column in columns]
        cells[0] = cells[0].replace("<td>", f"<td{hint(row.get(columns[0]))}>", 1)
        body += f"<tr>{''.join(cells)}</tr>"
    firsts = [str(row.get(columns[0])) for row in rows]
    names = [name for name in dict.fromkeys([*columns, *firsts]) if name in explanations]
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(explanations[name])}</dd>" for name in names)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{f'<dl>{terms}</dl>' if terms else ''}"
    )


def _text(value: object) -> str:
    if value is None or value != value:
        return "undefined" if value is not None else ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
