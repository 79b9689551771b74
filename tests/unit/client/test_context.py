import pytest

from meshrl.client.context import silence_s


@pytest.mark.parametrize(
    ("timeout", "silence"), [(0.5, 0.5), (3, 3), (10, 10), (15, 10), (30, 10), (60, 20), (120, 40)]
)
def test_a_silent_worker_is_given_up_after_a_third_of_the_timeout_and_not_before_ten_seconds(
    timeout: float, silence: float
) -> None:
    assert silence_s(timeout) == silence
