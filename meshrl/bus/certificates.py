"""Certificates for TLS, made by the program ``openssl``: a CA of one's own, and what it signs.

``openssl`` and no library, because only the operator who runs ``meshrl secure init`` needs it, once, and nearly every
system has it; workers and learners only read what it wrote. What is made holds against OpenSSL's strict checks, which
Python has on since 3.13: key usages, and the identifiers by which a certificate names its issuer.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from meshrl.errors import UsageError

# P-256: every TLS library has it, and a handshake with it costs a tenth of one with RSA.
CURVE = "P-256"
CA_DAYS = 3650
# As long as the CA: a server whose certificate ran out takes no connection at all, and this one's key is no web site's.
DAYS = 3650
OPENSSL_S = 30.0

_CA = """\
[req]
prompt = no
distinguished_name = name
x509_extensions = ca
[name]
CN = {name}
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""
_SIGNED = """\
[req]
prompt = no
distinguished_name = name
[name]
CN = {name}
[signed]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = {usage}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
{more}
"""


def make_ca(certificate: Path, key: Path, name: str) -> None:
    """A CA: its certificate (PEM), and its key (PEM, 0600), which signs others.

    Raises:
        UsageError: there is no program ``openssl``, or it failed.
        FileExistsError: one of the files is there.
    """
    with tempfile.TemporaryDirectory(prefix="meshrl-ca-") as home:
        config, made_key, made = Path(home, "conf"), Path(home, "key"), Path(home, "pem")
        config.write_text(_CA.format(name=name))
        _make_key(made_key)
        _openssl(
            *("req", "-x509", "-new", "-sha256", "-days", str(CA_DAYS)),
            *("-config", str(config), "-key", str(made_key), "-out", str(made)),
        )
        write_private(key, made_key.read_text())
        write_new(certificate, made.read_text())


def make_signed(
    certificate: Path, key: Path, name: str, *, ca: Path, ca_key: Path, hosts: Sequence[str] = (), client: bool = False
) -> None:
    """A certificate (PEM) that the CA has signed, and its key (PEM, 0600).

    Args:
        certificate: where to.
        key: where to.
        name: whose it is.
        ca: the CA's certificate.
        ca_key: its key.
        hosts: names and addresses of a server.
        client: for a client that proves by it who it is, where the server asks for that.

    Raises:
        UsageError: there is no program ``openssl``, or it failed.
        FileExistsError: one of the files is there.
    """
    more = f"subjectAltName = {', '.join(map(_alternative, hosts))}" if hosts else ""
    text = _SIGNED.format(name=name, usage="clientAuth" if client else "serverAuth, clientAuth", more=more)
    with tempfile.TemporaryDirectory(prefix="meshrl-tls-") as home:
        config, made_key, made = Path(home, "conf"), Path(home, "key"), Path(home, "pem")
        request = Path(home, "csr")
        config.write_text(text)
        _make_key(made_key)
        _openssl("req", "-new", "-sha256", "-config", str(config), "-key", str(made_key), "-out", str(request))
        # The serial is a random number of the file's: two servers' certificates of one CA are not to have the same.
        _openssl(
            *("x509", "-req", "-sha256", "-days", str(DAYS), "-in", str(request)),
            *("-CA", str(ca), "-CAkey", str(ca_key), "-CAserial", str(Path(home, "serial")), "-CAcreateserial"),
            *("-extfile", str(config), "-extensions", "signed", "-out", str(made)),
        )
        write_private(key, made_key.read_text())
        write_new(certificate, made.read_text())


def check_hosts(hosts: Sequence[str]) -> None:
    """Refuse what is no host before anything is made.

    Raises:
        UsageError: one is neither a name nor an address.
    """
    for host in hosts:
        _alternative(host)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its user may read (0600), from its first byte on.

    Raises:
        FileExistsError: it is there; nothing is written over.
    """
    _write(path, text, 0o600)


def write_new(path: Path, text: str) -> None:
    """Write a file that is not a secret.

    Raises:
        FileExistsError: it is there.
    """
    _write(path, text, 0o644)


def _write(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)


def _alternative(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        pass
    if not host or not all(c.isascii() and (c.isalnum() or c in "-._*") for c in host):
        raise UsageError(f"{host!r} is neither a host's name nor its address; write mesh.example.org or 10.0.0.5")
    return f"DNS:{host}"


def _make_key(path: Path) -> None:
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{CURVE}", "-out", str(path))


def _openssl(*arguments: str) -> None:
    program = shutil.which("openssl")
    if program is None:
        raise UsageError(
            "the program openssl is not on the PATH, and certificates are made by it: install it (apt install "
            "openssl, brew install openssl), or run this on a machine that has it and copy the directory"
        )
    try:
        done = subprocess.run(  # noqa: S603  # a program found on the PATH, without a shell
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=OPENSSL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise UsageError(f"openssl {arguments[0]} did not run: {exc}; see that `openssl version` works") from exc
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UsageError(
            f"openssl {arguments[0]} failed: {lines[-1] if lines else f'code {done.returncode}'}; it has to be OpenSSL "
            "1.1.1 or LibreSSL 3 or later"
        )
