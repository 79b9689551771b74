"""The package as it is installed: one import package, its public names, what it imports."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import meshrl
import meshrl.errors

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_one_import_package_and_its_type_marker(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"meshrl"}
    top = {name.split("/")[0] for name in names}
    assert top == {"meshrl", f"meshrl-{meshrl.__version__}.dist-info"}
    assert "meshrl/py.typed" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "meshrl").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "meshrl = meshrl.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_public_names_are_these() -> None:
    assert sorted(meshrl.__all__) == [
        "AgentWorker",
        "Credentials",
        "EnvWorker",
        "Factory",
        "Mesh",
        "PoolBatch",
        "RemoteAgent",
        "RemoteEnv",
        "RemotePool",
        "RemoteVectorEnv",
        "__version__",
        "errors",
        "make",
        "make_vec",
    ]
    for name in meshrl.__all__:
        assert hasattr(meshrl, name)


def test_it_imports_where_uvloop_fcntl_and_resource_do_not_exist() -> None:
    program = """
import sys
for name in ("uvloop", "fcntl", "resource", "termios", "pwd"):
    sys.modules[name] = None
import meshrl, meshrl.cli, meshrl.testing, meshrl.worker.host
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_it_imports_neither_the_command_line_nor_pictures() -> None:
    program = "import sys, meshrl; print([m for m in ('typer', 'rich', 'matplotlib', 'pygame') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_every_error_in_the_tree_at_the_top_of_errors_exists_and_the_other_way_round() -> None:
    head = (meshrl.errors.__doc__ or "").split("Each class")[0]
    classes = {
        name
        for name, value in vars(meshrl.errors).items()
        if isinstance(value, type) and issubclass(value, meshrl.errors.MeshError)
    }
    missing = {name for name in classes if name not in head}
    assert not missing, f"not in the tree: {missing}"
