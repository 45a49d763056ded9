"""The software bill: every package that pissa needs, with its licence. `python tests/bill.py` writes docs/bill.md."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
BILL = ROOT / "docs" / "bill.md"
HEAD = """# Software bill

What `pip install pissa` brings, extras left out, under Python 3.11 and in the versions of `constraints.txt`; made by
`tests/bill.py`, checked by `tests/test_supply.py`. What torch brings on other machines (NVIDIA's libraries, triton) is
not listed.

| package | version | licence |
|---|---|---|
"""


def packages(root: str = "pissa") -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that `root` needs, by name, itself left out."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [root]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another system, or another Python
            continue
        waiting += found[name].requires or []
    return {name: found[name] for name in sorted(found) if name != root}


def licence(package: importlib.metadata.Distribution) -> str:
    """As the package names it."""
    metadata = package.metadata
    classifiers = [line.split("::")[-1].strip() for line in metadata.get_all("Classifier") or [] if "License" in line]
    text = metadata.get("License-Expression") or " and ".join(classifiers) or metadata.get("License") or "none named"
    return str(text).splitlines()[0]


def bill() -> str:
    rows = [
        f"| {name} | {package.version.split('+')[0]} | {licence(package)} |" for name, package in packages().items()
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    BILL.write_text(bill(), encoding="utf-8")
