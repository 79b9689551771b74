"""How ``meshrl ls`` shows what is advertised."""

from __future__ import annotations

from rich.console import Console

from meshrl.cli.ls import Listing, ServedEnv, tables


def shown(*implementations: str | None) -> str:
    envs = [
        ServedEnv(
            kind="env",
            name="CartPole-v1",
            worker=f"w{n}",
            slots=8,
            free=8,
            description="x",
            implementation=implementation,
        )
        for n, implementation in enumerate(implementations)
    ]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(tables(Listing(url="nats://host:4222", namespace="default", envs=envs, agents=[], idle=[])))
    return capture.get()


def test_vectors_that_are_not_meshrls_own_are_marked_by_who_steps_them() -> None:
    lines = shown("meshrl", "gymnasium", "envpool").splitlines()
    (ours,), (theirs,), (pools,) = ([line for line in lines if worker in line] for worker in ("w0", "w1", "w2"))
    assert "vectors" in "".join(lines)
    assert "meshrl" not in ours
    assert theirs.rstrip().endswith("gymnasium")
    assert pools.rstrip().endswith("envpool")


def test_where_all_vectors_are_meshrls_own_nothing_is_said_of_them() -> None:
    assert "vectors" not in shown("meshrl", None)
