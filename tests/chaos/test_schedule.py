"""The schedule comes from its seed alone, and brings what its quotas ask for."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from tests.chaos.quotas import LONG, SHORT, Quotas
from tests.chaos.schedule import LENGTH_S, TRACKS, Kind, faults


@pytest.mark.parametrize("track", TRACKS)
def test_the_same_seed_gives_the_same_faults_in_the_same_order_and_another_seed_others(track: str) -> None:
    first, again, other = (list(islice(faults(seed, track, LONG.faults), 200)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_kind_of_fault_is_in_one_track_and_has_a_quota() -> None:
    kinds = [kind for track in TRACKS.values() for kind in track.kinds]
    assert sorted(kinds, key=str) == sorted(Kind, key=str)
    assert LONG.faults.keys() == SHORT.faults.keys() == set(Kind)


@pytest.mark.parametrize("quotas", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("track", TRACKS)
def test_the_quotas_of_a_track_are_reached_at_about_the_same_time(track: str, quotas: Quotas) -> None:
    wanted = {kind: quotas.faults[kind] for kind in TRACKS[track].kinds}
    came = Counter(fault.kind for fault in islice(faults(1, track, quotas.faults), 2 * sum(wanted.values())))
    assert all(came[kind] >= count for kind, count in wanted.items())


def test_faults_last_as_long_as_their_kind_may_and_meet_anybody() -> None:
    for track in TRACKS:
        came = list(islice(faults(3, track, LONG.faults), 500))
        for fault in came:
            least, most = LENGTH_S.get(fault.kind, (0.0, 0.0))
            assert least <= fault.length_s <= most
            assert 0.0 <= fault.draw < 1.0
        assert min(fault.draw for fault in came) < 0.05
        assert max(fault.draw for fault in came) > 0.95


def test_without_a_quota_nothing_comes() -> None:
    assert list(faults(1, "kills", {})) == []
    few = islice(faults(1, "network", {Kind.CUT: 2}), 50)
    assert {fault.kind for fault in few} == {Kind.CUT}
