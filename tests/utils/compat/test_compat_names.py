"""Private names of other libraries stand in utils/compat alone, are still there, and load no other library."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import lightsparse
from lightsparse.utils import compat

PACKAGE, COMPAT = Path(lightsparse.__file__).parent, Path(compat.__file__).parent
FILES = sorted(COMPAT.glob("[a-z]*.py"))
BESIDE = {"hydra": ["omegaconf"], "torchmetrics": ["lightning_utilities"]}
LIBRARIES = {path.stem: {path.stem, *BESIDE.get(path.stem, [])} for path in FILES}
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields"}  # of os and of named tuples


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Those of a file, at any depth, but not those for type checkers."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    found: list[ast.Import | ast.ImportFrom] = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def imported(path: Path) -> Iterator[tuple[str, str]]:
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES[path.stem]:
            yield from ((node.module or "", alias.name) for alias in node.names)


NAMES = sorted({pair for path in FILES for pair in imported(path)})


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(pair) for pair in NAMES])
def test_the_name_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_file_imports_its_own_library_alone(path: Path) -> None:
    modules = {name for node in imports(path) for name in modules_of(node)}
    assert {name.split(".")[0] for name in modules} <= LIBRARIES[path.stem] | sys.stdlib_module_names


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


@pytest.mark.multiprocess
@pytest.mark.parametrize("stem", ["hydra", "datasets"])
def test_a_file_that_needs_no_torch_loads_none(stem: str) -> None:
    code = f"import json, sys, lightsparse.utils.compat.{stem}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "lightning", "transformers", "numpy"} & set(loaded)
    assert ("hydra" in loaded) == (stem == "hydra")


def own_names(nodes: Iterable[ast.AST]) -> set[str]:
    """What the package itself defines: functions, classes, fields, variables, attributes of self."""
    found = set(DOCUMENTED)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def foreign_private_names(nodes: Iterable[ast.AST], own: set[str]) -> Iterator[str]:
    """`line name` of each private name that is imported, read, or asked for by getattr, and not one of ours."""
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightsparse"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        for name in names:
            if name.startswith("_") and not name.endswith("__") and name not in own:
                yield f"{getattr(node, 'lineno', 0)} {name}"


def test_no_other_file_touches_a_private_name() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if COMPAT not in path.parents]
    files = {path: list(ast.walk(ast.parse(path.read_text()))) for path in others}
    own = own_names(node for nodes in files.values() for node in nodes)
    found = {str(path): list(foreign_private_names(nodes, own)) for path, nodes in files.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_guard_finds_what_it_is_for() -> None:
    text = "import torch._C\nfrom x._y import _z\nt._w\ngetattr(t, '_v')\nself._mine = t.__dict__\n"
    nodes = list(ast.walk(ast.parse(text)))
    found = [name.split()[1] for name in foreign_private_names(nodes, own_names(nodes))]
    assert sorted(found) == ["_C", "_v", "_w", "_y", "_z"]
