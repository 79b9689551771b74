"""Logins: who a connection is, from each way to say it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import nkeys
import pytest

from meshrl.bus.connect import connect
from meshrl.bus.login import ANONYMOUS, Credentials, login
from meshrl.errors import InvalidName, LoginRefused
from tests.mesh.own_server import own_server


def test_without_a_login_the_user_is_anon() -> None:
    found = login("nats://example:4222")
    assert found.user == ANONYMOUS == "anon"
    assert found.servers == ["nats://example:4222"]
    assert found.options == {}


def test_user_and_password_come_from_the_url_and_leave_it() -> None:
    found = login("nats://ann%40lab:p%3Aw@example:4222")
    assert found.options == {"user": "ann@lab", "password": "p:w"}
    assert found.url == "nats://example:4222"
    assert found.user == "ann@lab"
    assert "p:w" not in repr(found)


def test_a_token_comes_from_the_url_and_leaves_it() -> None:
    found = login("nats://s3%40cret@example:4222")
    assert found.options == {"token": "s3@cret"}
    assert found.servers == ["nats://example:4222"]
    assert found.user == ANONYMOUS
    assert "cret" not in repr(found)


def test_a_name_alone_is_what_the_urls_login_acts_under() -> None:
    named = Credentials(user="me")
    by_token = login("nats://s3cret@example:4222", named)
    assert (by_token.user, by_token.options) == ("me", {"token": "s3cret"})
    by_password = login("nats://ann:pw@example:4222", named)
    assert (by_password.user, by_password.options) == ("me", {"user": "ann", "password": "pw"})
    alone = login("nats://example:4222", named)
    assert (alone.user, alone.options) == ("me", {"user": "me", "password": ""})


def test_a_user_and_password_given_apart_go_before_those_of_the_url() -> None:
    found = login("nats://ann:pw@example:4222", Credentials.model_validate({"user": "bob", "password": "x"}))
    assert (found.user, found.options) == ("bob", {"user": "bob", "password": "x"})
    assert found.servers == ["nats://example:4222"]


async def test_a_server_takes_the_urls_token_under_a_name(tmp_path: Path) -> None:
    async with own_server(tmp_path, {"authorization": {"token": "s3cret"}}) as server:
        for credentials, user in ((None, "anon"), (Credentials(user="me"), "me")):
            async with connect(server.url("s3cret"), credentials=credentials) as bus:
                assert bus.user == user
                assert await bus.ask("nobody", b"x", 5.0) is None
        with pytest.raises(LoginRefused):
            async with connect(server.url("wrong")):
                pass


def test_several_servers_are_separated_by_commas_and_a_bare_host_is_taken() -> None:
    assert login("one:4222, nats://two:4223").servers == ["nats://one:4222", "nats://two:4223"]


def test_a_users_name_becomes_one_token() -> None:
    assert login("nats://h", Credentials.model_validate({"user": "a.b *>", "password": "x"})).user == "a%2Eb%20%2A%3E"


def test_an_nkey_file_gives_its_public_key_as_the_user(tmp_path: Path) -> None:
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
    file = tmp_path / "user.nk"
    file.write_text(seed.decode() + "\n")
    public = nkeys.from_seed(seed).public_key.decode()
    found = login("nats://h", file)
    assert found.user == public
    assert found.options == {"nkeys_seed_str": seed.decode()}
    assert seed.decode() not in repr(found)


def test_a_credentials_file_gives_its_subject_as_the_user(tmp_path: Path) -> None:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    jwt = f"{part({'alg': 'ed25519-nkey'})}.{part({'sub': 'UABC', 'name': 'ann'})}.sig"
    file = tmp_path / "user.creds"
    file.write_text(f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n")
    found = login("nats://h", str(file))
    assert found.user == "UABC"
    assert found.options == {"user_credentials": str(file)}


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN NATS USER JWT-----\nno\n"])
def test_a_file_that_holds_no_login_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad"
    file.write_text(text)
    with pytest.raises(LoginRefused, match="bad"):
        login("nats://h", file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LoginRefused, match="cannot be read"):
        login("nats://h", tmp_path / "absent")


@pytest.mark.parametrize("url", ["", " ", "nats://", "nats://:4222", ","])
def test_an_address_without_a_host_is_refused(url: str) -> None:
    with pytest.raises(InvalidName, match="nats://host"):
        login(url)


def test_the_environments_file_counts_where_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = [nkeys.encode_seed(bytes([n] * 32), nkeys.PREFIX_BYTE_USER) for n in (1, 2)]
    publics = [nkeys.from_seed(seed).public_key.decode() for seed in seeds]
    files = [tmp_path / "one.nk", tmp_path / "two.nk"]
    for file, seed in zip(files, seeds, strict=True):
        file.write_text(f"-----BEGIN USER NKEY SEED-----\n{seed.decode()}\n")
    monkeypatch.setenv("MESHRL_CREDENTIALS", str(files[0]))
    assert login("nats://h").user == publics[0]
    assert login("nats://h", files[1]).user == publics[1]
    assert login("nats://ann:pw@h").user == "ann"
    assert login("nats://token@h").user == ANONYMOUS
    assert login("nats://h", Credentials()).user == ANONYMOUS


def test_files_of_tls_in_the_environment_are_for_addresses_with_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHRL_TLS_CA", str(tmp_path / "absent.pem"))
    assert login("nats://h").options == {}
    for url in ("tls://h", "wss://h", "nats://h,tls://i"):
        with pytest.raises(LoginRefused, match=r"absent\.pem.* cannot be used: .*PEM"):
            login(url)


@pytest.mark.parametrize("name", ["tls_ca", "tls_cert"])
def test_a_file_of_tls_that_is_none_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / "not.pem"
    file.write_text("nonsense")
    with pytest.raises(LoginRefused, match=r"not\.pem"):
        login("tls://h", Credentials.model_validate({name: file}))


def test_a_line_of_a_certificate_is_not_taken_for_a_seed(tmp_path: Path) -> None:
    file = tmp_path / "only.pem"
    file.write_text("-----BEGIN CERTIFICATE-----\nSUAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(LoginRefused, match="neither"):
        login("nats://h", file)


@pytest.mark.parametrize("seed", ["SUAAAA", "SU" + "!" * 56])
def test_a_seed_that_is_damaged_is_refused(tmp_path: Path, seed: str) -> None:
    file = tmp_path / "damaged.nk"
    file.write_text(seed)
    with pytest.raises(LoginRefused, match=r"damaged\.nk is damaged; get the file anew"):
        login("nats://h", file)
