"""How the texts of options are read."""

import pytest

from meshrl.cli.options import capabilities_in, json_object, names_in
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
