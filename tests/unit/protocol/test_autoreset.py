from __future__ import annotations

import pytest
from gymnasium.vector import AutoresetMode

from meshrl.protocol.autoreset import RULES, Ended, OnEnd


def test_there_is_a_rule_for_each_of_gymnasiums_modes_and_no_other() -> None:
    assert sorted(RULES) == sorted(mode.value for mode in AutoresetMode)


@pytest.mark.parametrize(
    ("mode", "on_end", "ended"),
    [
        (AutoresetMode.NEXT_STEP, OnEnd.LEAVE, Ended.RESET),
        (AutoresetMode.SAME_STEP, OnEnd.RESET, Ended.STEP),
        (AutoresetMode.DISABLED, OnEnd.LEAVE, Ended.REFUSE),
    ],
)
def test_what_becomes_of_an_ended_sub_environment(mode: AutoresetMode, on_end: OnEnd, ended: Ended) -> None:
    assert RULES[mode.value] == (on_end, ended)


def test_whatever_resets_at_once_has_nothing_ended_to_refuse_or_to_reset_later() -> None:
    for rule in RULES.values():
        assert (rule.on_end is OnEnd.RESET) == (rule.ended is Ended.STEP)
