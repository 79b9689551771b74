"""Values as JSON has them, for the options ``--json``."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Arrays as lists; what JSON has no form for (NaN, bytes, others) in Python's words."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else repr(value)
