"""Reads the contract: schemas as validators, messages as JSON sees them, the corpora."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

V1 = Path(__file__).parents[2] / "schemas" / "v1"

# Schemas refer to one another by file name; any base will do.
BASE = "https://meshrl.invalid/v1/messages/"


@cache
def schemas() -> dict[str, Any]:
    """Every schema by its name, ``step.reply`` for instance."""
    return {
        path.name.removesuffix(".json"): json.loads(path.read_text("utf-8"))
        for path in sorted((V1 / "messages").glob("*.json"))
    }


@cache
def _registry() -> Registry[Any]:
    resources = []
    for name, schema in schemas().items():
        # Without its $schema, which would bring back jsonschema's own validator.
        bare = {key: value for key, value in schema.items() if key != "$schema"}
        resources.append((f"{BASE}{name}.json", Resource.from_contents(bare, default_specification=DRAFT202012)))
    return Registry().with_resources(resources)


def _of_msgpack(validator: Any, types: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """The keyword ``type`` for msgpack: a bin is what has a contentEncoding, and 1.0 is no integer."""
    if "contentEncoding" in schema:
        if not isinstance(instance, bytes):
            yield ValidationError(f"{instance!r} is no bin")
        return
    wanted = [types] if isinstance(types, str) else types
    if isinstance(instance, float):
        fits = "number" in wanted
    else:
        fits = any(validator.is_type(instance, kind) for kind in wanted)
    if not fits:
        yield ValidationError(f"{instance!r} is not of type {wanted}")


_Validator: Any = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"type": _of_msgpack}
)


@cache
def validator(name: str) -> Any:
    """Checks messages, as a plain msgpack decoder gives them, by one schema."""
    assert name in schemas(), f"no schema {name}"
    return _Validator({"$ref": f"{BASE}{name}.json"}, registry=_registry())


def fault(name: str, body: bytes) -> str:
    """What is wrong with a message by its schema; nothing is the empty text."""
    error = next(iter(validator(name).iter_errors(msgpack.unpackb(body, strict_map_key=False))), None)
    return "" if error is None else f"{error.json_path}: {error.message}"[:300]


@cache
def asyncapi() -> dict[str, Any]:
    """The AsyncAPI document."""
    document: dict[str, Any] = yaml.safe_load((V1 / "asyncapi.yaml").read_text("utf-8"))
    return document


def corpus(folder: str, file: str) -> list[dict[str, Any]]:
    """The entries of one file of ``golden`` or ``hostile``."""
    entries: list[dict[str, Any]] = json.loads((V1 / folder / f"{file}.json").read_text("utf-8"))
    return entries


def titles(entries: list[dict[str, Any]]) -> list[str]:
    """Their names, as test ids."""
    return [" ".join(filter(None, (entry["name"], entry.get("key_style")))) for entry in entries]
