"""Writes ``schemas/v1/messages`` and ``schemas/v1/asyncapi.yaml`` from the code that speaks them.

::

    python -m schemas.generate            # write what changed
    python -m schemas.generate --check    # write nothing; say what would change, and exit with 1 if anything would
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from meshrl.wire import audited, messages, of_recordings, record, recorded
from meshrl.wire.subjects import VERSION
from schemas.asyncapi import asyncapi
from schemas.frames import DIALECT, frames
from schemas.ops import Schema

V1 = Path(__file__).parent / "v1"

# An entry holds arrays, of which pydantic knows nothing.
_BY_HAND = frozenset({messages.Message, recorded.Entry})
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", re.MULTILINE | re.DOTALL)


def models() -> dict[str, type[messages.Message]]:
    """Every control message, by the name of its schema: ``session_state`` for ``SessionState``."""
    return {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): cls
        for name, cls in (vars(messages) | vars(audited) | vars(recorded) | vars(of_recordings)).items()
        if inspect.isclass(cls) and issubclass(cls, messages.Message) and cls not in _BY_HAND
    }


def control(name: str, model: type[messages.Message]) -> Schema:
    """The schema of one control message, its docstring's attributes beside its fields."""
    raw = model.model_json_schema()
    described = _described(model)
    properties = described["properties"]
    properties["v"] = {
        "type": "integer",
        "const": VERSION,
        "default": VERSION,
        "description": "The protocol's major version.",
    }
    for field in ("observation_space", "action_space"):
        if field in properties:
            properties[field] |= {"anyOf": [{"$ref": "space.json"}, {"type": "null"}]}
    made: Schema = {"$schema": DIALECT, "title": name, **described}
    return {**made, "required": raw["required"]} if "required" in raw else made


def _described(model: type[BaseModel]) -> Schema:
    """A model's docstring and fields, without what is needed of them."""
    text, _, attributes = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")
    told = {field: " ".join(words.split()) for field, words in _ATTRIBUTE.findall(attributes)}
    properties = {
        field: {**_tidy(schema), **({"description": told[field]} if field in told else {})}
        for field, schema in model.model_json_schema()["properties"].items()
    }
    return {"description": text.strip(), "type": "object", "properties": properties}


def _tidy(node: Any) -> Any:
    """Without pydantic's titles, with references to files in place of definitions."""
    if isinstance(node, dict):
        node = {key: _tidy(value) for key, value in node.items() if key != "title"}
        if "$ref" in node:
            named = str(node["$ref"]).rpartition("/")[2]
            cls = getattr(messages, named, None) or getattr(record, named)
            if not issubclass(cls, messages.Message):  # a part of a message, which has no file
                return _described(cls)
            node["$ref"] = next(name for name, model in models().items() if model is cls) + ".json"
        return node
    return [_tidy(item) for item in node] if isinstance(node, list) else node


def _plain(node: Any) -> Any:
    """Without the docstrings' reST."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return _ROLE.sub(r"\1", node).replace("``", "") if isinstance(node, str) else node


def generated() -> dict[Path, str]:
    """Every file that this program writes, with its text."""
    schemas = {f"{name}.json": control(name, model) for name, model in models().items()} | frames()
    texts = {
        V1 / "messages" / name: json.dumps(_plain(schema), indent=2, ensure_ascii=False) + "\n"
        for name, schema in schemas.items()
    }
    return {**texts, V1 / "asyncapi.yaml": asyncapi()}


def stale() -> list[Path]:
    """The files that differ from what would be written, and those that nothing writes any more."""
    wanted = generated()
    differ = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    return differ + [path for path in sorted((V1 / "messages").iterdir()) if path not in wanted]


def main(arguments: list[str]) -> int:
    """Write, or check; gives the exit status."""
    found = stale()
    for path in found:
        sys.stdout.write(f"{path.relative_to(V1.parent)}\n")
    if "--check" in arguments:
        return 1 if found else 0
    wanted = generated()
    (V1 / "messages").mkdir(parents=True, exist_ok=True)
    for path in found:
        if path in wanted:
            path.write_text(wanted[path], "utf-8")
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
