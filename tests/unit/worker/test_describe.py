"""What a description says of versions: of all that an env's behaviour is known to depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

import gymnasium
import numpy as np
import pytest
import zstandard

from meshrl.worker import describe
from meshrl.worker.describe import versions
from tests.mesh.envs import Counter

OWN = {"python", "libc", "meshrl", "gymnasium", "numpy"}


class Packs(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Its module imports a package that nothing else here comes from."""

    def observation(self, obs: int) -> bytes:
        return zstandard.ZstdCompressor().compress(np.int64(obs).tobytes())


def test_of_gymnasiums_own_those_of_gymnasium_and_numpy_are_all() -> None:
    assert versions(gymnasium.make("CartPole-v1")).keys() <= OWN
    assert OWN - {"libc"} <= versions(object()).keys()


def test_what_the_modules_of_an_env_and_its_wrappers_import_is_among_them() -> None:
    assert "zstandard" not in versions(Counter())
    known = versions(Packs(Counter()))
    assert known["zstandard"] == zstandard.__version__
    assert known["pytest"] == pytest.__version__
    assert "tests" not in known


def test_a_package_of_another_name_than_its_distribution_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_another_name(name: str) -> str:
        if name == "zstandard":
            raise PackageNotFoundError
        return f"{name} 7"

    describe._version.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(describe, "version", by_another_name)
        patch.setattr(describe, "packages_distributions", lambda: {"zstandard": ["zstd-by-another-name"]})
        assert versions(Packs(Counter()))["zstandard"] == "zstd-by-another-name 7"
    describe._version.cache_clear()
