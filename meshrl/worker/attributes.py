"""What a client may reach of an env beyond reset and step: public names, and those the operator allows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import gymnasium

from meshrl.errors import MalformedMessage, NotAllowed
from meshrl.wire.frames import Frame


class Attributes:
    """The rules by which names of an env are reached.

    Args:
        name: the env's, as served.
        allow: public names that clients may call and set; ``"*"`` in it for all. Reading public attributes is free.
    """

    __slots__ = ("_allow", "_name")

    def __init__(self, name: str, allow: Collection[str]) -> None:
        self._name = name
        self._allow = allow

    def call(self, env: Any, body: Frame) -> Any:
        """Call a method of ``env``.

        Raises:
            NotAllowed: it is private, not allowed, not there or no method.
            MalformedMessage: the request is no call.
        """
        method, args, kwargs = self.method(env, body)
        return method(*args, **kwargs)

    def call_or_get(self, env: Any, body: Frame) -> Any:
        """The same, but what is no method is read, as Gymnasium's vector envs do."""
        value = self.get(env, self.public(body))
        return self.call(env, body) if callable(value) else value

    def method(self, env: Any, body: Frame) -> tuple[Any, list[Any] | tuple[Any, ...], dict[str, Any]]:
        """The same, without calling it."""
        name = self.public(body)
        args, kwargs = body.get("args", []), body.get("kwargs", {})
        if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
            raise MalformedMessage("call takes a list of args and a map of kwargs")
        self.check_allowed("call", name)
        method = self.get(env, name)
        if not callable(method):
            raise NotAllowed(f"{self._name}: {name!r} is not a method; read it with get_attr", name=name)
        return method, args, kwargs

    def get(self, env: Any, name: str) -> Any:
        """An attribute, looked for through the wrappers of ``env``."""
        try:
            find = getattr(env, "get_wrapper_attr", None)
            return find(name) if find is not None else getattr(env, name)
        except AttributeError as exc:
            raise NotAllowed(f"{self._name}: the env has no attribute {name!r}", name=name) from exc

    def set(self, env: Any, name: str, value: Any) -> None:
        """Set an attribute where it is; the name has been checked."""
        if hasattr(env, "set_wrapper_attr"):
            env.set_wrapper_attr(name, value)
        else:
            setattr(env, name, value)

    def public(self, body: Frame) -> str:
        """The name that a request asks for."""
        name = body.get("name")
        if not isinstance(name, str) or not name.isidentifier():
            raise MalformedMessage(f"{name!r} is not the name of an attribute")
        if name.startswith("_"):
            raise NotAllowed(
                f"{self._name}: {name!r} is private to the env; only public names can be reached", name=name
            )
        return name

    def check_allowed(self, verb: str, name: str) -> None:
        """Whether the operator lets clients call or set it."""
        if "*" not in self._allow and name not in self._allow:
            allowed = ", ".join(sorted(self._allow)) or "nothing"
            raise NotAllowed(
                f"{self._name}: the worker's operator does not let clients {verb} {name!r} (allowed: {allowed}); "
                f"serve it with allow=({name!r},)",
                name=name,
                allowed=sorted(self._allow),
            )


def is_wrapped(env: Any, wrapper: str) -> bool:
    """Whether a wrapper of that class, ``module:Class``, or of one derived from it, is around ``env``."""
    while True:
        if any(f"{base.__module__}:{base.__qualname__}" == wrapper for base in type(env).__mro__):
            return True
        if not isinstance(env, gymnasium.Wrapper):
            return False
        env = env.env
