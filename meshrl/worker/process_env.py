"""An env in a process of its own: to its worker an env like any other, but that it cannot take the worker with it.

What of it is asked goes to its process, one request at a time, and blocks the thread that asks: never ask it on an
event loop. Coroutine functions are run to their end over there, so here they are plain ones.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

import gymnasium
import numpy as np

from meshrl.errors import DeadlineExceeded, EnvError, MalformedMessage, UsageError, from_wire
from meshrl.wire import spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame
from meshrl.wire.messages import Description, Vectors
from meshrl.worker.child import Child, ChildGone
from meshrl.worker.children import Children
from meshrl.worker.factories import Factory, is_gymnasium_id
from meshrl.worker.limits import Limits, memory_exceeded
from meshrl.worker.raised import EndsSession, RaisedInside

# What its own ``close`` may take; then its process is killed.
CLOSE_S = 5.0


class Opaque:
    """Stands for a value of an info that has no form on the wire and so has stayed in the env's process.

    As any such value does, it makes the worker's answer an error that says where it stood, and of what class it was.
    """

    @staticmethod
    def of(kind: str) -> Opaque:
        """In place of a value of the class ``module.Name``."""
        module, _, name = kind.rpartition(".")
        made: Opaque = type(name, (Opaque,), {"__module__": module})()
        return made


class ProcessEnv:
    """An env in a process of its own.

    Args:
        child: the process.
        name: as served.
        limits: those that it has.
    """

    def __init__(self, child: Child, name: str, limits: Limits) -> None:
        self._child = child
        self._name = name
        self._limits = limits
        self._over = False

    @classmethod
    def make(
        cls, children: Children, limits: Limits, name: str, factory: bytes, kwargs: Frame, render_mode: str | None
    ) -> ProcessEnv:
        """A new one.

        Args:
            children: the worker's.
            limits: those that it has.
            name: as served.
            factory: what makes it, as :func:`picklable` gives it.
            kwargs: the client's own arguments.
            render_mode: as a client asked for it.

        Raises:
            EndsSession: its process ended, or there could be none.
            RaisedInside: its constructor raised.
            MeshError: it cannot be made.
        """
        child = children.fork()
        if not child.pid:
            raise EndsSession(child.not_forked(name))
        made = cls(child, name, limits)
        try:
            made._ask("make", "reset", name=name, factory=factory, kwargs=kwargs, render_mode=render_mode)
        except BaseException:
            child.end()
            raise
        return made

    def __repr__(self) -> str:
        return f"<ProcessEnv {self._name} in process {self._child.pid}>"

    # ---------------------------------------------------------------- what Gymnasium's envs have

    @cached_property
    def _spaces(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
        observation, action = self._ask("spaces")["value"]
        return spaces.rebuild(observation), spaces.rebuild(action)

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """As its process describes it."""
        return self._spaces[0]

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """As its process describes it."""
        return self._spaces[1]

    @property
    def unwrapped(self) -> ProcessEnv:
        """Itself: its wrappers are on the other side."""
        return self

    @property
    def np_random(self) -> np.random.Generator:
        """A generator in the state of the env's own; it takes an assignment to change that."""
        state = self._ask("random")["value"]
        kind = getattr(np.random, str(state["bit_generator"]))
        bit_generator = kind()
        bit_generator.state = state
        return np.random.Generator(bit_generator)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """As of the env."""
        frame = self._ask("reset", "reset", kwargs=kwargs)
        return frame["obs"], _info(frame)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As of the env."""
        frame = self._ask("step", action=action)
        return frame["obs"], frame["reward"], frame["terminated"], frame["truncated"], _info(frame)

    def render(self) -> Any:
        """As of the env."""
        return self._ask("render")["value"]

    def close(self) -> None:
        """As of the env; then its process is ended, in any case."""
        if self._over:
            return
        self._over = True
        try:
            if not self._child.ended.is_set():
                self._ask("close", seconds=CLOSE_S)
        except EndsSession as exc:
            if isinstance(exc.error, DeadlineExceeded):
                raise TimeoutError(f"its close took longer than {CLOSE_S:g} s, so its process was killed") from exc
            raise
        finally:
            self._child.end()

    def get_wrapper_attr(self, name: str) -> Any:
        """An attribute, looked for through its wrappers; of a method, what calls it over there."""
        frame = self._ask("get", name=name)
        return partial(self._call, name) if frame.get("callable") else frame["value"]

    def set_wrapper_attr(self, name: str, value: Any) -> None:
        """Set an attribute where it is."""
        self._ask("set", name=name, value=value, outermost=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        elif name == "np_random":
            self._ask("random", state=value.bit_generator.state)
        else:
            self._ask("set", name=name, value=value, outermost=True)

    # ---------------------------------------------------------------- and what they do not

    @cached_property
    def resumable(self) -> bool:
        """Whether it does not say that it cannot be resumed."""
        return bool(self._ask("outlives")["resumable"])

    def outliving(self) -> tuple[Callable[[], bytes], Callable[[bytes], None], bytes | None] | None:
        """What gives, and what takes, what outlives its resets, and whose it is; None where that is not known.

        The key stays on this side: env code is never in a process that has it.
        """
        told = self._ask("outlives")
        if told["value"] is None:
            return None
        return lambda: self._ask("outlives")["value"], self._outlive, told["native"]

    def _outlive(self, state: bytes) -> None:
        self._ask("outlives", state=state)

    def is_wrapped(self, wrapper: str) -> bool:
        """Whether a wrapper of that class, ``module:Class``, is around it."""
        return bool(self._ask("is_wrapped", wrapper=wrapper)["value"])

    def describe(self, *, vectors: Vectors | None, arguments: bool, **fields: Any) -> Description:
        """Its description, as :func:`~meshrl.worker.describe.describe_env` makes it.

        Args:
            vectors: what sessions of many can do.
            arguments: whether those of its factory belong to its fingerprint.
            fields: the others of ``describe_env``.
        """
        told = {**fields, "arguments": arguments, "vectors": (vectors or Vectors()).model_dump()}
        return Description.model_validate(unpack(self._ask("describe", fields=told)["value"]))

    def abandon(self, seconds: float) -> None:
        """Nobody waits for it any more: what it is doing may take so many seconds, then its process is killed."""
        self._child.abandon(seconds)

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", name=name, args=args, kwargs=kwargs)["value"]

    def _ask(
        self, op: str, which: Literal["step", "reset"] = "step", *, seconds: float | None = None, **fields: Any
    ) -> Frame:
        said = _SAID.get(op, op)
        try:
            frame = unpack(self._child.ask(pack({"op": op, **fields}), which, seconds))
        except ChildGone as exc:
            raise EndsSession(self._child.cause(self._name, said)) from exc
        except MalformedMessage as exc:
            raise EndsSession(_strange(self._name, said)) from exc
        if type(frame) is not dict:
            raise EndsSession(_strange(self._name, said))
        if "error" in frame:
            raise from_wire(frame["error"])
        raised = frame.get("raised")
        if raised is None:
            return frame
        if raised.get("memory") and self._limits.max_memory_bytes is not None:
            raise EndsSession(memory_exceeded(self._name, said, self._limits.max_memory_bytes))
        raise RaisedInside(str(raised["type"]), str(raised["message"]), str(raised["traceback"]))


_SAID = {
    "make": "constructor",
    "get": "get_attr",
    "set": "set_attr",
    "spaces": "description",
    "describe": "description",
}


def _strange(name: str, op: str) -> EnvError:
    return EnvError(
        f"{name}: the env's process answered {op} with what is no message; its session is over, open a new one", op=op
    )


def _info(frame: Frame) -> dict[str, Any]:
    info: dict[str, Any] = frame["info"]
    for key, kind in frame.get("opaque", ()):
        info[key] = Opaque.of(str(kind))
    return info


def picklable(name: str, factory: Factory) -> bytes:
    """A factory for other processes, with the registration of the id that it names.

    Raises:
        UsageError: it cannot be handed on.
    """
    source, spec = factory.source, None
    if isinstance(source, str) and is_gymnasium_id(source):
        spec = gymnasium.registry.get(source.rpartition(":")[2])
    for told in ((factory, spec), (factory, None)):
        try:
            return pickle.dumps(told)
        except Exception as exc:  # noqa: BLE001  # lambdas, locks, open files: each has its own
            why: BaseException = exc
        if spec is None:
            break
    raise UsageError(
        f"{name}: what makes it cannot be handed to a process of its own ({type(why).__name__}: {why}); put it into a "
        "module that can be imported, and serve it as module:Class",
        name=name,
    ) from why
