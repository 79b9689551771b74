"""What runs in the process of an env: it answers what the worker asks of that one env, until nobody asks any more.

Requests are maps with an ``op``; whatever the env does, the answer is a map:

    {"value": ...}                                               of any op but these two
    {"obs", "info"}, {"obs", "reward", "terminated", "truncated", "info"}    of reset and step
    {"error": {...}}                                             a refusal, as on the wire
    {"raised": {"type", "message", "traceback", "memory"}}       the env's code raised

Answers are written by this package's own codec, so the worker never unpickles what an env has touched. What is pickled
comes from the worker alone: the factory, as its operator wrote it.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np

from meshrl.errors import MeshError, UnencodableValue, UsageError
from meshrl.wire import spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame
from meshrl.wire.messages import Vectors
from meshrl.worker.attributes import Attributes, is_wrapped
from meshrl.worker.channel import Channel
from meshrl.worker.describe import describe_env
from meshrl.worker.factories import Factory
from meshrl.worker.origins import resumable, unsealed

MAX_MESSAGE_CHARS = 2000
MAX_TRACEBACK_CHARS = 20_000


class Inside:
    """One env, in this process.

    Args:
        name: as served.
    """

    def __init__(self) -> None:
        self._name = ""
        self._env: Any = None
        self._factory: Factory | None = None
        self._attributes = Attributes("", ("*",))  # who may ask for what was decided by the worker
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ops: dict[str, Callable[[Frame], Frame]] = {
            "make": self._make,
            "spaces": self._spaces,
            "describe": self._describe,
            "reset": self._reset,
            "step": self._step,
            "render": lambda _: {"value": self._done(self._env.render())},
            "call": self._call,
            "get": self._get,
            "set": self._set,
            "is_wrapped": lambda body: {"value": is_wrapped(self._env, body["wrapper"])},
            "random": self._random,
            "outlives": self._outlives,
            "close": self._close,
        }

    def answer(self, data: bytes | bytearray) -> bytes:
        """The answer to one request; whatever the env's code raises is one too."""
        try:
            body = unpack(data)
            return _packed(body["op"], self._ops[body["op"]](body))
        except MeshError as exc:
            return pack({"error": exc.to_wire()})
        except BaseException as exc:  # noqa: BLE001  # its session ends with it, and the worker is told why
            return pack({"raised": _told(exc)})

    # ---------------------------------------------------------------- ops

    def _make(self, body: Frame) -> Frame:
        self._name = body["name"]
        self._attributes = Attributes(self._name, ("*",))
        try:
            self._factory, spec = pickle.loads(body["factory"])  # noqa: S301  # the worker's own
        except Exception as exc:
            raise UsageError(
                f"{self._name}: what makes it cannot be had in a process of its own ({type(exc).__name__}: {exc}); "
                "put it into a module that can be imported, and serve it as module:Class"
            ) from exc
        if spec is not None:  # registered in the worker's process, and maybe nowhere else
            gymnasium.registry.setdefault(spec.id, spec)
        self._env = self._factory.make(body["kwargs"], body["render_mode"])
        return {"value": None}

    def _spaces(self, _body: Frame) -> Frame:
        return {"value": [spaces.describe(self._env.observation_space), spaces.describe(self._env.action_space)]}

    def _describe(self, body: Frame) -> Frame:
        assert self._factory is not None, "it was made"
        told = dict(body["fields"])
        arguments = self._factory.kwargs if told.pop("arguments") else None
        vectors = Vectors.model_validate(told.pop("vectors"))
        return {"value": describe_env(self._env, arguments=arguments, vectors=vectors, **told).packed()}

    def _reset(self, body: Frame) -> Frame:
        obs, info = self._done(self._env.reset(**body["kwargs"]))
        return {"obs": obs, "info": info}

    def _step(self, body: Frame) -> Frame:
        obs, reward, terminated, truncated, info = self._done(self._env.step(body["action"]))
        return {"obs": obs, "reward": reward, "terminated": terminated, "truncated": truncated, "info": info}

    def _call(self, body: Frame) -> Frame:
        method = self._attributes.get(self._env, body["name"])
        return {"value": self._done(method(*body["args"], **body["kwargs"]))}

    def _get(self, body: Frame) -> Frame:
        value = self._attributes.get(self._env, body["name"])
        return {"value": None, "callable": True} if callable(value) else {"value": value}

    def _set(self, body: Frame) -> Frame:
        put = setattr if body["outermost"] else self._attributes.set
        put(self._env, body["name"], body["value"])
        return {"value": None}

    def _random(self, body: Frame) -> Frame:
        bit_generator = self._env.unwrapped.np_random.bit_generator
        if "state" in body:
            bit_generator.state = body["state"]
        return {"value": bit_generator.state}

    def _outlives(self, body: Frame) -> Frame:
        """What outlives its resets: whether that is known, what it is now, or what it is to be."""
        kept = unsealed(self._env)
        if kept is None:
            return {"value": None, "resumable": resumable(self._env)}
        if "state" in body:
            kept.put(body["state"])
        return {"value": kept.get(), "native": kept.native, "resumable": True}

    def _close(self, _body: Frame) -> Frame:
        if self._env is not None:
            self._done(self._env.close())
        return {"value": None}

    def _done(self, value: Any) -> Any:
        """What a call gave; if that can be awaited, what comes of it."""
        if not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(_awaited(value))


async def _awaited(value: Any) -> Any:
    return await value


def serve(channel: Channel) -> None:
    """Answer until the worker is gone."""
    np.random.seed()  # noqa: NPY002  # the process it was forked from has given the same state to every other
    inside = Inside()
    while True:
        try:
            data = channel.receive()
        except (EOFError, OSError):
            return
        channel.send(inside.answer(data))


def _packed(op: str, frame: Frame) -> bytes:
    try:
        return pack(frame)
    except UnencodableValue:
        info = frame.get("info")
        if op not in {"reset", "step"} or not isinstance(info, dict):
            raise
        # The step has run, and the worker says of an info what it says of that of any env: see Opaque.
        kept = {key: value for key, value in info.items() if _travels(key, value)}
        return pack({**frame, "info": kept, "opaque": [[str(key), _name(info[key])] for key in info.keys() - kept]})


def _travels(key: Any, value: Any) -> bool:
    try:
        pack({key: value})
    except UnencodableValue:
        return False
    return True


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _told(exc: BaseException) -> Mapping[str, Any]:
    try:
        text = str(exc)
    except Exception:  # noqa: BLE001  # an exception may have any __str__
        text = ""
    return {
        "type": type(exc).__name__,
        "message": _clean(text[:MAX_MESSAGE_CHARS]),
        "traceback": _clean("".join(traceback.format_exception(exc))[-MAX_TRACEBACK_CHARS:]),
        "memory": isinstance(exc, MemoryError),
    }


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
