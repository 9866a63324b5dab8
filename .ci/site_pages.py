"""A hook of mkdocs: pages that stand outside of docs/ are part of the site, and links lead to where a page is there."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# What the site calls it: what the repository does.
OUTSIDE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results/growth.png": "benchmarks/results/growth.png",
}
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")  # relative: an address has a colon


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, path in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites each link between files of the repository as one between pages; mkdocs warns of what is not there."""
    source = page.file.src_uri
    folder = posixpath.dirname(OUTSIDE.get(source, f"docs/{source}"))
    on_site = {path: name for name, path in OUTSIDE.items()}

    def between_pages(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        name = on_site.get(path, path.removeprefix("docs/"))
        return f"{match[1]}{posixpath.relpath(name, posixpath.dirname(source) or '.')}{match[3]}"

    return LINK.sub(between_pages, markdown)
