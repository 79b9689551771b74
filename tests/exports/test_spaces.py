"""Whatever the spaces and infos are: it comes back to the bit, or is refused by an error that names what holds it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshrl.adapters.datasets.columns import column_of, leaves_of
from meshrl.adapters.datasets.exporting import Format
from meshrl.adapters.datasets.minari import MinariFormat
from meshrl.adapters.datasets.minari_reading import MinariFile
from meshrl.adapters.datasets.npz import NpzFormat
from meshrl.adapters.datasets.parquet import ParquetFormat, read_parquet
from meshrl.client.episode import Episode
from meshrl.errors import FormatCannotHold
from tests.exports.episodes import alike, made, recorded_of, same_episodes, written
from tests.unit.wire import strategies

STEPS = 3
infos = st.lists(
    st.dictionaries(st.sampled_from(("a", "b", "_a", "d/e", "..", "", "é")), strategies.values, max_size=3),
    min_size=STEPS + 1,
    max_size=STEPS + 1,
)
examples = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
Space = gymnasium.Space[Any]


def episodes_of(observations: Space, actions: Space, told: list[dict[str, Any]]) -> list[Episode]:
    recorded = recorded_of(observations, actions)
    return [made(recorded, 0, STEPS, told), made(recorded, 1, STEPS)]


@given(strategies.all_spaces, strategies.all_spaces, infos)
@examples
def test_parquet_holds_everything(observations: Space, actions: Space, told: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        episodes = episodes_of(observations, actions, told)
        path = kept(ParquetFormat(Path(place) / "x.parquet"), episodes, place, "mask")
        if path is None:
            return
        for one, other in zip(episodes, read_parquet(path), strict=True):
            same_episodes(one, other)


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_minari_holds_it_or_says_what_does(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @given(strategies.all_spaces, strategies.all_spaces, infos)
    @examples
    def holds(observations: Space, actions: Space, told: list[dict[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as place:
            monkeypatch.setenv("MINARI_DATASETS_PATH", place)
            episodes = episodes_of(observations, actions, told)
            if (path := kept(MinariFormat("made-v0", storage), episodes, place)) is None:
                return
            file = MinariFile(path)
            assert (file.observation_space, file.action_space) == (observations, actions)
            for i, one in enumerate(episodes):
                read = file.episode(i)
                assert (read.seed, alike(read.options, one.options)) == (one.seed, True)
                for name in ("rewards", "terminations", "truncations", "policy_versions", "at_s", "infos"):
                    assert alike(getattr(read, name), getattr(one, name)), name
                for t, transition in enumerate(one.transitions()):
                    assert alike(read.observations[t], transition.observation)
                    assert alike(read.actions[t], transition.action)
                    assert alike(read.observations[t + 1], transition.next_observation)

    holds()


@given(strategies.all_spaces, strategies.all_spaces, infos)
@examples
def test_npz_holds_it_or_says_what_does(observations: Space, actions: Space, told: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        episodes = episodes_of(observations, actions, told)
        path = kept(NpzFormat(Path(place) / "x.npz"), episodes, place)
        if path is None:
            return
        with np.load(path, allow_pickle=False) as arrays:
            assert len(json.loads(str(arrays["meta"]))["episodes"]) == len(episodes)
            for offsets, space, role in (
                (arrays["observation_offsets"], observations, "observations"),
                (arrays["episode_offsets"], actions, "actions"),
            ):
                for i, one in enumerate(episodes):
                    column = column_of(space, getattr(one, role), role, "npz")
                    stored = {name: arrays[name] for name in arrays.files if name.partition("/")[0] == role}
                    leaves = [leaf for _, leaf in leaves_of(column)]
                    assert len(leaves) == len(stored)
                    assert all(
                        leaf == array[offsets[i] : offsets[i + 1]].tolist()
                        if isinstance(leaf, list)
                        else alike(leaf, array[offsets[i] : offsets[i + 1]])
                        for leaf, array in zip(leaves, stored.values(), strict=True)
                    )


def kept(format_: Format, episodes: list[Episode], place: str, *reasons: str) -> Path | None:
    """Where they were written; None where they were refused as they should be."""
    refused = None
    try:
        return asyncio.run(written(format_, episodes, Path(place)))
    except FormatCannotHold as exc:
        refused = exc.message
    assert any(reason in refused for reason in reasons or ("parquet", "mask"))
    return None
