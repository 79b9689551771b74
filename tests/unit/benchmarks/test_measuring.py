"""What is kept of the answers that systems give."""

import pytest

from benchmarks import measuring
from benchmarks.works import Turn


def test_a_count_becomes_a_rate_and_samples_a_median() -> None:
    answer = {"count": 50, "seconds": 0.5, "samples_us": [30.0, 10.0, 20.0]}
    assert measuring.quantities("single", answer) == {"rate": 100.0, "p50_us": 20.0}


def test_pictures_have_their_megabytes_a_second() -> None:
    answer = {"count": 64, "seconds": 2.0}
    pictures = measuring.quantities("image32", answer)
    echoes = measuring.quantities("echo_image32", {"count": 2, "seconds": 2.0})  # 32 pictures each
    assert pictures["mb_per_s"] == pytest.approx(32 * 84 * 84 * 4 / 1e6)
    assert echoes["mb_per_s"] == pytest.approx(pictures["mb_per_s"])


def test_sessions_count_those_that_succeeded() -> None:
    answer = {"n": 10, "ok": 8, "seconds": 4.0, "p50_s": 1.5, "p99_s": 3.0, "errors": {"it broke": 2}}
    found = measuring.quantities("sessions", answer)
    assert found == {"rate": 2.0, "succeeded": 0.8, "p50_s": 1.5, "p99_s": 3.0}


def test_a_learning_run_has_the_time_that_it_took() -> None:
    assert measuring.quantities("ppo_mesh", {"count": 100, "seconds": 4.0}) == {"rate": 25.0, "taken_s": 4.0}


def test_a_system_that_was_not_started_is_a_reason_and_no_figure() -> None:
    run = measuring.Run()
    run.take(Turn("rlmesh", "single"), 0.1)
    kept = run.as_json()
    assert kept["series"] == {}
    assert kept["reasons"] == {"rlmesh/single": "it was not started"}
