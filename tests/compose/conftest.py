"""An engine for the compose tests, or the reason why they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.stack import Engine, Stack, Unavailable, connect_engine, free_port


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The Docker engine."""
    try:
        client = connect_engine()
    except Unavailable as exc:
        pytest.skip(str(exc))
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def stack(engine: Engine) -> Iterator[Stack]:
    """The stack, up, beside whatever else runs here; afterwards nothing of it is left."""
    with Stack(engine, free_port()) as up:
        yield up


@pytest.fixture
def up(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The stack; its logs are printed when the test fails."""
    failed_before = request.session.testsfailed
    yield stack
    if request.session.testsfailed > failed_before:
        print(stack.logs())  # noqa: T201  # pytest shows it with the failure
