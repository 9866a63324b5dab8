"""Pin every package of the environment to the newest versions that pass the suite: `python .ci/refresh_pins.py`.

Writes `constraint-dependencies` in pyproject.toml anew, then runs what `.ci/run` runs. If that fails, the pins are put
back as they were. Options:

    --keep NAME ...   leave these packages at their pinned versions (say, one whose newest release is broken)
    --newest          only try the suite on the newest versions: the pins are put back, whatever comes out
    --no-suite        write the pins without running the suite
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"
LIST = re.compile(r"^constraint-dependencies = \[.*?^\]\n", re.MULTILINE | re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--newest", action="store_true")
    parser.add_argument("--no-suite", action="store_true")
    options = parser.parse_args()
    before = PROJECT.read_text()
    pins: list[str] = tomllib.loads(before)["tool"]["uv"]["constraint-dependencies"]
    kept = [pin for pin in pins if pin.partition("==")[0] in options.keep]
    if missing := set(options.keep) - {pin.partition("==")[0] for pin in kept}:
        parser.error(f"expected packages that are pinned, but got {', '.join(sorted(missing))}")
    passed = False
    try:
        write_pins(before, kept)
        subprocess.run(["uv", "lock", "--upgrade"], cwd=ROOT, check=True)
        write_pins(before, resolved_versions())
        passed = options.no_suite or subprocess.run(["bash", ".ci/run"], cwd=ROOT).returncode == 0
    finally:
        if not passed or options.newest:
            PROJECT.write_text(before)
            subprocess.run(["uv", "lock"], cwd=ROOT)
    ran = "The suite was not run" if options.no_suite else f"The suite {'passed' if passed else 'failed'}"
    pinned = "new" if passed and not options.newest else "those from before"
    print(f"{ran}: the pins are {pinned}.", file=sys.stderr)
    return 0 if passed else 1


def resolved_versions() -> list[str]:
    """Every package that some platform or extra installs, as `name==version ; marker`; without the project itself."""
    command = [
        "uv",
        "export",
        "--frozen",
        "--all-extras",
        "--all-groups",
        "--no-hashes",
        "--no-annotate",
        "--no-header",
    ]
    exported = subprocess.run([*command, "--no-emit-project"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [" ".join(line.split()) for line in exported.stdout.splitlines() if "==" in line]


def write_pins(text: str, pins: list[str]) -> None:
    listed = "".join(f'    "{pin}",\n' for pin in pins)
    replaced, count = LIST.subn(f"constraint-dependencies = [\n{listed}]\n", text)
    assert count == 1, "pyproject.toml has no list `constraint-dependencies`"
    new = PROJECT.with_suffix(".toml.new")
    new.write_text(replaced)
    os.replace(new, PROJECT)


if __name__ == "__main__":
    sys.exit(main())
