"""What pissa is made of, and what it never does with files."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from bill import BILL, ROOT, bill, licence, packages
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGE = ROOT / "pissa_cli"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FREE = r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zlib|CC0|BSL-1\.0|CNRI-Python"
BESIDE = {"tqdm": "MPL-2.0 AND MIT", "certifi": "Mozilla Public License 2.0 (MPL 2.0)"}
"""Used as it is, with its files left alone."""
CUDA = ("nvidia-", "cuda-")
"""Needed by the builds of torch for NVIDIA's GPUs, under NVIDIA's terms; the user chooses the build."""
UNSAFE = {("torch", "load"), ("torch", "save"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("numpy", "load")}


def test_every_licence_is_a_permissive_one() -> None:
    named = {name: licence(package) for name, package in packages().items() if not name.startswith(CUDA)}
    assert len(named) > 20
    for name, text in named.items():
        parts = [part for part in re.split(r" AND | and | OR | WITH [\w-]+", text) if part]
        assert all(re.search(FREE, part) for part in parts) or BESIDE.get(name) == text, f"{name}: {text}"


def test_the_software_bill_is_current() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    here = {name: package.version.split("+")[0] for name, package in packages().items()}
    if sys.version_info[:2] != (3, 11) or any(
        pins.get(name, version).split("+")[0] != version for name, version in here.items()
    ):
        pytest.skip("another Python, or other versions than those of constraints.txt")
    fresh = bill()
    if not BILL.is_file() or BILL.read_text(encoding="utf-8") != fresh:
        BILL.write_text(fresh, encoding="utf-8")
        pytest.fail("docs/bill.md was stale and has been written anew")


def test_the_lowest_versions_are_those_of_the_bounds() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = {name.lower(): Version(version) for name, version in (line.split("==") for line in lines)}
    wanted = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
    for one in wanted:
        for bound in one.specifier:
            least = Version(bound.version)
            assert bound.operator == ">=" and pins[one.name.lower()].release[: len(least.release)] == least.release, one


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="newer Pythons get newer packages")
def test_the_lowest_python_is_one_that_every_dependency_takes() -> None:
    least = SpecifierSet(PROJECT["requires-python"])
    lowest = min((Version(f"3.{minor}") for minor in range(8, 20) if least.contains(f"3.{minor}")), default=None)
    assert lowest is not None
    for line in PROJECT["dependencies"]:
        name = Requirement(line).name
        needs = importlib.metadata.metadata(name)["Requires-Python"] or ""
        assert SpecifierSet(needs).contains(lowest), f"{name} needs Python {needs}"


def imported(tree: ast.AST) -> set[str]:
    """Packages at the root of what a file imports, those of the project by relative names left out."""
    return {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    } | {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_every_import_is_declared() -> None:
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    roots = set().union(*(imported(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")))
    packages_of = importlib.metadata.packages_distributions()
    for root in roots - sys.stdlib_module_names - {"pissa_cli"}:
        of = {canonicalize_name(name) for name in packages_of.get(root, [root])}
        assert of & declared, f"{root} is imported, and pyproject.toml does not name {' or '.join(sorted(of))}"


def calls(tree: ast.AST) -> set[tuple[str, str]]:
    return {
        (node.func.value.id, node.func.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_can_bring_code_along(path: Path) -> None:
    """No pickle in any guise, and YAML by safe loaders only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imported(tree) & {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
    assert not calls(tree) & UNSAFE
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec") or path.name == "sandbox_child.py", f"line {node.lineno}"
