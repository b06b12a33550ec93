"""Nothing in the package reads a format that can run code."""

import ast
from pathlib import Path

import pytest

from support.layers import source_files

ROOT = Path(__file__).parents[1]
UNSAFE = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal",
                    "shelve"})  # fmt: skip


def unsafe_loads(source: str) -> list[int]:
    """Lines that import a module of `UNSAFE`, or load with torch more than weights."""
    found: list[int] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [node.module or ""]
                # By another name a call of it would not be seen.
                if node.module == "torch" and any(alias.name == "load" for alias in node.names):
                    found.append(node.lineno)
            case ast.Call():
                names = _imported(node)
                if ast.unparse(node.func) == "torch.load" and not _weights_only(node):
                    found.append(node.lineno)
            case _:
                continue
        found += [node.lineno for name in names if name.split(".")[0] in UNSAFE]
    return found


def _imported(call: ast.Call) -> list[str]:
    if ast.unparse(call.func) not in ("__import__", "import_module", "importlib.import_module"):
        return []
    return [str(each.value) for each in call.args[:1] if isinstance(each, ast.Constant)]


def _weights_only(call: ast.Call) -> bool:
    return any(
        keyword.arg == "weights_only"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is True
        for keyword in call.keywords
    )


def test_the_package_reads_nothing_that_can_run_code() -> None:
    files = source_files(ROOT)
    assert files
    found = {file.name: unsafe_loads(file.read_text(encoding="utf-8")) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import json, marshal as m",
        "from shelve import open as o",
        "def f():\n    import dill",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('marshal')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\ntorch.load('x', weights_only=flag)",
        "from torch import load",
    ],
)
def test_what_can_run_code_is_found(text: str) -> None:
    assert len(unsafe_loads(text)) == 1


@pytest.mark.parametrize(
    "text",
    ["import json", "import torch\ntorch.load('x', weights_only=True)", "from torch import save"],
)
def test_what_cannot_is_not_found(text: str) -> None:
    assert unsafe_loads(text) == []
