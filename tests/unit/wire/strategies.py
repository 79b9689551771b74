"""Hypothesis strategies of the wire's values: random nested spaces, arrays of every dtype, exact values."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from gymnasium import spaces
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

FLOAT_DTYPES = ("<f2", "<f4", "<f8", ">f4", ">f8")
INTEGER_DTYPES = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", ">i4")
OTHER_DTYPES = ("|b1", "<c8", "<c16", "|S3", "<U4", ">U2", "<M8[ns]", "<M8[D]", "<M8[25s]", "<m8[us]", "<m8")
DTYPES = (*FLOAT_DTYPES, *INTEGER_DTYPES, *OTHER_DTYPES)

shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def same(a: Any, b: Any) -> bool:
    """Whether two values are of the same types, bit by bit and all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, (np.str_, np.bytes_)):
        return bool(a == b)
    if isinstance(a, np.generic):
        return bool(a.dtype == b.dtype and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return a == b and sorted(type(x).__name__ for x in a) == sorted(type(x).__name__ for x in b)
    return bool(a == b)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of every dtype that travels: 0-d, empty, of any bits, strided, transposed."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(shapes)
    size = math.prod(shape)
    if dtype.kind == "b":
        made = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool).reshape(shape)
    elif dtype.kind == "U":
        texts = st.lists(st.text(max_size=4), min_size=size, max_size=size)
        made = np.array(draw(texts), dtype).reshape(shape)
    else:
        data = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
        made = np.ndarray(shape, dtype, data).copy()
    turn = draw(st.sampled_from(("as it is", "transposed", "reversed", "readonly")))
    if turn == "transposed":
        return made.T
    if turn == "reversed" and made.ndim:
        return made[::-1]
    if turn == "readonly":
        made.flags.writeable = False
    return made


@st.composite
def scalars(draw: st.DrawFn) -> np.generic:
    """Numpy scalars of every type that travels, of any bits."""
    kind = draw(st.sampled_from(("item", "str", "bytes")))
    if kind == "str":
        return np.str_(draw(st.text()))
    if kind == "bytes":
        return np.bytes_(draw(st.binary()))
    dtype = np.dtype(draw(st.sampled_from([d for d in DTYPES if d[1] not in "SU" and d[0] != ">"])))
    if dtype.kind == "b":
        return np.bool_(draw(st.booleans()))
    item: np.generic = np.frombuffer(draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)), dtype)[0]
    return item


surrogates = st.text(st.characters(codec=None), max_size=6)
floats = st.integers(0, (1 << 64) - 1).map(lambda bits: float(struct.unpack("<d", bits.to_bytes(8, "little"))[0]))
atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 80), 1 << 80),
    floats,
    st.text(max_size=8),
    surrogates,
    st.sampled_from(("nd", "py", "complex", "v", "type", "data")),
    st.binary(max_size=8),
    st.builds(complex, floats, floats),
)
hashables = st.recursive(
    st.one_of(st.none(), st.integers(-(1 << 70), 1 << 70), st.text(max_size=4), st.binary(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
values = st.recursive(
    st.one_of(atoms, arrays(), scalars(), st.binary(max_size=4).map(bytearray)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(
            st.one_of(st.text(max_size=4), st.sampled_from(("nd", "py", "complex", "v"))), inner, max_size=4
        ),
        st.dictionaries(hashables, inner, max_size=3),
        st.sets(hashables, max_size=3),
        st.frozensets(hashables, max_size=3),
        st.builds(spaces.GraphInstance, inner, inner, inner),
    ),
    max_leaves=12,
)
"""Everything that the codec keeps exactly, nested at random."""


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    """Boxes of every dtype, with shared or own bounds, some infinite."""
    dtype: np.dtype[Any] = np.dtype(draw(st.sampled_from(("|b1", *FLOAT_DTYPES, *INTEGER_DTYPES))))
    shape = draw(shapes)
    if dtype.kind == "b":
        return spaces.Box(0, 1, shape, dtype.type)
    if dtype.kind == "f":
        bound = st.floats(-1000, 1000, width=16).map(lambda x: x + 0.0)  # numpy cannot sample from 0.0 to -0.0
        lowest: float = -math.inf
        highest: float = math.inf
    else:
        limits = np.iinfo(dtype)
        # Gymnasium samples integers through int64: its highest bound is 2**63 - 2
        bound = st.integers(max(int(limits.min), -(1 << 63)), min(int(limits.max), (1 << 63) - 2))
        lowest, highest = (-math.inf, math.inf) if dtype.kind == "i" else (0, int(min(limits.max, (1 << 63) - 2)))
    if draw(st.booleans()):
        low, high = sorted((draw(bound), draw(bound)))
        one_low = draw(st.sampled_from((low, lowest)))
        return spaces.Box(one_low, draw(st.sampled_from((high, highest))), shape, dtype)
    size = math.prod(shape)
    pairs = [sorted((draw(bound), draw(bound))) for _ in range(size)]
    lows = [draw(st.sampled_from((low, -math.inf))) if dtype.kind == "f" else low for low, _ in pairs]
    return spaces.Box(
        np.array(lows, dtype).reshape(shape),
        np.array([high for _, high in pairs], dtype).reshape(shape),
        shape,
        dtype,
    )


@st.composite
def discretes(draw: st.DrawFn) -> spaces.Discrete[Any]:
    """Discrete spaces of every integer dtype."""
    dtype = np.dtype(draw(st.sampled_from(INTEGER_DTYPES)))
    start = draw(st.integers(0 if dtype.kind == "u" else -50, 50))
    return spaces.Discrete(draw(st.integers(1, 60)), start=start, dtype=dtype)


@st.composite
def multi_discretes(draw: st.DrawFn) -> spaces.MultiDiscrete[Any]:
    """MultiDiscrete spaces of one or more axes."""
    dtype: np.dtype[Any] = np.dtype(draw(st.sampled_from(("|u1", "<i4", "<i8"))))
    shape = draw(npst.array_shapes(min_dims=1, max_dims=2, max_side=3))
    nvec = draw(npst.arrays(dtype, shape, elements=st.integers(1, 9)))
    return spaces.MultiDiscrete(nvec, dtype, start=draw(npst.arrays(dtype, shape, elements=st.integers(0, 9))))


@st.composite
def texts(draw: st.DrawFn) -> spaces.Text:
    """Text spaces of any charset, in any order."""
    low = draw(st.integers(0, 3))
    # Without NUL: numpy's strings lose it at their end, and a space of it samples texts that it does not hold.
    letters = draw(st.lists(st.characters(exclude_characters="\0"), min_size=1, max_size=5, unique=True))
    return spaces.Text(low + draw(st.integers(0, 4)), min_length=low, charset="".join(letters))


plain_spaces = st.one_of(
    boxes(),
    discretes(),
    multi_discretes(),
    texts(),
    st.integers(1, 6).map(spaces.MultiBinary),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(spaces.MultiBinary),
)
_small = st.one_of(
    st.builds(
        spaces.Box,
        st.just(-1),
        st.floats(0, 5, width=16),
        st.just((2,)),
        st.sampled_from((np.float32, np.float64)),
    ),
    st.integers(1, 6).map(spaces.Discrete),
)
graphs = st.builds(spaces.Graph, _small, st.one_of(st.none(), _small))
all_spaces = st.recursive(
    st.one_of(plain_spaces, graphs),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(spaces.Tuple),
        st.lists(inner, min_size=1, max_size=3).map(spaces.OneOf),
        st.lists(st.tuples(st.text(max_size=4), inner), max_size=3, unique_by=lambda pair: pair[0]).map(spaces.Dict),
        st.builds(spaces.Sequence, inner),
        st.builds(spaces.Sequence, _small, stack=st.just(True)),
    ),
    max_leaves=5,
)
"""Every space of Gymnasium, nested at random."""
