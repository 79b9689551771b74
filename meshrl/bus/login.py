"""Logins: who a connection is on the NATS server, and the user token that its subjects carry.

A login comes from ``credentials=`` (a file or a :class:`Credentials`), from the URL (``nats://user:password@host``,
``nats://token@host``), from ``$MESHRL_CREDENTIALS`` (a file, for a URL without a login), or there is none, and the user
is ``anon``. A file is a credentials file (JWT and seed) or an NKEY seed; the certificates (PEM) that stand in it beside
those are what the server's is checked against, so that one file is all that a user needs.

With certificates, or an address that begins with ``tls://`` or ``wss://``, nothing is said to a server without TLS.
"""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, SecretStr

from meshrl.errors import InvalidName, LoginRefused
from meshrl.wire.subjects import token

ANONYMOUS = "anon"
CREDENTIALS_VARIABLE = "MESHRL_CREDENTIALS"
# For addresses with tls:// or wss://, where ``credentials=`` names no files of its own.
TLS_CA_VARIABLE, TLS_CERT_VARIABLE, TLS_KEY_VARIABLE = "MESHRL_TLS_CA", "MESHRL_TLS_CERT", "MESHRL_TLS_KEY"

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)


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
        options: keyword arguments of ``nats.connect``; with ``tls`` among them, nothing is sent in the clear.
        has_certificate: whether these show a certificate of the client's own.
    """

    url: str
    servers: list[str]
    user: str
    options: dict[str, Any] = field(repr=False)
    has_certificate: bool = False


def login(url: str, credentials: str | Path | Credentials | None = None) -> Login:
    """Read a login from ``url`` (several servers: separated by commas) and ``credentials``.

    Raises:
        LoginRefused: a credentials file is missing or holds neither a JWT with a seed nor an NKEY seed, or a file of
            TLS cannot be used.
        InvalidName: the URL has no host.
    """
    servers = [part.strip() for part in url.split(",") if part.strip()]
    servers = [part if "://" in part else f"nats://{part}" for part in servers]
    if not servers or any(not urlsplit(part).hostname for part in servers):
        raise InvalidName(f"{_without_login(url)!r} is not a NATS address; write nats://host:4222")
    creds = _given(credentials, servers)

    options: dict[str, Any] = {}
    user, certificates = None, ""
    if creds.file is not None:
        user, options, certificates = _from_file(creds.file)
    elif creds.user is not None and creds.password is not None:
        user = creds.user
        options = {"user": user, "password": creds.password.get_secret_value()}
    else:
        parts = urlsplit(servers[0])
        if parts.username and parts.password is not None:
            user = unquote(parts.username)
            options = {"user": user, "password": unquote(parts.password)}
        elif parts.username:
            options = {"token": unquote(parts.username)}
        elif creds.user is not None:
            options = {"user": creds.user, "password": ""}
        user = creds.user or user
    # What is not asked for is not sent either, and a password has no place in what is shown.
    servers = [_without_login(part) for part in servers]
    tls = _tls(creds, certificates, servers)
    if tls is not None:
        options["tls"] = tls
    return Login(
        url=",".join(servers),
        servers=servers,
        user=token(user) if user else ANONYMOUS,
        options=options,
        has_certificate=creds.tls_cert is not None,
    )


def _given(credentials: str | Path | Credentials | None, servers: list[str]) -> Credentials:
    """``credentials=``, with what the environment says where it says nothing."""
    named = os.environ.get(CREDENTIALS_VARIABLE)
    if isinstance(credentials, Credentials):
        creds = credentials
    elif credentials is not None:
        creds = Credentials(file=Path(credentials))
    elif named and not any(urlsplit(part).username for part in servers):
        creds = Credentials(file=Path(named))
    else:
        creds = Credentials()
    if not _asks_for_tls(servers):
        return creds
    ca, cert = os.environ.get(TLS_CA_VARIABLE), os.environ.get(TLS_CERT_VARIABLE)
    files: dict[str, Path] = {}
    if creds.tls_ca is None and ca:
        files["tls_ca"] = Path(ca)
    if creds.tls_cert is None and cert:
        files |= {"tls_cert": Path(cert), "tls_key": Path(os.environ.get(TLS_KEY_VARIABLE) or cert)}
    return creds.model_copy(update=files)


def _from_file(path: Path) -> tuple[str, dict[str, Any], str]:
    """The user that a file logs in, the options for that, and the certificates beside it."""
    try:
        whole = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is no text"
        raise LoginRefused(f"the credentials file {path} cannot be read: {why}", path=str(path)) from exc
    certificates = "".join(_PEM.findall(whole))
    text = _PEM.sub("", whole)  # a line of a certificate may look like a seed
    if "BEGIN NATS USER JWT" in text:
        lines = [line.strip() for line in text.splitlines()]
        jwt = next((line for line in lines if line.count(".") == 2 and line.startswith("ey")), "")
        try:
            claims = json.loads(base64.urlsafe_b64decode(jwt.split(".")[1] + "=="))
            return str(claims["sub"]), {"user_credentials": str(path.expanduser())}, certificates
        except (ValueError, KeyError, IndexError) as exc:
            raise LoginRefused(f"the credentials file {path} has no readable JWT", path=str(path)) from exc
    seed = next((line.strip() for line in text.splitlines() if line.strip().startswith("SU")), None)
    if seed is None:
        raise LoginRefused(f"{path} holds neither a credentials JWT nor an NKEY user seed", path=str(path))
    import nkeys  # noqa: PLC0415  # only logins by key need it

    try:
        public = nkeys.from_seed(seed.encode()).public_key.decode()
    except (nkeys.NkeysError, ValueError) as exc:
        raise LoginRefused(f"the NKEY user seed in {path} is damaged; get the file anew", path=str(path)) from exc
    return public, {"nkeys_seed_str": seed}, certificates


def _asks_for_tls(servers: list[str]) -> bool:
    return any(urlsplit(part).scheme in {"tls", "wss"} for part in servers)


def _tls(creds: Credentials, certificates: str, servers: list[str]) -> ssl.SSLContext | None:
    if not (creds.tls_ca or creds.tls_cert or certificates or _asks_for_tls(servers)):
        return None
    ca = str(creds.tls_ca.expanduser()) if creds.tls_ca else None
    named = [str(path) for path in (creds.tls_ca, creds.tls_cert, creds.tls_key, creds.file) if path is not None]
    try:
        context = ssl.create_default_context(cafile=ca, cadata=certificates or None)
        if creds.tls_cert is not None:
            key = str(creds.tls_key.expanduser()) if creds.tls_key else None
            context.load_cert_chain(str(creds.tls_cert.expanduser()), key)
    except OSError as exc:  # ssl.SSLError is one
        raise LoginRefused(
            f"a certificate or key of TLS ({', '.join(named)}) cannot be used: {exc.strerror or exc}; it has to "
            "be a PEM file",
            paths=named,
        ) from exc
    return context


def _without_login(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
