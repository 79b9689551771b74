"""``meshrl secure``: a server's configuration with TLS, teams and logins."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from meshrl.bus import secured
from meshrl.errors import UsageError
from meshrl.protocol.roles import Role

app = typer.Typer(help="A server's configuration with TLS, teams and logins.", no_args_is_help=True)

Names = list[str] | None
Home = Annotated[Path, typer.Argument(help="The directory.", metavar="DIR", show_default=False)]


@app.command("init")
def init(
    home: Home,
    team: Annotated[Names, typer.Option(help="A team, repeatable; default if none.", metavar="NAME")] = None,
    learner: Annotated[Names, typer.Option(help="A learner's login; repeatable.", metavar="NAME")] = None,
    env_worker: Annotated[Names, typer.Option(help="An env worker's login; repeatable.", metavar="NAME")] = None,
    agent_worker: Annotated[Names, typer.Option(help="An agent worker's login; repeatable.", metavar="NAME")] = None,
    observer: Annotated[Names, typer.Option(help="An observer's login; repeatable.", metavar="NAME")] = None,
    operator: Annotated[Names, typer.Option(help="An operator's login; repeatable.", metavar="NAME")] = None,
    host: Annotated[
        Names,
        typer.Option(
            help="A name or address by which clients reach the server, for its certificate; repeatable. This machine's "
            "name and localhost if none.",
            metavar="HOST",
        ),
    ] = None,
    listen: Annotated[str, typer.Option(help="Where the server listens.", metavar="HOST:PORT")] = "0.0.0.0:4222",
) -> None:
    """Write a nats-server configuration: TLS, an account a team, a login a role.

    A new team gets a login of each role that is not named. Run it again for more teams and logins: what is there stays,
    and no key is ever written over.
    """
    given: dict[Role, Names] = {
        "env-worker": env_worker,
        "agent-worker": agent_worker,
        "learner": learner,
        "observer": observer,
        "operator": operator,
    }
    logins: dict[str, Role] = {}
    for role, names in given.items():
        for name in names or ():
            if name in logins:
                raise UsageError(f"the login {name} is named twice; give one another name")
            logins[name] = role
    hosts = host or list(dict.fromkeys([socket.gethostname(), "localhost", "127.0.0.1", "::1"]))
    done = secured.secure(home, teams=team or ["default"], logins=logins, hosts=hosts, listen=listen)
    show(home, done, hosts[0], listen.rpartition(":")[2], team[-1] if team else "default")


@app.command("revoke")
def revoke(
    home: Home,
    login: Annotated[str, typer.Argument(help="The login.", metavar="TEAM/NAME", show_default=False)],
) -> None:
    """Take a login away: it is refused from the server's next reload on."""
    team, slash, name = login.partition("/")
    if not slash:
        raise UsageError(f"a login is TEAM/NAME, such as default/learner, not {login!r}")
    secured.revoke(home, team, name)
    print(f"revoked {login}; now tell the server: nats-server --signal reload")


def show(home: Path, done: secured.Done, host: str, port: str, team: str) -> None:
    """Print what was made, and what to do with it, for one of the teams."""
    for what, files in (("kept", done.kept), ("made", done.made)):
        for file in files:
            gone = "" if file.exists() else " (its file is not here)"
            print(f"{what}  {file.relative_to(home.absolute())}{gone}")
    config = home / "nats-server.conf"
    url = f"tls://{host}:{port}"
    logins = done.record.teams[team].logins
    of = {login.role: home / "teams" / team / f"{name}.login" for name, login in reversed(logins.items())}
    print(
        f"""
Start the server, or tell the one that runs (nats-server --signal reload):

    nats-server --config {config}

Give each login's file to who it is for, and keep tls/ca.key where nobody else is:

    meshrl serve cartpole --url {url} --credentials {of.get("env-worker", "FILE")}
    meshrl ls --url {url} --credentials {of.get("operator", "FILE")}
    async with Mesh("{url}", credentials="{of.get("learner", "FILE")}") as m: ..."""
    )
