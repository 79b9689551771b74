"""Keys, certificates and JWTs for servers of the tests' own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import nkeys

from meshrl.bus.certificates import make_ca, make_signed


def new_key(prefix: int = nkeys.PREFIX_BYTE_USER) -> nkeys.KeyPair:
    """A key pair of NATS's; its seed is ``pair.seed``."""
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))


def public(pair: nkeys.KeyPair) -> str:
    return str(pair.public_key.decode())


def seed(pair: nkeys.KeyPair) -> str:
    return bytes(pair.seed).decode()


class Authority:
    """A CA with a server's certificate for 127.0.0.1, and one for a client.

    Attributes:
        ca: the CA's certificate.
        cert: the client's.
        key: its key.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir()
        self._home = home
        self.ca, self.cert, self.key = home / "ca.pem", home / "client.pem", home / "client.key"
        make_ca(self.ca, home / "ca.key", "tests")
        server, key, ca_key = home / "server.pem", home / "server.key", home / "ca.key"
        make_signed(server, key, "server", ca=self.ca, ca_key=ca_key, hosts=("127.0.0.1",))
        make_signed(self.cert, self.key, "client", ca=self.ca, ca_key=ca_key, client=True)

    def tls(self, *, mutual: bool = False) -> dict[str, Any]:
        """What a server's configuration has under ``tls``."""
        server = {"cert_file": str(self._home / "server.pem"), "key_file": str(self._home / "server.key")}
        return {**server, "ca_file": str(self.ca), "verify": mutual, "timeout": 10}


class Operator:
    """NATS's operator mode: an operator, an account, and a user with permissions, by JWTs (version 2).

    ``nsc`` makes these; they are signed JSON, as https://docs.nats.io/running-a-nats-service/configuration/securing_nats/jwt
    describes.
    """

    def __init__(self) -> None:
        self._operator, self._account = new_key(nkeys.PREFIX_BYTE_OPERATOR), new_key(nkeys.PREFIX_BYTE_ACCOUNT)

    def config(self) -> dict[str, Any]:
        """The server's configuration."""
        limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "conn": -1, "leaf": -1}
        account = {"type": "account", "version": 2, "limits": limits, "default_permissions": {"pub": {}, "sub": {}}}
        return {
            "operator": _jwt(self._operator, public(self._operator), {"type": "operator", "version": 2}),
            "resolver": "MEMORY",
            "resolver_preload": {public(self._account): _jwt(self._operator, public(self._account), account)},
        }

    def credentials(self, file: Path) -> str:
        """Write a user's credentials file; gives the user's public key."""
        user = new_key()
        claims = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}}
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{_jwt(self._account, public(user), claims)}\n"
            "------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed(user)}\n------END USER NKEY SEED------\n"
        )
        return public(user)


def _jwt(issuer: nkeys.KeyPair, subject: str, claims: dict[str, Any]) -> str:
    body = {"iat": 1_700_000_000, "iss": public(issuer), "name": "tests", "sub": subject, "nats": claims}
    body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
    signed = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(body)}"
    signature = base64.urlsafe_b64encode(issuer.sign(signed.encode())).decode().rstrip("=")
    return f"{signed}.{signature}"


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).decode().rstrip("=")
