"""Each way to log in, for each role, on a real server; said by the URL, the environment or an argument."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.login import Credentials
from meshrl.errors import LoginRefused, MeshUnreachable
from meshrl.worker.policies import random_policy
from tests.mesh.envs import Counter
from tests.mesh.logins import Authority, Operator, new_key, public, seed
from tests.mesh.own_server import OwnServer, own_server

PASSWORD = "p:w @x"
IN_URL = "ann:p%3Aw%20%40x"


async def every_role_works(url: str | None, credentials: Any, user: str) -> None:
    """An env worker, an agent worker and a client log in so, and an env is stepped by what an agent says."""
    async with (
        EnvWorker({"counter": Counter}, url, credentials=credentials, slots=1) as envs,
        AgentWorker({"random": random_policy}, url, credentials=credentials) as agents,
        Mesh(url, credentials=credentials) as mesh,
        await mesh.env("counter") as env,
    ):
        agent = await mesh.agent("random", env=env)
        obs, _ = await env.reset(seed=1)
        await env.step(await agent.act(obs, seed=1))
        assert [session.user for session in envs.table] == [user]
        for worker in (envs, agents, mesh):
            assert PASSWORD not in repr(worker)


@contextlib.asynccontextmanager
async def server_of_users(home: Path, more: dict[str, Any]) -> AsyncIterator[tuple[OwnServer, Path, str]]:
    """A server with a user by password and one by NKEY; gives it, the NKEY's file and the NKEY."""
    pair = new_key()
    file = home / "user.nk"
    file.write_text(f"{seed(pair)}\n")
    users = [{"user": "ann", "password": PASSWORD}, {"nkey": public(pair)}]
    async with own_server(home, {"authorization": {"users": users}, **more}) as server:
        yield server, file, public(pair)


WAYS = ["the url", "an object", "an nkey file", "an nkey file in the environment", "the url in the environment"]


@pytest.mark.parametrize("tls", [False, True], ids=["in the clear", "over TLS"])
@pytest.mark.parametrize("way", WAYS)
async def test_every_role_logs_in_by(way: str, tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca") if tls else None
    async with server_of_users(tmp_path, {"tls": authority.tls()} if authority else {}) as (server, file, nkey):
        scheme = "tls" if tls else "nats"
        url: str | None = server.url().replace("nats://", f"{scheme}://")
        with_login = server.url(IN_URL).replace("nats://", f"{scheme}://")
        if authority is not None:
            monkeypatch.setenv("MESHRL_TLS_CA", str(authority.ca))
        credentials: Any = None
        user = "ann"
        if way == "the url":
            url = with_login
        elif way == "an object":
            ca = authority.ca if authority else None
            credentials = Credentials(user="ann", password=SecretStr(PASSWORD), tls_ca=ca)
            monkeypatch.delenv("MESHRL_TLS_CA", raising=False)
        elif way == "an nkey file":
            credentials, user = file, nkey
        elif way == "an nkey file in the environment":
            monkeypatch.setenv("MESHRL_CREDENTIALS", str(file))
            user = nkey
        else:
            monkeypatch.setenv("MESHRL_URL", with_login)
            monkeypatch.setenv("MESHRL_CREDENTIALS", str(tmp_path / "absent"))  # the URL's login goes before it
            url = None
        await every_role_works(url, credentials, user)


async def test_every_role_logs_in_by_a_credentials_file_in_operator_mode(tmp_path: Path) -> None:
    operator, file = Operator(), tmp_path / "user.creds"
    user = operator.credentials(file)
    async with own_server(tmp_path, operator.config()) as server:
        await every_role_works(server.url(), file, user)
        Operator().credentials(file)
        with pytest.raises(LoginRefused, match="refuses the login"):
            async with connect(server.url(), credentials=file):
                pass


async def test_every_role_logs_in_by_one_file_with_a_key_and_the_ca(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    async with server_of_users(tmp_path, {"tls": authority.tls()}) as (server, file, nkey):
        file.write_text(
            f"# what is not read\n-----BEGIN USER NKEY SEED-----\n{file.read_text()}------END USER NKEY SEED------\n"
            + authority.ca.read_text()
        )
        await every_role_works(server.url(), file, nkey)


async def test_every_role_shows_its_certificate_where_the_server_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "ca")
    async with server_of_users(tmp_path, {"tls": authority.tls(mutual=True)}) as (server, file, nkey):
        own = Credentials(file=file, tls_ca=authority.ca, tls_cert=authority.cert, tls_key=authority.key)
        await every_role_works(server.url(), own, nkey)
        monkeypatch.setenv("MESHRL_TLS_CA", str(authority.ca))
        with pytest.raises(MeshUnreachable, match="it asks for a certificate of its clients; give tls_cert and"):
            async with connect(server.url().replace("nats", "tls"), credentials=file, timeout=3.0):
                pass
        monkeypatch.setenv("MESHRL_TLS_CERT", str(authority.cert))
        monkeypatch.setenv("MESHRL_TLS_KEY", str(authority.key))
        await every_role_works(server.url().replace("nats", "tls"), file, nkey)


async def test_a_server_whose_certificate_is_not_trusted_is_told_nothing_and_named(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    async with server_of_users(tmp_path, {"tls": authority.tls()}) as (server, file, _):
        for ca in (other.ca, None):
            url = server.url().replace("nats", "tls")
            with pytest.raises(MeshUnreachable, match=r"certificate is not trusted .*MESHRL_TLS_CA"):
                async with connect(url, credentials=Credentials(file=file, tls_ca=ca), timeout=1.0):
                    pass


@pytest.mark.parametrize("path", ["thin", "plain"])
async def test_where_tls_is_asked_for_a_server_without_it_is_told_nothing(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "plain":
        monkeypatch.setenv("MESHRL_BUS", "plain")
    ca = Authority(tmp_path / "ca").ca
    heard = bytearray()

    async def in_between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"auth_required":true}\r\n')
        with contextlib.suppress(ConnectionError):
            while more := await reader.read(4096):
                heard.extend(more)
        writer.close()

    listening = await asyncio.start_server(in_between, "127.0.0.1", 0, family=socket.AF_INET)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        for url, credentials in (
            (f"tls://{IN_URL}@127.0.0.1:{port}", None),
            (f"nats://127.0.0.1:{port}", Credentials(user="ann", password=SecretStr(PASSWORD), tls_ca=ca)),
        ):
            with pytest.raises(MeshUnreachable, match="it does not offer TLS, and nothing is said to it in the clear"):
                async with connect(url, credentials=credentials, timeout=1.0):
                    pass
    assert bytes(heard) == b""


async def test_a_wrong_password_or_key_is_refused_at_once(tmp_path: Path) -> None:
    async with server_of_users(tmp_path, {}) as (server, file, _):
        file.write_text(f"{seed(new_key())}\n")
        for url, credentials in ((server.url("ann:wrong"), None), (server.url(), file), (server.url(), None)):
            with pytest.raises(LoginRefused):
                async with connect(url, credentials=credentials):
                    pass
