"""``meshrl secure``: what it writes, and that no key is ever written over."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from meshrl.bus.certificates import make_ca
from meshrl.bus.embedded import find_nats_server
from meshrl.bus.login import login
from meshrl.bus.secured import Done, names_of, revoke, secure
from meshrl.cli import main
from meshrl.errors import UsageError
from meshrl.protocol.roles import ROLES, Role
from meshrl.worker.sealing import StateKey

HOSTS = ["localhost", "127.0.0.1"]


def run(home: Path, *teams: str, listen: str = "127.0.0.1:-1", **logins: Role) -> Done:
    return secure(home, teams=teams or ["lab"], logins=logins, hosts=HOSTS, listen=listen)


def files(home: Path) -> dict[str, str]:
    return {str(file.relative_to(home)): file.read_text() for file in sorted(home.rglob("*")) if file.is_file()}


def test_a_new_directory_has_a_configuration_that_the_server_takes_and_a_login_of_each_role(tmp_path: Path) -> None:
    home = tmp_path / "new" / "d"
    done = run(home)
    assert set(files(home)) == {
        *("accounts.conf", "logins.json", "nats-server.conf"),
        *("tls/ca.key", "tls/ca.pem", "tls/server.key", "tls/server.pem"),
        *(f"teams/lab/{role}.login" for role in ROLES),
        "teams/lab/state.key",
    }
    assert StateKey.read(home / "teams/lab/state.key").id
    assert done.kept == []
    tested = subprocess.run(
        [find_nats_server(), "-t", "-c", home / "nats-server.conf"], capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stderr
    for role in ROLES:
        file = home / "teams" / "lab" / f"{role}.login"
        read = login("nats://localhost", file)
        assert read.user == done.record.teams["lab"].logins[role].nkey
        context = read.options["tls"]
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert len(context.get_ca_certs()) == 1


def test_secrets_are_their_users_alone_and_the_server_knows_no_seed(tmp_path: Path) -> None:
    home = tmp_path / "d"
    run(home)
    for file in home.rglob("*"):
        secret = file.suffix in {".login", ".key"}
        if secret or file.is_dir():
            assert file.stat().st_mode & 0o777 == (0o600 if secret else 0o700), file
        if not secret and file.is_file():
            assert "\nSU" not in file.read_text()
            assert "PRIVATE KEY" not in file.read_text()


def test_another_run_keeps_every_key_and_adds_what_is_missing(tmp_path: Path) -> None:
    home = tmp_path / "d"
    run(home, ann="learner")
    (home / "nats-server.conf").write_text("# the operator's own\n")
    before = files(home)
    assert "teams/lab/learner.login" not in before, "one was named"
    done = run(home, "lab", "other", bob="learner", ann="learner")
    after = files(home)
    assert {name: text for name, text in after.items() if name in before and name not in WRITTEN_ANEW} == {
        name: text for name, text in before.items() if name not in WRITTEN_ANEW
    }
    added = {"teams/lab/bob.login", "teams/other/ann.login", "teams/other/bob.login", "teams/other/state.key"}
    added |= {f"teams/other/{role}.login" for role in ROLES if role != "learner"}
    assert set(after) - set(before) == added == {str(file.relative_to(home)) for file in done.made}
    again = run(home, "lab", ann="learner")
    assert again.made == []
    assert files(home) == after


WRITTEN_ANEW = {"accounts.conf", "logins.json"}


def test_a_login_that_was_handed_out_is_not_made_anew(tmp_path: Path) -> None:
    home = tmp_path / "d"
    known = run(home).record.teams["lab"].logins["learner"]
    file = home / "teams" / "lab" / "learner.login"
    file.rename(tmp_path / "elsewhere")
    done = run(home, learner="learner")
    assert done.record.teams["lab"].logins["learner"] == known
    assert not file.exists()


def test_a_login_that_was_revoked_is_out_and_does_not_come_back(tmp_path: Path) -> None:
    home = tmp_path / "d"
    nkey = run(home).record.teams["lab"].logins["learner"].nkey
    file = home / "teams" / "lab" / "learner.login"
    stolen = file.read_text()
    assert nkey in (home / "accounts.conf").read_text()
    assert revoke(home, "lab", "learner") == file
    assert not file.exists()
    assert nkey not in (home / "accounts.conf").read_text()
    with pytest.raises(UsageError, match=r"no login lab/learner .*there are: lab/env-worker"):
        revoke(home, "lab", "learner")
    run(home)
    assert nkey not in (home / "accounts.conf").read_text()
    file.write_text(stolen)
    with pytest.raises(UsageError, match="its login was revoked"):
        run(home, learner="learner")
    file.unlink()
    assert run(home, learner="learner").record.teams["lab"].logins["learner"].nkey != nkey


def test_a_servers_certificate_that_was_deleted_is_made_anew_by_the_same_ca(tmp_path: Path) -> None:
    home = tmp_path / "d"
    run(home)
    tls = home / "tls"
    ca, old = (tls / "ca.pem").read_text(), (tls / "server.pem").read_text()
    (tls / "server.pem").unlink()
    with pytest.raises(UsageError, match=r"no key is written over.*delete tls/server\.key"):
        run(home)
    (tls / "server.key").unlink()
    (tls / "ca.key").rename(tmp_path / "safe")
    with pytest.raises(UsageError, match=r"ca\.key is missing"):
        run(home)
    (tmp_path / "safe").rename(tls / "ca.key")
    run(home)
    assert (tls / "ca.pem").read_text() == ca
    assert (tls / "server.pem").read_text() != old
    checked = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", tls / "ca.pem", tls / "server.pem"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    (tls / "ca.pem").unlink()
    with pytest.raises(UsageError, match=r"ca\.pem is missing"):
        run(home)
    assert not (tls / "ca.pem").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        run(tmp_path)
    assert files(tmp_path) == {"thesis.tex": "x"}


@pytest.mark.parametrize("text", ["", "{", '{"teams": 5}', '{"teams": {"lab": {"logins": {"x": {"role": "king"}}}}}'])
def test_a_record_that_cannot_be_read_is_not_written_over(tmp_path: Path, text: str) -> None:
    home = tmp_path / "d"
    run(home)
    (home / "logins.json").write_text(text)
    before = files(home)
    with pytest.raises(UsageError, match=r"logins\.json cannot be read at "):
        run(home)
    assert files(home) == before


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "x" * 65, "é"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    home = tmp_path / "d"
    with pytest.raises(UsageError, match="is no name"):
        secure(home, teams=[name], logins={}, hosts=HOSTS, listen=":4222")
    with pytest.raises(UsageError, match="is no name"):
        secure(home, teams=["lab"], logins={name: "learner"}, hosts=HOSTS, listen=":4222")
    assert not home.exists()


def test_a_name_has_one_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "d"
    run(home, ann="learner")
    with pytest.raises(UsageError, match="ann has the role learner already, not operator"):
        run(home, ann="operator")
    assert main(["secure", "init", str(home), "--learner", "x", "--operator", "x"]) == 1
    assert "named twice" in capsys.readouterr().err


def test_limits_in_the_record_are_the_operators(tmp_path: Path) -> None:
    home = tmp_path / "d"
    run(home)
    record = json.loads((home / "logins.json").read_text())
    record["teams"]["lab"]["limits"]["max_connections"] = 3
    (home / "logins.json").write_text(json.dumps(record))
    run(home)
    assert '"max_connections": 3' in (home / "accounts.conf").read_text()


def test_users_are_named_by_team_and_login(tmp_path: Path) -> None:
    home = tmp_path / "d"
    done = run(home, "lab", "other")
    named = names_of(home)
    assert named[done.record.teams["other"].logins["learner"].nkey] == "other/learner"
    assert len(named) == 2 * len(ROLES)
    with pytest.raises(UsageError, match="name the directory"):
        names_of(tmp_path)


@pytest.mark.parametrize("host", ["", "a b", "x,DNS:evil", "a\nb"])
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="neither a host's name nor its address"):
        secure(tmp_path / "d", teams=["lab"], logins={}, hosts=[host], listen=":4222")
    assert not (tmp_path / "d").exists()


def test_without_openssl_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"openssl is not on the PATH.*install it"):
        run(tmp_path / "d")


def test_an_openssl_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "openssl"
    program.write_text("#!/bin/sh\necho 'unknown option -pkeyopt' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(shutil.which('sh') or '/bin/sh').parent}")
    with pytest.raises(UsageError, match="openssl genpkey failed: unknown option -pkeyopt"):
        run(tmp_path / "d")
    monkeypatch.undo()
    assert len(run(tmp_path / "d").made) == 4 + len(ROLES) + 2, "the same directory will do once that is mended"


def test_a_certificate_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "ca.key").write_text("mine")
    with pytest.raises(FileExistsError):
        make_ca(tmp_path / "ca.pem", tmp_path / "ca.key", "x")
    assert (tmp_path / "ca.key").read_text() == "mine"


def test_the_command_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "d"
    line = ["secure", "init", str(home), "--team", "lab", "--learner", "ann", "--host", "mesh.example.org"]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert f"nats-server --config {home / 'nats-server.conf'}" in told
    assert f'Mesh("tls://mesh.example.org:4222", credentials="{home}/teams/lab/ann.login")' in told
    assert main(line) == 0
    assert "kept  teams/lab/ann.login" in capsys.readouterr().out
    assert main(["secure", "revoke", str(home), "ann"]) == 1
    assert "TEAM/NAME" in capsys.readouterr().err
    assert main(["secure", "revoke", str(home), "lab/ann"]) == 0
