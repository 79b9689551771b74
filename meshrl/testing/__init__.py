"""A conformance suite for any served env; ``meshrl check`` runs it.

::

    async with Mesh() as m:
        report = await conformance(m, "cartpole")
        assert report.ok, str(report)
"""

from meshrl.testing.conformance import CHECKS, conformance
from meshrl.testing.report import Outcome, Report, Result
from meshrl.testing.trial import Check

__all__ = ["CHECKS", "Check", "Outcome", "Report", "Result", "conformance"]
