"""How infos stand in a Parquet file: a struct of the keys of all of them, null where a key is missing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from meshrl.adapters.datasets.infos import MISSING, InfoColumn
from meshrl.adapters.datasets.parquet_forms import Form, child, listed


class InfoForm(Form):
    """How what a key of infos holds stands in a column; null where it is missing."""

    def __init__(self, column: InfoColumn) -> None:
        self._column = column
        self._parts = {key: InfoForm(part) for key, part in column.parts.items()}
        self._fields = [form.field(key) for key, form in self._parts.items()]
        if column.kind == "dict":  # one without keys is there, or is not
            self.type = pa.struct(self._fields) if self._parts else pa.bool_()
        elif column.dtype is None:
            self.type = pa.string()
        else:
            value = pa.from_numpy_dtype(column.dtype)
            self.type = pa.list_(value) if column.shape else value
            self.metadata = {"shape": json.dumps(list(column.shape)), "dtype": column.dtype.str}

    def encode(self, values: Any, n: int) -> pa.Array:
        """``n`` values, :data:`~meshrl.adapters.datasets.infos.MISSING` where there is none, as a column."""
        missing = np.array([value is MISSING for value in values], np.bool_)
        mask = pa.array(missing)
        column = self._column
        if column.kind == "dict":
            if not self._parts:
                return pa.array([True] * n, pa.bool_(), mask=missing)
            infos = [{} if value is MISSING else value for value in values]
            parts = [form.encode([info.get(key, MISSING) for info in infos], n) for key, form in self._parts.items()]
            return pa.StructArray.from_arrays(parts, fields=self._fields, mask=mask)
        made = column.column(values)
        if column.dtype is None:
            return pa.array(made, pa.string(), mask=missing)
        if not column.shape:
            return pa.array(made, mask=missing)
        rows = made[~missing]
        lengths = np.where(missing, 0, int(np.prod(column.shape)))
        return listed(pa.array(rows.reshape(-1)), lengths.tolist(), self.type, missing.tolist())

    def decode(self, array: pa.Array) -> list[Any]:
        """Its values, :data:`~meshrl.adapters.datasets.infos.MISSING` where there is none."""
        there = array.is_valid().to_numpy(zero_copy_only=False)
        own = array.filter(pa.array(there))
        n, column = len(own), self._column
        if column.kind == "dict":
            parts = {key: form.decode(child(own, i)) for i, (key, form) in enumerate(self._parts.items())}
            values: list[Any] = [
                {key: part[row] for key, part in parts.items() if part[row] is not MISSING} for row in range(n)
            ]
        elif column.dtype is None:
            values = column.values(own.to_pylist(), n)
        else:
            flat = own.flatten() if column.shape else own
            values = column.values(np.array(flat.to_numpy(zero_copy_only=False), column.dtype), n)
        given = iter(values)
        return [next(given) if valid else MISSING for valid in there.tolist()]
