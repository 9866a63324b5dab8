"""Put the tables of `results/*.json` into README.md, between its `<!-- script -->` and `<!-- end -->` marks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['median']:.4g} ({value['min']:.3g} - {value['max']:.3g}; {value['repetitions']})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def markdown(script: str) -> str:
    """All tables of a script, and the machine they were measured on."""
    result = json.loads((FOLDER / "results" / f"{script}.json").read_text())
    parts = []
    for table in result["tables"]:
        rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
        parts += [f"*{table['title']}*", "\n".join(lines)]
        parts += [table["caption"]] if table.get("caption") else []
    machine = result["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "lightning", "torchmetrics") if name in machine
    )
    gpu = f"{machine['gpu']}; " if machine.get("gpu") else ""
    parts.append(f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {versions}.")
    return "\n\n".join(parts)


def main() -> None:
    readme = FOLDER / "README.md"
    text = readme.read_text()
    for script in re.findall(r"<!-- (\w+) -->", text):
        if script != "end" and (FOLDER / "results" / f"{script}.json").exists():
            before, _, rest = text.partition(f"<!-- {script} -->\n")
            after = rest.partition("<!-- end -->")[2]
            text = f"{before}<!-- {script} -->\n\n{markdown(script)}\n\n<!-- end -->{after}"
    partial = readme.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, readme)


if __name__ == "__main__":
    main()
