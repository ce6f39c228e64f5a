"""Write constraints.txt: the exact version of every package in the environment that runs this.

Pins of packages that are not installed here (those of other systems) stay as they are, and so do those
of packages whose installed version refuses an early patch release of a Python that the suite supports.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

HEADER = """\
# The exact versions everybody gets: pip, conda and the tests read them from here.
# Made by `make constraints` (workflow/freeze.py) from an environment with `.[dev,peers,cluster]` on Linux,
# Python 3.11. Pins of packages that only other systems or Pythons need are kept from before.
"""
NOT_PINNED = {"pip", "nnc-utils"}
FIRST_PATCHES = ("3.11.0", "3.12.0", "3.13.0")


def normalized(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """Package name -> version, of a constraints file."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def write_pins(path: Path) -> int:
    """Renew the pins of `path` from what is installed; returns how many there are."""
    pins = read_pins(path) if path.exists() else {}
    for package in metadata.distributions():
        needs = SpecifierSet(package.metadata.get("Requires-Python") or "")
        if not all(version in needs for version in FIRST_PATCHES):
            print(f"{package.name} {package.version} needs Python {needs}: pin an older version by hand")
            continue
        version = package.version.partition("+")[0]  # 2.9.0+cpu is 2.9.0 built for one place
        pins[normalized(package.name)] = version
    lines = [f"{name}=={pins[name]}" for name in sorted(pins.keys() - NOT_PINNED)]
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return len(lines)


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "constraints.txt"
    print(f"{write_pins(target)} pins in {target.name}")
