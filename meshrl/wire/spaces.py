"""Gymnasium spaces as plain maps of text, numbers and lists, and back.

Rule: ``rebuild(describe(space)) == space``, with the same dtypes, bounds, key order and samples for the same
seed; the description is JSON as well as msgpack, so that any language can read it. The generator's
state does not travel.

Each map has its kind under ``space``; dtypes are the texts of :mod:`meshrl.wire.arrays`, such as ``"<f4"``::

    box             dtype, shape, low, high [, bounded_below, bounded_above]
    discrete        dtype, n, start
    multi_discrete  dtype, shape, nvec, start
    multi_binary    n: 5 or [2, 3]
    text            min_length, max_length, charset (in order)
    dict            spaces: [[key, map], ...] (in order) [, sort_keys: false]
    tuple, one_of   spaces: [map, ...]
    sequence        feature, stack
    graph           node, edge (a map or null)

Numbers of arrays are as :mod:`meshrl.wire.bounds` has them. Other classes, subclasses of the above included,
need :func:`register`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from meshrl.errors import MalformedMessage, UnencodableValue, UnsupportedSpace
from meshrl.wire.arrays import dtype_of, text_of
from meshrl.wire.bounds import array_of, item_of, numbers_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

Description = dict[str, Any]

MAX_SPACE_BYTES = 512 * 1024 * 1024
"""What the arrays of a rebuilt space may take, all together: four times the bounds of an 8-bit 4K image."""

MAX_SPACE_DEPTH = 32

_NODE_BYTES = 1024  # what a space takes beside its arrays, about


@dataclass(frozen=True)
class _Converter:
    kind: str
    cls: type[spaces.Space[Any]]
    describe: Callable[[Any], Description]
    rebuild: Callable[[Description, _Budget], spaces.Space[Any]]


class _Budget:
    """What is left of the memory that one description may ask for; spent before anything is allocated."""

    def __init__(self) -> None:
        self._left_bytes = MAX_SPACE_BYTES
        self._depth = 0
        self._copies = 1

    def charge(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes * self._copies
        if self._left_bytes < 0:
            raise MalformedMessage(f"a space of more than {MAX_SPACE_BYTES >> 20} MiB")

    def part(self, description: object, copies: int = 1) -> spaces.Space[Any]:
        """Rebuild a part; ``copies`` is how many of it the whole will hold (Gymnasium batches some)."""
        self._depth += 1
        self._copies *= copies
        try:
            if self._depth > MAX_SPACE_DEPTH:
                raise MalformedMessage(f"a space of more than {MAX_SPACE_DEPTH} levels")
            return _rebuild(description, self)
        finally:
            self._depth -= 1
            self._copies //= copies


def describe(space: spaces.Space[Any]) -> Description:
    """The space as a map of plain values.

    Raises:
        UnsupportedSpace: its class, or that of a part, has no converter; the message has the line to write.
    """
    converter = _BY_CLASS.get(type(space))
    if converter is None:
        cls = type(space)
        raise UnsupportedSpace(
            f"{cls.__module__}.{cls.__qualname__} has no converter; on both sides say: "
            f'meshrl.wire.spaces.register("{cls.__qualname__}", {cls.__qualname__}, '
            f"lambda space: {{...}}, lambda description: {cls.__qualname__}(...))",
            space=f"{cls.__module__}.{cls.__qualname__}",
        )
    try:
        return {"space": converter.kind, **converter.describe(space)}
    except UnencodableValue as exc:  # a dtype such as longdouble
        raise UnsupportedSpace(f"{space}: {exc.message}", space=converter.kind) from exc


def rebuild(description: object) -> spaces.Space[Any]:
    """The space that a description tells of.

    Args:
        description: what :func:`describe` gave, from a peer.

    Raises:
        MalformedMessage: it is not one, it asks for more than ``MAX_SPACE_BYTES`` or ``MAX_SPACE_DEPTH``, or
            no converter is registered for its kind.
    """
    try:
        return _rebuild(description, _Budget())
    except MalformedMessage:
        raise
    except Exception as exc:  # constructors assert, and raise ValueError, TypeError, OverflowError, KeyError
        raise MalformedMessage(f"not the description of a space: {str(exc)[:200] or type(exc).__name__}") from exc


def _rebuild(description: object, budget: _Budget) -> spaces.Space[Any]:
    if not isinstance(description, dict):
        raise MalformedMessage(f"a space that is not a map but {type(description).__name__}")
    kind = description.get("space")
    if not isinstance(kind, str):
        raise MalformedMessage("a space without its kind")
    converter = _BY_KIND.get(kind)
    if converter is None:
        raise MalformedMessage(
            f"no converter for spaces of kind {kind[:40]!r}; say here what the peer said: "
            f"meshrl.wire.spaces.register({kind[:40]!r}, ...)"
        )
    budget.charge(_NODE_BYTES)
    return converter.rebuild(description, budget)


def register(
    kind: str,
    cls: type[spaces.Space[Any]],
    describe: Callable[[Any], Description],
    rebuild: Callable[[Description], spaces.Space[Any]],
) -> None:
    """Teach this process a class of spaces; a peer that should rebuild them must say the same.

    Registering a kind again, for a class of the same name, replaces its converter.

    Args:
        kind: its name on the wire.
        cls: the class; instances of its subclasses are not meant.
        describe: gives a map of plain values (None, bool, int, float, text, lists, maps), without the key
            ``space``; for parts that are spaces call :func:`describe`.
        rebuild: makes the space from that map. What it raises becomes a MalformedMessage.

    Raises:
        ValueError: the kind is Gymnasium's own or another class's.
    """
    if not kind:
        raise ValueError("a kind of space needs a name")
    known = _BY_KIND.get(kind)
    if known is not None and known.cls.__qualname__ != cls.__qualname__:
        raise ValueError(f"the kind {kind!r} is that of {known.cls.__module__}.{known.cls.__qualname__}")
    if known is not None and known.cls is not cls:
        _BY_CLASS.pop(known.cls, None)
    _add(_Converter(kind, cls, describe, lambda description, _: rebuild(description)))


def _add(converter: _Converter) -> None:
    _BY_KIND[converter.kind] = converter
    _BY_CLASS[converter.cls] = converter


# ---------------------------------------------------------------------- kinds


def _field(description: Description, name: str, kind: type) -> Any:
    value = description.get(name)
    if type(value) is not kind:
        raise MalformedMessage(f"a space of kind {description['space']} whose {name} is {type(value).__name__}")
    return value


def _describe_box(space: spaces.Box) -> Description:
    made = {
        "dtype": text_of(space.dtype),
        "shape": list(space.shape),
        "low": numbers_of(space.low),
        "high": numbers_of(space.high),
    }
    # An integer Box made with infinities holds its dtype's limits and remembers here that they are no bounds.
    for name, derived in (("bounded_below", space.low > -np.inf), ("bounded_above", space.high < np.inf)):
        flags = getattr(space, name)
        if not np.array_equal(flags, derived):
            made[name] = numbers_of(flags)
    return made


def _rebuild_box(description: Description, budget: _Budget) -> spaces.Box:
    dtype, shape = dtype_of(description.get("dtype")), shape_of(description.get("shape"))
    if dtype.kind not in "iufb":
        raise MalformedMessage(f"a box of type {dtype}")
    # twice while the constructor copies; two arrays of bounds, two of flags
    budget.charge(math.prod(shape) * 2 * (2 * dtype.itemsize + 2))
    low = array_of(description.get("low"), shape, dtype)
    high = array_of(description.get("high"), shape, dtype)
    taken = np.dtype(np.int8) if dtype.kind == "b" else dtype  # the constructor has no infinities for bool
    space = spaces.Box(low.astype(taken), high.astype(taken), shape, dtype)
    bool_ = np.dtype(np.bool_)
    below, above = description.get("bounded_below"), description.get("bounded_above")
    # said even where derived: for shape () the constructor gives a scalar or an array by how it was called
    space.bounded_below = np.asarray(low > -np.inf) if below is None else array_of(below, shape, bool_)
    space.bounded_above = np.asarray(high < np.inf) if above is None else array_of(above, shape, bool_)
    return space


def _describe_discrete(space: spaces.Discrete[Any]) -> Description:
    return {"dtype": text_of(np.dtype(space.dtype)), "n": int(space.n), "start": int(space.start)}


def _integers(description: Description) -> np.dtype[Any]:
    dtype = dtype_of(description.get("dtype"))
    if dtype.kind not in "iu":
        raise MalformedMessage(f"a space of integers, but of type {dtype}")
    return dtype


def _rebuild_discrete(description: Description, _: _Budget) -> spaces.Discrete[Any]:
    dtype = _integers(description)
    n, start = (item_of(description.get(name), dtype) for name in ("n", "start"))
    return spaces.Discrete(n, start=start, dtype=dtype)


def _describe_multi_discrete(space: spaces.MultiDiscrete[Any]) -> Description:
    return {
        "dtype": text_of(space.dtype),
        "shape": list(space.nvec.shape),
        "nvec": numbers_of(space.nvec),
        "start": numbers_of(space.start),
    }


def _rebuild_multi_discrete(description: Description, budget: _Budget) -> spaces.MultiDiscrete[Any]:
    dtype, shape = _integers(description), shape_of(description.get("shape"))
    budget.charge(math.prod(shape) * 4 * dtype.itemsize)
    nvec, start = (array_of(description.get(name), shape, dtype) for name in ("nvec", "start"))
    return spaces.MultiDiscrete(nvec, dtype=dtype, start=start)


def _describe_multi_binary(space: spaces.MultiBinary) -> Description:
    return {"n": space.n if isinstance(space.n, int) else list(space.n)}


def _rebuild_multi_binary(description: Description, budget: _Budget) -> spaces.MultiBinary:
    n = description.get("n")
    budget.charge(math.prod(shape_of(n if isinstance(n, list) else [n])))
    return spaces.MultiBinary(n if isinstance(n, int) else tuple(shape_of(n)))


def _describe_text(space: spaces.Text) -> Description:
    if any(len(character) != 1 for character in space.character_list):
        raise UnsupportedSpace(f"{space}: the charset has texts longer than one character", space="text")
    return {
        "min_length": space.min_length,
        "max_length": space.max_length,
        "charset": "".join(space.character_list),  # not character_set: the order decides what a seed samples
    }


def _rebuild_text(description: Description, _: _Budget) -> spaces.Text:
    low, high = _field(description, "min_length", int), _field(description, "max_length", int)
    if high >= 1 << 63:
        raise MalformedMessage("a text without end")
    return spaces.Text(high, min_length=low, charset=_field(description, "charset", str))


def _describe_dict(space: spaces.Dict) -> Description:
    for key in space.spaces:
        if type(key) not in (str, int):
            raise UnsupportedSpace(f"a Dict space with a key of type {type(key).__name__}", space="dict")
    made: Description = {"spaces": [[key, describe(part)] for key, part in space.spaces.items()]}
    if not getattr(space, "sort_keys", True):  # Gymnasium 1.3 and later
        made["sort_keys"] = False
    return made


def _rebuild_dict(description: Description, budget: _Budget) -> spaces.Dict:
    parts: dict[Any, spaces.Space[Any]] = {}
    for pair in _field(description, "spaces", list):
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (str, int) or pair[0] in parts:
            raise MalformedMessage("a dict of spaces whose entries are not pairs, or twice the same")
        parts[pair[0]] = budget.part(pair[1])
    space = spaces.Dict(list(parts.items()))  # a list, because mappings are sorted
    if description.get("sort_keys") is False and hasattr(space, "sort_keys"):
        space.sort_keys = False
    return space


def _describe_parts(space: spaces.Tuple[Any] | spaces.OneOf[Any]) -> Description:
    return {"spaces": [describe(part) for part in space.spaces]}


def _rebuild_tuple(description: Description, budget: _Budget) -> spaces.Tuple[Any]:
    return spaces.Tuple([budget.part(part) for part in _field(description, "spaces", list)])


def _rebuild_one_of(description: Description, budget: _Budget) -> spaces.OneOf[Any]:
    return spaces.OneOf([budget.part(part) for part in _field(description, "spaces", list)])


def _describe_sequence(space: spaces.Sequence) -> Description:
    return {"feature": describe(space.feature_space), "stack": bool(space.stack)}


def _rebuild_sequence(description: Description, budget: _Budget) -> spaces.Sequence:
    stack = _field(description, "stack", bool)
    feature = budget.part(description.get("feature"), copies=2 if stack else 1)
    return spaces.Sequence(feature, stack=stack)


def _describe_graph(space: spaces.Graph) -> Description:
    return {
        "node": describe(space.node_space),
        "edge": None if space.edge_space is None else describe(space.edge_space),
    }


def _rebuild_graph(description: Description, budget: _Budget) -> spaces.Graph:
    node, edge = budget.part(description.get("node"), copies=2), description.get("edge")
    # parts outside Box and Discrete are Gymnasium's to refuse: 1.2 does, 1.4 does not
    edge_space: Any = None if edge is None else budget.part(edge, copies=2)
    made: Callable[..., spaces.Graph] = spaces.Graph
    return made(node, edge_space)


_BY_KIND: dict[str, _Converter] = {}
_BY_CLASS: dict[type, _Converter] = {}

for _converter in (
    _Converter("box", spaces.Box, _describe_box, _rebuild_box),
    _Converter("discrete", spaces.Discrete, _describe_discrete, _rebuild_discrete),
    _Converter("multi_discrete", spaces.MultiDiscrete, _describe_multi_discrete, _rebuild_multi_discrete),
    _Converter("multi_binary", spaces.MultiBinary, _describe_multi_binary, _rebuild_multi_binary),
    _Converter("text", spaces.Text, _describe_text, _rebuild_text),
    _Converter("dict", spaces.Dict, _describe_dict, _rebuild_dict),
    _Converter("tuple", spaces.Tuple, _describe_parts, _rebuild_tuple),
    _Converter("one_of", spaces.OneOf, _describe_parts, _rebuild_one_of),
    _Converter("sequence", spaces.Sequence, _describe_sequence, _rebuild_sequence),
    _Converter("graph", spaces.Graph, _describe_graph, _rebuild_graph),
):
    _add(_converter)
