"""Autoreset: what becomes of a sub-environment whose episode has ended (R6).

    mode        the ending step   the next step     a reset without it in the mask
    NextStep    leaves it ended   resets it         leaves it ended
    SameStep    resets it         steps it          (is never ended)
    Disabled    leaves it ended   is refused        leaves it ended

What an ended sub-environment shows (render, attributes) is its last state, until it is reset. The names are the values
of Gymnasium's ``AutoresetMode``, and the behaviour is that of its ``SyncVectorEnv``.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class OnEnd(Enum):
    """What the step does that ends an episode."""

    LEAVE = "leave"
    RESET = "reset"


class Ended(Enum):
    """What a step does to a sub-environment that had ended before."""

    STEP = "step"
    RESET = "reset"
    REFUSE = "refuse"


class Rule(NamedTuple):
    """One row of the table."""

    on_end: OnEnd
    ended: Ended


RULES: dict[str, Rule] = {
    "NextStep": Rule(OnEnd.LEAVE, Ended.RESET),
    "SameStep": Rule(OnEnd.RESET, Ended.STEP),
    "Disabled": Rule(OnEnd.LEAVE, Ended.REFUSE),
}
