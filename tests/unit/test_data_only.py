"""In the package's own source: nothing that would run what a peer sends, but where the operator says what to run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "meshrl"
FILES = sorted(PACKAGE.rglob("*.py"))
# Their very import would be a reason to ask why.
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "runpy", "code", "codeop", "msgpack_numpy", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
# Attributes, of whatever module where none is named.
METHODS = {"import_module", "os.system", "os.popen", "literal_eval", "load_module", "exec_module"}
# What an operator names is imported in the first; no client's name comes there (tests/mesh/test_nothing_runs.py). The
# next three import modules that are named there, when they are first wanted. The last two: what makes an env goes from
# the worker to the process that it is to live in, and no client has touched it; back comes nothing but this codec's
# values.
IMPORTS = {
    "worker/factories.py": {"import_module"},
    "adapters/__init__.py": {"import_module"},
    "adapters/buffers.py": {"import_module"},
    "adapters/datasets/exporting.py": {"import_module"},
    "worker/process_env.py": {"pickle"},
    "worker/inside.py": {"pickle"},
}


def found(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES:
                yield str(node.module)
            yield from (alias.name for alias in node.names if alias.name in METHODS)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield node.func.id
            elif isinstance(node.func, ast.Attribute) and {node.func.attr, ast.unparse(node.func)} & METHODS:
                yield node.func.attr
            for keyword in node.keywords:
                if keyword.arg in {"allow_pickle", "shell"} and getattr(keyword.value, "value", True) is not False:
                    yield str(keyword.arg)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_has_nothing_that_runs_what_it_is_given(file: Path) -> None:
    allowed = IMPORTS.get(str(file.relative_to(PACKAGE)), set())
    assert set(found(ast.parse(file.read_text("utf-8")))) <= allowed


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(x)",
        "__import__('os')",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "os.system('x')",
        "subprocess.run(x, shell=True)",
        "np.load(x, allow_pickle=True)",
        "msgpack_numpy.patch()\nimport msgpack_numpy",
    ],
)
def test_what_is_looked_for_is_found(text: str) -> None:
    assert list(found(ast.parse(text)))
