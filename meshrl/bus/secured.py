"""A server's configuration with TLS, teams and logins, as files in a directory (``meshrl secure init``).

    nats-server.conf          written once, then the operator's
    accounts.conf             written anew at each run, from logins.json
    logins.json               teams, their limits and logins, by public keys; the operator's too
    tls/                      the CA, and the server's certificate
    teams/<team>/<name>.login a login: its NKEY seed, and the CA that the server is checked against (0600)
    teams/<team>/state.key    for the team's env workers, which seal envs' states with it (0600)

The rule of this file: *no key is ever written over.* What is there stays; what is asked for and missing is made.
The server knows public keys alone, so that nothing in its configuration logs anybody in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from meshrl.bus.certificates import check_hosts, make_ca, make_signed, write_new, write_private
from meshrl.bus.embedded import MAX_PAYLOAD_BYTES, PING_INTERVAL, PING_MAX, WRITE_DEADLINE
from meshrl.errors import UsageError
from meshrl.protocol.roles import ROLES, Role, permissions
from meshrl.wire.subjects import is_id

# A learner has three connections (its own, the registry's, the keeper's), a worker two.
TEAM_CONNECTIONS = 10_000
# A client has two or three on a connection, a worker one for each name and a dozen more.
TEAM_SUBSCRIPTIONS = 200_000
CONNECTION_SUBSCRIPTIONS = 5_000
SERVER_CONNECTIONS = 50_000
# A handshake on a machine that is busy with envs.
HANDSHAKE_S = 10

_SERVER = """\
# A NATS server for meshrl, with TLS and logins. Written once by `meshrl secure init`; change what you like.
#
#   nats-server --config {config}
#   nats-server --signal reload        after another `meshrl secure init`

listen: {listen}

tls {{
  cert_file: {cert}
  key_file: {key}
  timeout: {handshake}
  # Clients show a certificate of this CA's as well (tls_cert and tls_key of meshrl.bus.login.Credentials):
  #   ca_file: {ca}
  #   verify: true
}}
authorization {{ timeout: {handshake} }}

# Recordings and the audit. Nobody who logs in may purge or delete what is kept here.
jetstream {{ store_dir: {store} }}

# Of one connection, but the first.
max_connections: {connections}
max_subscriptions: {subscriptions}
max_payload: {payload}

# A client that is frozen, or reads nothing, is cut off within a lease.
ping_interval: "{ping}"
ping_max: {pings}
write_deadline: "{write}"

include accounts.conf
"""
_ACCOUNTS = """\
# Written by `meshrl secure init` from logins.json; changes here are lost.
accounts: {accounts}
"""
_LOGIN = """\
# meshrl: {role} {name} of team {team}. Whoever has this file is {name}.
-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------

# The server's certificate is checked against this.
{ca}"""


class Login(BaseModel):
    """A login that the server knows.

    Attributes:
        role: what it may do.
        nkey: its public key, and so the user in its subjects.
    """

    model_config = ConfigDict(extra="forbid")

    role: Role
    nkey: str


class Limits(BaseModel):
    """What a team may use of the server.

    Attributes:
        max_connections: at once.
        max_subscriptions: over all of them.
        max_payload: bytes of one message.
    """

    model_config = ConfigDict(extra="forbid")

    max_connections: int = TEAM_CONNECTIONS
    max_subscriptions: int = TEAM_SUBSCRIPTIONS
    max_payload: int = MAX_PAYLOAD_BYTES


class Team(BaseModel):
    """A team: an account of its own on the server, from which there is no way to another.

    Attributes:
        limits: what it may use.
        logins: by name.
    """

    model_config = ConfigDict(extra="forbid")

    limits: Limits = Limits()
    logins: dict[str, Login] = {}


class Record(BaseModel):
    """``logins.json``.

    Attributes:
        teams: by name.
    """

    model_config = ConfigDict(extra="forbid")

    teams: dict[str, Team] = {}


@dataclass
class Done:
    """What one run did.

    Attributes:
        made: files that are new.
        kept: files and logins that were there.
        record: of all teams.
    """

    made: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    record: Record = field(default_factory=Record)


def secure(
    home: Path,
    *,
    teams: Sequence[str],
    logins: Mapping[str, Role],
    hosts: Sequence[str],
    listen: str,
) -> Done:
    """Make what is missing in ``home``; nothing that is there is changed but ``accounts.conf``.

    Args:
        home: the directory; made if need be.
        teams: to be there afterwards.
        logins: by name, for each of these teams; a new team without any gets one of each role, named as that.
        hosts: the server's names and addresses, for its certificate.
        listen: where it listens.

    Raises:
        UsageError: the directory holds something else, a name is none, a login of that name has another role, a key is
            there that the record does not know, or certificates cannot be made.
    """
    for name in (*teams, *logins):
        if not is_id(name):
            raise UsageError(f"{name!r} is no name for a team or a login: 1 to 64 letters, digits, _ and -")
    check_hosts(hosts)
    home = home.absolute()
    done = Done(record=_read(home))
    if not (home / "logins.json").exists() and home.is_dir() and any(home.iterdir()):
        raise UsageError(f"{home} is not empty, and was not made by meshrl secure init; name another directory")
    for directory in (home, home / "tls", home / "teams", *(home / "teams" / team for team in teams)):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_record(home, done.record)  # from here on it is known as this command's, also if certificates fail
    _certificates(home, hosts, done)
    for team in teams:
        _team(home, team, logins, done)
    _server(home, listen, done)
    return done


def revoke(home: Path, team: str, name: str) -> Path:
    """Forget a login; gives its file, which is deleted if it is there. The server has to be told to reload.

    Raises:
        UsageError: there is none of that name.
    """
    home = home.absolute()
    record = _read(home)
    known = record.teams.get(team)
    if known is None or name not in known.logins:
        there = [f"{each}/{login}" for each, of in record.teams.items() for login in of.logins]
        raise UsageError(f"there is no login {team}/{name} in {home}; there are: {', '.join(there) or 'none'}")
    del known.logins[name]
    _write_record(home, record)
    file = _login_file(home, team, name)
    file.unlink(missing_ok=True)
    return file


def names_of(home: Path) -> dict[str, str]:
    """The names of logins as ``team/name``, by the user that their subjects carry.

    Raises:
        UsageError: the directory was not made by :func:`secure`.
    """
    record = _read(home.absolute())
    if not record.teams:
        raise UsageError(f"{home} has no logins.json of meshrl secure init; name the directory that it made")
    return {login.nkey: f"{team}/{name}" for team, of in record.teams.items() for name, login in of.logins.items()}


def accounts(record: Record) -> dict[str, object]:
    """What the server's configuration has under ``accounts``, one a team."""
    return {
        team: {
            "jetstream": "enabled",
            "limits": of.limits.model_dump(),
            "users": [_user(login) for login in of.logins.values()],
        }
        for team, of in record.teams.items()
    }


def _user(login: Login) -> dict[str, object]:
    allowed = permissions(login.role, login.nkey)
    return {
        "nkey": login.nkey,
        "permissions": {
            "publish": {"allow": list(allowed.publish)},
            "subscribe": {"allow": list(allowed.subscribe)},
        },
    }


# --------------------------------------------------------------------------- the files


def _login_file(home: Path, team: str, name: str) -> Path:
    return home / "teams" / team / f"{name}.login"


def _read(home: Path) -> Record:
    file = home / "logins.json"
    try:
        return Record.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Record()
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UsageError(f"{file} cannot be read at {where}: {first['msg']}; mend it, or take it from a copy") from exc


def _write_record(home: Path, record: Record) -> None:
    _replace(home / "logins.json", record.model_dump_json(indent=2) + "\n")
    # The format of nats-server's configuration contains JSON.
    _replace(home / "accounts.conf", _ACCOUNTS.format(accounts=json.dumps(accounts(record), indent=2)))


def _replace(file: Path, text: str) -> None:
    """Write a file that may be there, as a whole or not at all."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        new.unlink(missing_ok=True)
        write_new(new, text)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def _certificates(home: Path, hosts: Sequence[str], done: Done) -> None:
    tls = home / "tls"
    ca, ca_key, cert, key = tls / "ca.pem", tls / "ca.key", tls / "server.pem", tls / "server.key"
    if ca.exists():
        done.kept.append(ca)
    else:
        _refuse(home, (ca_key, cert, key), f"{ca} is missing, and they are of another CA than a new one would be")
        make_ca(ca, ca_key, "meshrl CA")
        done.made += [ca, ca_key]
    if cert.exists() and key.exists():
        done.kept.append(cert)
        return
    _refuse(home, (cert, key), "one of the server's certificate and key is missing")
    if not ca_key.exists():
        raise UsageError(f"{ca_key} is missing, and it signs the server's certificate; put it back for this")
    make_signed(cert, key, "meshrl server", ca=ca, ca_key=ca_key, hosts=hosts)
    done.made += [cert, key]


def _refuse(home: Path, files: Iterable[Path], why: str) -> None:
    there = [str(file.relative_to(home)) for file in files if file.exists()]
    if there:
        raise UsageError(f"{why}: no key is written over; put back what is missing, or delete {', '.join(there)}")


def _team(home: Path, team: str, logins: Mapping[str, Role], done: Done) -> None:
    known = done.record.teams.get(team)
    wanted = dict(logins)
    if known is None:
        known = done.record.teams[team] = Team()
        wanted |= {role: role for role in ROLES if role not in wanted.values()}
        _state_key(home / "teams" / team / "state.key", done)
    ca = (home / "tls" / "ca.pem").read_text(encoding="utf-8")
    for name, role in wanted.items():
        file = _login_file(home, team, name)
        there = known.logins.get(name)
        if there is not None and there.role != role:
            raise UsageError(f"{team}/{name} has the role {there.role} already, not {role}; choose another name")
        if there is not None:
            done.kept.append(file)
            continue
        if file.exists():
            raise UsageError(f"{file} is there, and logins.json does not know it: delete it, its login was revoked")
        seed, nkey = _new_key()
        write_private(file, _LOGIN.format(role=role, name=name, team=team, seed=seed, ca=ca))
        known.logins[name] = Login(role=role, nkey=nkey)
        done.made.append(file)


def _state_key(file: Path, done: Done) -> None:
    """Made with its team and never again: envs' states that were sealed with another are worth nothing."""
    if file.exists():
        done.kept.append(file)
        return
    write_private(file, os.urandom(32).hex() + "\n")
    done.made.append(file)


def _new_key() -> tuple[str, str]:
    import nkeys  # noqa: PLC0415  # as in meshrl.bus.login

    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode(), nkeys.from_seed(seed).public_key.decode()


def _server(home: Path, listen: str, done: Done) -> None:
    _write_record(home, done.record)
    config = home / "nats-server.conf"
    if config.exists():
        done.kept.append(config)
        return
    tls = home / "tls"
    text = _SERVER.format(
        config=config,
        listen=json.dumps(listen),
        cert=json.dumps(str(tls / "server.pem")),
        key=json.dumps(str(tls / "server.key")),
        ca=json.dumps(str(tls / "ca.pem")),
        store=json.dumps(str(home / "jetstream")),
        handshake=HANDSHAKE_S,
        connections=SERVER_CONNECTIONS,
        subscriptions=CONNECTION_SUBSCRIPTIONS,
        payload=MAX_PAYLOAD_BYTES,
        ping=PING_INTERVAL,
        pings=PING_MAX,
        write=WRITE_DEADLINE,
    )
    write_new(config, text)
    done.made.append(config)
