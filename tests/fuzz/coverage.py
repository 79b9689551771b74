"""Runs the coverage-guided fuzzer on the targets, and keeps the inputs that reach something new.

::

    python -m tests.fuzz.coverage --seconds 60          # needs the package atheris: `make fuzz-coverage`

Each target runs in a process of its own, from its corpus and for so many seconds; what it found is merged with that and
made minimal, and ``tests/fuzz/corpus/<target>.json`` is written anew. An input at which a target fails is printed in
hexadecimal, kept in the corpus, and the program ends with code 1.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]
MAX_BYTES = 512


def inputs(target: str) -> list[bytes]:
    """What is kept of a target."""
    path = CORPUS / f"{target}.json"
    return [bytes.fromhex(line) for line in json.loads(path.read_text("utf-8"))] if path.exists() else []


def keep(target: str, kept: set[bytes]) -> None:
    """Write the corpus of a target: the short ones first."""
    lines = ",\n".join(json.dumps(data.hex()) for data in sorted(kept, key=lambda data: (len(data), data)))
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{target}.json").write_text(f"[\n{lines}\n]\n", "utf-8")


def seeds(target: str) -> list[bytes]:
    """Where a target begins beside its corpus: for the codec, the messages of the contract."""
    from tests.fuzz import templates
    from tests.fuzz.targets import CONTROL

    if target != "codec":
        return []
    control = [bytes([at]) + body for at, model in enumerate(CONTROL) for body in _golden(model.__name__)]
    parts = [bytes([20, len(part[1:256])]) + part[1:256] for part in templates.anything() if part[:1] == b"\x96"]
    return [*control, *parts, *(b"\xff" + body for body in templates.anything())]


def _golden(message: str) -> list[bytes]:
    from tests.contract.reading import corpus

    return [bytes.fromhex(entry["hex"]) for entry in corpus("golden", "control") if entry["message"] == message]


def fuzz(target: str, seconds: int) -> bytes | None:
    """Fuzz a target and keep what is new; gives the input at which it failed, if there was one."""
    with tempfile.TemporaryDirectory() as home:
        found, merged, crashes = (Path(home) / name for name in ("found", "merged", "crashes"))
        for directory in (found, merged, crashes):
            directory.mkdir()
        for number, data in enumerate([*inputs(target), *seeds(target)]):
            (found / f"kept-{number}").write_bytes(data[:MAX_BYTES])
        limits = [f"-max_len={MAX_BYTES}", "-rss_limit_mb=2048", "-timeout=20", f"-artifact_prefix={crashes}/"]
        program = _program(target, Path(home))
        _child(program, str(found), f"-max_total_time={seconds}", "-print_final_stats=1", *limits)
        failed = [crash.read_bytes() for crash in crashes.iterdir()]
        _child(program, "-merge=1", str(merged), str(found), *limits)
        keep(target, {path.read_bytes() for path in merged.iterdir()} | set(failed))
        return failed[0] if failed else None


def _program(target: str, home: Path) -> Path:
    """The fuzzer of a target as a program: to merge, libFuzzer starts again what it was started as."""
    program = home / f"fuzz-{target}"
    line = shlex.join([sys.executable, "-m", "tests.fuzz.coverage", "--child", target, str(program)])
    program.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
    program.chmod(0o700)
    return program


def _child(program: Path, *arguments: str) -> None:
    # Its exit code is of no use: libFuzzer's differ by version. An input at which it failed lies there as a file.
    subprocess.run([str(program), *arguments], cwd=ROOT, check=False)


def child(target: str, arguments: list[str]) -> None:
    """Be the fuzzer; does not return."""
    import atheris

    with atheris.instrument_imports(include=["meshrl", "msgpack"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup(arguments, TARGETS[target])
    atheris.Fuzz()


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description="coverage-guided fuzzing of the codec, lanes and sessions")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("targets", nargs="*", default=["codec", "lanes", "sessions"])
    options = parser.parse_args()
    code = 0
    for target in options.targets:
        failed = fuzz(target, options.seconds)
        if failed is not None:
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
