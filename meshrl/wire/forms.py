"""Forms: the maps that stand for values which msgpack does not know, and what they are on arrival.

No bytes whatever do more here than become a value or a :class:`~meshrl.errors.MalformedMessage`;
:mod:`meshrl.wire.codec` has the table of the forms, and writes them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gymnasium.spaces import GraphInstance

from meshrl.errors import MalformedMessage
from meshrl.wire.arrays import from_map

if TYPE_CHECKING:
    from collections.abc import Callable

# A map with one of these keys is a form.
RESERVED: frozenset[str | bytes] = frozenset({"nd", "py", "complex", b"nd", b"complex"})

_INT = re.compile(r"-?0x[0-9a-f]+", re.ASCII)
_MAX_COMPLEX_TEXT = 64


def revive(form: dict[Any, Any]) -> Any:
    """A map as it arrived, or the value it is a form of: called by the unpacker for each, innermost first."""
    if "nd" in form:  # what most of them are
        return from_map(form, "str")
    if RESERVED.isdisjoint(form):
        return form
    if b"nd" in form:
        return from_map(form, "bytes")
    if "py" in form:
        made_by = REVIVE.get(form["py"])
        if made_by is None or len(form) != 2 or "v" not in form:
            raise MalformedMessage(f"a value of the unknown kind {str(form['py'])[:40]!r}")
        return made_by(form["v"])
    return _complex_from_text(form)


def _items(value: Any) -> list[Any]:
    if type(value) is not list:
        raise MalformedMessage(f"a value of several items, but they are {type(value).__name__}")
    return value


def _complex_from_text(form: dict[Any, Any]) -> complex:
    flag, text = (form.get("complex"), form.get("data"))
    if b"complex" in form:
        flag, text = form[b"complex"], form.get(b"data")
    if flag is not True or type(text) is not str or len(text) > _MAX_COMPLEX_TEXT or len(form) != 2:
        raise MalformedMessage("a complex number without its text")
    return complex(text)


def _int(value: Any) -> int:
    if type(value) is not str or not _INT.fullmatch(value):
        raise MalformedMessage("a long int that is not hexadecimal")
    return int(value, 16)


def _complex(value: Any) -> complex:
    items = _items(value)
    if [type(part) for part in items] != [float, float]:
        raise MalformedMessage("a complex number that is not two floats")
    return complex(*items)


def _graph(value: Any) -> GraphInstance:
    items = _items(value)
    if len(items) != 3:
        raise MalformedMessage("a graph that is not nodes, edges and links")
    return GraphInstance(*items)


def _map(value: Any) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in _items(value):
        if type(pair) is not list or len(pair) != 2:
            raise MalformedMessage("a map whose entries are not pairs")
        made[pair[0]] = pair[1]
    if len(made) != len(value):
        raise MalformedMessage("a map with a key twice")
    return made


def _set(value: Any) -> set[Any]:
    made = set(_items(value))
    if len(made) != len(value):
        raise MalformedMessage("a set with an item twice")
    return made


def _bytearray(value: Any) -> bytearray:
    if type(value) is not bytes:
        raise MalformedMessage("a bytearray that is not bytes")
    return bytearray(value)


def _str(value: Any) -> str:
    if type(value) is not bytes:
        raise MalformedMessage("a text with surrogates that is not bytes")
    return value.decode("utf-8", "surrogatepass")


REVIVE: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda value: tuple(_items(value)),
    "set": _set,
    "frozenset": lambda value: frozenset(_set(value)),
    "map": _map,
    "int": _int,
    "complex": _complex,
    "graph": _graph,
    "bytearray": _bytearray,
    "str": _str,
}
