"""Datasets: recorded episodes as files of other libraries, and a Minari dataset as recordings.

Each format is an async function of a mesh, the episodes and a target; what they have in common is
:mod:`~meshrl.adapters.datasets.exporting`. Their packages are extras, and imported when they are needed.
"""

from meshrl.adapters.datasets.exporting import Exported
from meshrl.adapters.datasets.importing import Imported, import_minari
from meshrl.adapters.datasets.minari import export_minari
from meshrl.adapters.datasets.npz import export_npz
from meshrl.adapters.datasets.parquet import export_parquet, read_parquet
from meshrl.adapters.datasets.source import Episodes, Progress, Skipped

__all__ = [
    "Episodes",
    "Exported",
    "Imported",
    "Progress",
    "Skipped",
    "export_minari",
    "export_npz",
    "export_parquet",
    "import_minari",
    "read_parquet",
]
