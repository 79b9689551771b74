"""Reports: what a run of the conformance suite found."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

Outcome = Literal["passed", "failed", "warning", "skipped"]


class Result(BaseModel):
    """What one check found.

    Attributes:
        check: its name.
        about: what it asks, in a sentence.
        outcome: a warning is something to look at that may be meant so.
        found: what it found, in a sentence.
        remedy: what to do about it; empty when there is nothing to do.
        remote_traceback: of the env's exception, when one was the reason.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    about: str
    outcome: Outcome
    found: str
    remedy: str = ""
    remote_traceback: str | None = None


class Report(BaseModel):
    """What all checks found, in their order.

    Attributes:
        name: the env's served name.
        seed: that the run was made with.
        results: one a check.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    seed: int
    results: list[Result]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings are left to people."""
        return not self.having("failed")

    def having(self, outcome: Outcome) -> list[Result]:
        """The results with that outcome."""
        return [result for result in self.results if result.outcome == outcome]

    def result(self, check: str) -> Result:
        """The result of the check of that name.

        Raises:
            KeyError: there is none.
        """
        for result in self.results:
            if result.check == check:
                return result
        raise KeyError(check)

    def __str__(self) -> str:
        lines = [f"{self.name}: {'conforms' if self.ok else 'does not conform'}"]
        for result in self.results:
            remedy = f" ({result.remedy})" if result.remedy else ""
            lines.append(f"  {result.outcome:8} {result.check}: {result.found}{remedy}")
        return "\n".join(lines)
