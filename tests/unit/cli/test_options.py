"""How the texts of options are read."""

import os
import subprocess
import sys

import pytest

from meshrl.cli.options import bytes_in, capabilities_in, json_object, names_in, processes_in, usable_cores
from meshrl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "names"), [("", ()), ("a", ("a",)), ("a,b", ("a", "b")), (" a , ,b,", ("a", "b")), ("*", ("*",))]
)
def test_names_are_separated_by_commas(text: str, names: tuple[str, ...]) -> None:
    assert names_in(text) == names


def test_json_object_is_read() -> None:
    assert json_object('{"size": 5}', "--kwargs") == {"size": 5}


@pytest.mark.parametrize("text", ["", "size=5", "[1]", "null", "{'size': 5}"])
def test_anything_but_a_json_object_is_refused_by_the_option_name(text: str) -> None:
    with pytest.raises(UsageError, match="--kwargs is a JSON object"):
        json_object(text, "--kwargs")


def test_capabilities_that_read_as_json_are_what_they_say() -> None:
    pairs = ["gpu=true", "cores=8", "zone=eu-1", 'list=["a"]', "empty=", "eq=a=b"]
    assert capabilities_in(pairs) == {
        "gpu": True,
        "cores": 8,
        "zone": "eu-1",
        "list": ["a"],
        "empty": "",
        "eq": "a=b",
    }


@pytest.mark.parametrize("pair", ["gpu", "=true", ""])
def test_capability_without_key_and_equals_sign_is_refused(pair: str) -> None:
    with pytest.raises(UsageError, match="KEY=VALUE"):
        capabilities_in([pair])


@pytest.mark.parametrize(("text", "count"), [("1", 1), ("4", 4), (" 12 ", 12)])
def test_processes_are_as_many_as_said(text: str, count: int) -> None:
    assert processes_in(text) == count


@pytest.mark.parametrize("text", ["0", "auto"])
def test_automatic_processes_are_one_for_each_core_that_may_be_used(text: str) -> None:
    assert processes_in(text) == usable_cores()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="reads the affinity of a process")
def test_cores_that_this_process_may_not_use_do_not_count() -> None:
    program = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from meshrl.cli.options import processes_in; print(processes_in('auto'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("text", ["", "-1", "two", "1.5", "00", "²"])
def test_anything_but_a_number_of_processes_or_auto_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--processes is a number from 1, or auto"):
        processes_in(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("2G", 2 << 30), ("1.5g", 3 << 29), ("64 KiB", 65536), ("100", 100), ("1TB", 1 << 40)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert bytes_in(text, "--max-memory") == size
    assert bytes_in(None, "--max-memory") is None


@pytest.mark.parametrize("text", ["", "much", "2X", "-1G", "G", "1 2G", "٢G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory is a size such as 512M or 2G"):
        bytes_in(text, "--max-memory")
