"""Logins: who a connection is on the NATS server, and the user token that its subjects carry.

A login comes from the URL (``nats://user:password@host``, ``nats://token@host``), from ``credentials=`` (a file or
a :class:`Credentials`), or there is none, and the user is ``anon``.
"""

from __future__ import annotations

import base64
import json
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, SecretStr

from meshrl.errors import InvalidName, LoginRefused
from meshrl.wire.subjects import token

ANONYMOUS = "anon"


class Credentials(BaseModel):
    """A login, given as one object instead of a file.

    Attributes:
        user: with ``password``, or alone as the name that the URL's login (``nats://token@host``) acts under.
        password: of the user.
        file: a credentials file (``.creds``: JWT and seed) or an NKEY seed file.
        tls_ca: certificates (PEM) that the server's is checked against; the system's when None.
        tls_cert: the client's own certificate (PEM), with ``tls_key``.
        tls_key: its key (PEM).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str | None = None
    password: SecretStr | None = None
    file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


@dataclass(frozen=True)
class Login:
    """What a connection needs to know of it.

    Attributes:
        url: the server's address without a password in it, fit for messages.
        servers: the addresses to dial.
        user: the user token of this login's subjects.
        options: keyword arguments of ``nats.connect``.
    """

    url: str
    servers: list[str]
    user: str
    options: dict[str, Any] = field(repr=False)


def login(url: str, credentials: str | Path | Credentials | None = None) -> Login:
    """Read a login from ``url`` (several servers: separated by commas) and ``credentials``.

    Raises:
        LoginRefused: a credentials file is missing or holds neither a JWT with a seed nor an NKEY seed.
        InvalidName: the URL has no host.
    """
    servers = [part.strip() for part in url.split(",") if part.strip()]
    servers = [part if "://" in part else f"nats://{part}" for part in servers]
    if not servers or any(not urlsplit(part).hostname for part in servers):
        raise InvalidName(f"{_shown(url)!r} is not a NATS address; write nats://host:4222")
    if credentials is None:
        creds = Credentials()
    elif isinstance(credentials, Credentials):
        creds = credentials
    else:
        creds = Credentials(file=Path(credentials))

    options: dict[str, Any] = {}
    user = None
    if creds.file is not None:
        user, options = _from_file(creds.file)
    elif creds.user is not None and creds.password is not None:
        user = creds.user
        options = {"user": user, "password": creds.password.get_secret_value()}
        servers = [_without_login(part) for part in servers]
    else:
        parts = urlsplit(servers[0])
        if parts.username and parts.password is not None:
            user = unquote(parts.username)
            options = {"user": user, "password": unquote(parts.password)}
            servers = [_without_login(part) for part in servers]
        elif parts.username:
            options = {"token": unquote(parts.username)}
            servers = [_without_login(part) for part in servers]
        elif creds.user is not None:
            options = {"user": creds.user, "password": ""}
        user = creds.user or user
    tls = _tls(creds, servers)
    if tls is not None:
        options["tls"] = tls
    shown = ",".join(_shown(part) for part in servers)
    return Login(url=shown, servers=servers, user=token(user) if user else ANONYMOUS, options=options)


def _from_file(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as exc:
        raise LoginRefused(f"the credentials file {path} cannot be read: {exc.strerror}", path=str(path)) from exc
    if "BEGIN NATS USER JWT" in text:
        lines = [line.strip() for line in text.splitlines()]
        jwt = next((line for line in lines if line.count(".") == 2 and line.startswith("ey")), "")
        try:
            claims = json.loads(base64.urlsafe_b64decode(jwt.split(".")[1] + "=="))
            return str(claims["sub"]), {"user_credentials": str(path.expanduser())}
        except (ValueError, KeyError, IndexError) as exc:
            raise LoginRefused(f"the credentials file {path} has no readable JWT", path=str(path)) from exc
    seed = next((line.strip() for line in text.splitlines() if line.strip().startswith("SU")), None)
    if seed is None:
        raise LoginRefused(f"{path} holds neither a credentials JWT nor an NKEY user seed", path=str(path))
    import nkeys  # noqa: PLC0415  # only logins by key need it

    public = nkeys.from_seed(seed.encode()).public_key.decode()
    return public, {"nkeys_seed_str": seed}


def _tls(creds: Credentials, servers: list[str]) -> ssl.SSLContext | None:
    wanted = creds.tls_ca or creds.tls_cert or any(urlsplit(part).scheme in {"tls", "wss"} for part in servers)
    if not wanted:
        return None
    context = ssl.create_default_context(cafile=str(creds.tls_ca) if creds.tls_ca else None)
    if creds.tls_cert is not None:
        context.load_cert_chain(str(creds.tls_cert), str(creds.tls_key) if creds.tls_key else None)
    return context


def _without_login(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _shown(url: str) -> str:
    return _without_login(url) if "@" in url else url
