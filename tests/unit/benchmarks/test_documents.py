"""What a run writes into the documentation."""
# ruff: noqa: RUF001  # multiplication signs

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import documents, report, targets
from benchmarks.documents import BEGIN, END

ROOT = Path(__file__).parents[3]


@pytest.fixture
def results() -> dict[str, Any]:
    """A run as its file has it: OpenEnv's best case is slower, EnvPool faster, dm_env_rpc was not to be had."""
    series = {
        "meshrl/single": {"p50_us": [100.0, 110.0, 120.0], "rate": [9000.0, 9100.0, 9200.0]},
        "meshrl/echo": {"p50_us": [30.0, 40.0, 50.0]},
        "meshrl/vector64_1": {"rate": [100_000.0] * 3},
        "meshrl/vector64_2": {"rate": [150_000.0] * 3},
        "openenv_best/single": {"p50_us": [200.0, 220.0, 240.0]},
        "gymnasium_async/vector64": {"rate": [75_000.0] * 3},
        "envpool/vector64": {"rate": [1_500_000.0] * 3},
        "meshrl/lognormal_vector": {"rate": [900.0, 1000.0, 1100.0]},
        "meshrl/lognormal_pool": {"rate": [4000.0, 4200.0, 4100.0]},
        "meshrl/fair": {"kept": [0.8, 0.85, 0.84]},
    }
    reasons = {"dm_env_rpc": "cannot install dm_env_rpc: no such wheel"}
    settings = {"rounds": 3, "seconds": 0.7, "long_rounds": 1, "sessions": 2048, "ppo_steps": 20000, "quick": False}
    return {
        "format": 1,
        "begun": "2026-01-02 03:04 UTC",
        "took_s": 1200,
        "machine": {"system": "Linux 6", "processor": "Some CPU", "cores": 2, "python": "3.11.7"},
        "load": {"before": [0.1, 0.2, 0.3], "after": [2.0, 1.0, 0.5]},
        "settings": settings,
        "systems": {"meshrl": {"title": "meshrl", "notes": "one | two", "versions": {"python": "3.11.7"}}},
        "reasons": reasons,
        "series": series,
        "latency_quantiles_us": {"meshrl/single": [90.0, 110.0, 400.0], "openenv_best/single": [150.0, 220.0, 900.0]},
        "targets": targets.as_json(targets.judged(series, reasons), settings),
    }


def cells(table: report.Table, first: str) -> tuple[str, ...]:
    return next(row for row in table.rows if row[0].startswith(first))


def test_the_comparison_has_each_figure_and_what_it_is_of_ours(results: dict[str, Any]) -> None:
    table = report.comparison(results)
    assert cells(table, "meshrl")[1] == "110 µs"
    assert cells(table, "OpenEnv, best")[1] == "220 µs, 2.00 × (2.00 to 2.00)"
    assert cells(table, "EnvPool")[4] == "1,500,000/s, 10.0 × (10.0 to 10.0)"


def test_the_comparison_takes_the_better_of_our_ways_and_says_which(results: dict[str, Any]) -> None:
    assert cells(report.comparison(results), "meshrl")[4] == "150,000/s"
    assert "64 CartPoles: `vector64_2`" in report.taken(results)


def test_a_system_that_could_not_be_started_is_a_line_with_its_reason(results: dict[str, Any]) -> None:
    assert "no such wheel" in cells(report.comparison(results), "dm_env_rpc")[1]


def test_each_target_is_shown_with_its_figure_bound_and_verdict(results: dict[str, Any]) -> None:
    rows = report.judgements(results).rows
    assert len(rows) == sum(len(target.parts) for target in targets.TARGETS)
    said = {row[2].partition(":")[0]: row[2:] for row in rows}
    assert said["p50 less the echo's"] == ("p50 less the echo's: 70.0 µs (70.0 to 70.0), `single`", "≤ 60 µs", "missed")
    assert said["over AsyncVectorEnv"][1:] == ("≥ 3 ×", "missed")
    assert said["pool over lockstep"][2] == "met"
    assert said["kept of its rate alone"][0].startswith("kept of its rate alone: 84.0 %")
    assert said["over dm_env_rpc"][2].startswith("not measured")


def test_a_figure_of_one_round_has_no_interval_and_another_scale_is_said(results: dict[str, Any]) -> None:
    results["series"] |= {"sb3/ppo_mesh": {"taken_s": [12.0]}, "sb3/ppo_dummy": {"taken_s": [10.0]}}
    results["targets"] = targets.as_json(targets.judged(results["series"], {}), results["settings"])
    assert report.judgements(results).rows[-1][2:] == (
        "wall time over DummyVecEnv's: 1.20 × (one round), `ppo_mesh`, of 20,000 where the target says 100,000",
        "≤ 1.25 ×",
        "met",
    )


def test_the_page_has_tables_pictures_and_what_ran(results: dict[str, Any]) -> None:
    page = documents.page(results, ["bench-latency.png"])
    for part in ("## Targets", "images/bench-latency.png", "2026-01-02 03:04 UTC", "one \\| two", "no such wheel"):
        assert part in page
    assert "not for quoting" not in page


def test_runs_of_other_machines_stand_beside_this_one_part_by_part(results: dict[str, Any]) -> None:
    other = json.loads(json.dumps(results))
    other |= {"begun": "2026-02-03 04:05 UTC", "targets": targets.as_json(targets.judged({}, {}), other["settings"])}
    table = report.side_by_side(results, [other])
    assert [name.rpartition(", ")[2] for name in table.head[3:]] == ["2026-01-02 03:04 UTC", "2026-02-03 04:05 UTC"]
    said = {row[1]: row[2:] for row in table.rows}
    assert len(said) == sum(len(target.parts) for target in targets.TARGETS)
    assert said["p50 less the echo's"] == ("≤ 60 µs", "70.0 µs (70.0 to 70.0): missed", "not measured")
    assert said["kept of its rate alone"][0] == "≥ 90 %"
    page = documents.page(results, [], [other])
    assert "## The same on other machines" in page
    assert "2026-02-03 04:05 UTC" in page
    assert "other machines" not in documents.page(results, [])


def test_the_readme_says_what_is_missed_and_where_others_are_faster(results: dict[str, Any]) -> None:
    short = documents.short(results)
    assert "p50 less the echo's 70.0 µs (target: at most 60 µs)" in short
    assert "| EnvPool, local |" in short
    assert "10.0 ×" in short


def test_a_quick_look_is_called_one(results: dict[str, Any]) -> None:
    results["settings"]["quick"] = True
    assert "not for quoting" in documents.page(results, [])
    assert "not for quoting" in documents.short(results)


def test_only_what_is_between_the_markers_is_replaced() -> None:
    first = documents.between(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new")
    assert first == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert documents.between(first, "new") == first


@pytest.mark.parametrize("document", ["", BEGIN, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END])
def test_a_document_without_its_markers_is_refused(document: str) -> None:
    with pytest.raises(documents.NoMarkers):
        documents.between(document, "new")


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_documents_have_their_markers(name: str) -> None:
    assert documents.between((ROOT / name).read_text(), "new")


def test_a_run_that_was_kept_writes_pages_and_pictures(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text(f"# Title\n\n{BEGIN}\n{END}\n")
    kept = json.loads(json.dumps(results))
    written = {str(path.relative_to(tmp_path)) for path in documents.write(kept, tmp_path)}
    pictures = {f"docs/images/{name}" for name in documents.CAPTIONS}
    assert written == {"README.md", "docs/benchmarks.md"} | pictures
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
