"""Factories: from what an operator wrote to an env or a policy.

    text                    means
    "CartPole-v1"           gymnasium.make("CartPole-v1", ...)
    "package:Name-v1"       imports package, then gymnasium.make("Name-v1", ...)
    "package.module:Class"  imports and calls it
    a callable              calls it

Texts come from the operator, or on the embedded mesh from the same user's own process; never from a stranger.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from meshrl.errors import InvalidName, UsageError
from meshrl.protocol.names import resolve

_GYMNASIUM_ID = re.compile(r"^(?:(?P<module>[\w.]+):)?(?:[\w-]+/)?[\w:.-]*-v\d+$")

EnvSource = str | Callable[..., Any]


@dataclass(frozen=True)
class Factory:
    """How to make one served env.

    Attributes:
        source: a Gymnasium id, ``module:Class`` or a callable that gives an env.
        kwargs: the operator's own arguments for it; a client's allowed ones are laid over them.
    """

    source: EnvSource
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def make(self, kwargs: Mapping[str, Any], render_mode: str | None) -> Any:
        """A new env.

        Raises:
            UsageError: the source takes no ``render_mode``, and its env does not have this one anyway.
            Exception: whatever the source's own code raises.
        """
        merged = {**self.kwargs, **kwargs}
        if isinstance(self.source, str) and is_gymnasium_id(self.source):
            if render_mode is not None:  # Gymnasium hands None on as well, to constructors that may take none
                merged["render_mode"] = render_mode
            return gymnasium.make(self.source, **merged)
        made = load(self.source) if isinstance(self.source, str) else self.source
        if render_mode is None:
            return made(**merged)
        if _takes(made, "render_mode"):
            return made(**{**merged, "render_mode": render_mode})
        env = made(**merged)
        own = getattr(env, "render_mode", None)
        if own != render_mode:
            env.close()
            modes = (getattr(env, "metadata", None) or {}).get("render_modes") or []
            raise UsageError(
                f"render_mode={render_mode!r} cannot be had: the factory takes no render_mode, its envs have {own!r} "
                f"(modes they know: {', '.join(map(str, modes)) or 'none'}); let the factory take render_mode, or ask "
                "for none",
                render_mode=render_mode,
                own=own,
                modes=[str(mode) for mode in modes],
            )
        return env


def is_gymnasium_id(text: str) -> bool:
    """Whether ``text`` has the form of a Gymnasium id, ``module:`` before it or not."""
    return _GYMNASIUM_ID.match(text) is not None


def load(text: str) -> Any:
    """The object that ``module:name`` names.

    Raises:
        InvalidName: the text has another form, or there is no such module or name.
    """
    module_name, colon, attribute = text.partition(":")
    if not module_name or not colon or not attribute:
        raise InvalidName(f"{text!r} is neither a Gymnasium id (Name-v1, module:Name-v1) nor module:Class")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as exc:
        raise InvalidName(f"{text!r}: cannot import {module_name}: {exc}") from exc
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as exc:
            raise InvalidName(f"{text!r}: {module_name} has no {attribute}") from exc
    return found


def as_factory(source: EnvSource | Factory) -> Factory:
    """``source`` as a factory.

    Raises:
        InvalidName: it is a text of no known form, or not callable.
    """
    if isinstance(source, Factory):
        return source
    if isinstance(source, str):
        if not is_gymnasium_id(source) and not callable(load(source)):
            raise InvalidName(f"{source!r} names something that cannot be called")
    elif not callable(source):
        raise InvalidName(f"an env is served by its Gymnasium id, module:Class or a callable, not {source!r}")
    return Factory(source)


def registered(name: str, *, import_modules: bool) -> str | None:
    """The Gymnasium id that ``name`` means for a worker that serves on demand, or None.

    Args:
        name: as a client asked for it.
        import_modules: import the module of ``module:Name-v1``; never done for strangers.
    """
    module, colon, rest = name.partition(":")
    if not colon:
        return resolve(name, list(gymnasium.registry))
    if not import_modules or not is_gymnasium_id(name):
        return None
    try:
        importlib.import_module(module)
    except ImportError:
        return None
    return name if rest in gymnasium.registry else None


def _takes(made: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
