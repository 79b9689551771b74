"""What ``meshrl doctor`` says of the extras."""

from __future__ import annotations

import pytest

from meshrl.cli import doctor


def test_an_extra_whose_package_is_missing_has_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"missing": "no-such-package-anywhere", "there": "numpy"}
    monkeypatch.setattr(doctor, "EXTRAS", [(extra, package, "a purpose") for extra, package in known.items()])
    missing, there = doctor.extras()
    assert (missing.status, missing.remedy) == ("warning", "pip install 'meshrl[missing]'")
    assert "a purpose" in missing.found
    assert (there.what, there.status, there.remedy) == ("extra there", "ok", "")


def test_the_extras_for_trainers_vectors_videos_and_datasets_have_rows() -> None:
    names = ["extra sb3", "extra envpool", "extra video", "extra minari", "extra parquet"]
    assert [row.what for row in doctor.extras()] == names
