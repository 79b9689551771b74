"""Rows: what ``meshrl doctor`` found, one fact each."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Row(BaseModel):
    """One fact.

    Attributes:
        what: it is about.
        status: an error keeps meshrl from working here, a warning a part of it.
        found: in words.
        remedy: what to do about it; empty when there is nothing to do.
    """

    model_config = ConfigDict(frozen=True)

    what: str
    status: Literal["ok", "warning", "error"]
    found: str
    remedy: str = ""
