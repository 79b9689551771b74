"""Other libraries' interfaces over the same client.

``meshrl.adapters.gymnasium`` and ``.vector`` are behind ``meshrl.make`` and ``meshrl.make_vec``; ``.sb3`` and
``.videos`` need their extras. ``.experience`` and ``.buffers`` are the recorded transitions for trainers, and their
replay buffers.
"""

import importlib
from types import ModuleType

# To be had as attributes, imported at the first look; the others are parts of these.
_FACES = frozenset({"gymnasium", "vector", "sb3", "videos", "experience", "buffers"})


def __getattr__(name: str) -> ModuleType:
    """A face.

    Raises:
        AttributeError: there is none of that name.
        ModuleNotFoundError: its extra is not installed; the text says how to install it.
    """
    if name in _FACES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
