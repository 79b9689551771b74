"""Manifests: what an experiment is, as a TOML file says it, and the hash by which its episodes are known.

::

    name = "cartpole-random"
    env = "cartpole"
    seeds = [0, 1, 2]
    episodes = 20
    agent = "random"

The hash is the SHA-256 of the manifest's JSON with sorted keys and without what is left at its default; in place of a
script's path it has the SHA-256 of its content. So comments, the order of keys and where files lie change nothing, and
a key that a later version adds changes no hash of today's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from meshrl.errors import UsageError
from meshrl.wire.messages import Description
from meshrl.wire.record import Label, ManifestHash

# Says, to whatever opens a mesh in its processes, of which experiment that is.
VARIABLE = "MESHRL_EXPERIMENT"

Text = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[int, Field(ge=1, lt=2**31)]


class Wrapper(BaseModel):
    """A wrapper that the served env must have.

    Attributes:
        name: of it, as the env's ``spec.additional_wrappers`` has it: ``TransformReward``.
        kwargs: with which it was made; None for any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Text
    kwargs: dict[str, Any] | None = None


class Manifest(BaseModel):
    """What an experiment is.

    Attributes:
        name: what it is called; a label of its episodes.
        env: the served name.
        kwargs: for the env's constructor, as far as the workers' operator allows.
        wrappers: around the env, the innermost first: names, or tables of ``name`` and ``kwargs``. Workers wrap, and
            no client: an env that is served with others is refused. None takes it as it is.
        seeds: it is done once with each.
        num_envs: how many envs an agent plays in at once.
        episodes: of an agent, with each seed.
        max_steps: of an agent's episode, which is left then; None for no limit but the env's own.
        agent: the served name of who plays.
        deterministic: ask the agent for its best action rather than a sample.
        script: a Python program that does the experiment instead; its path from the manifest's directory.
        arguments: for the script.
        record: how much of it is recorded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Text
    env: Text
    kwargs: dict[str, Any] = Field(default_factory=dict)
    wrappers: list[Wrapper] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    num_envs: Annotated[int, Field(ge=1, le=1024)] = 1
    episodes: Number = 1
    max_steps: Number | None = None
    agent: Text | None = None
    deterministic: bool = False
    script: Text | None = None
    arguments: list[str] = Field(default_factory=list)
    record: Literal["actions", "full", "strict"] = "actions"

    @field_validator("wrappers", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        return [{"name": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.agent is None) == (self.script is None):
            raise ValueError("give agent, the served name of who plays, or script, a Python program: one of the two")
        if self.arguments and self.script is None:
            raise ValueError("arguments are for a script")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has one twice")
        try:
            json.dumps([self.kwargs, self.model_dump()["wrappers"]], allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise ValueError(f"kwargs are texts, numbers, booleans, lists and tables ({exc})") from None
        return self

    def canonical(self, script: bytes | None = None) -> str:
        """It as the JSON of which the hash is made.

        Args:
            script: the content of its script, if it has one.
        """
        body = self.model_dump(exclude_defaults=True, exclude={"script"})
        if script is not None:
            body["script_sha256"] = hashlib.sha256(script).hexdigest()
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def check_wrappers(self, description: Description) -> None:
        """Whether the served env has its wrappers.

        Raises:
            UsageError: it has others, or does not say which.
        """
        if self.wrappers is None:
            return
        try:
            told = json.loads(description.spec or "")["additional_wrappers"]
            has = [Wrapper(name=one["name"], kwargs=one["kwargs"]) for one in told]
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{description.name} does not say which wrappers it has, as its worker makes it of no Gymnasium id; "
                "leave wrappers out of the manifest",
                name=description.name,
            ) from None
        pairs = zip(self.wrappers, has, strict=False)
        same = all(one.name == other.name and one.kwargs in (None, other.kwargs) for one, other in pairs)
        if not same or len(has) != len(self.wrappers):
            raise UsageError(
                f"{description.name} is served with the wrappers {_listed(has)}, and the manifest says "
                f"{_listed(self.wrappers)}; workers wrap, so serve it with these under a name of its own",
                name=description.name,
            )


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A manifest as it was read.

    Attributes:
        manifest: it.
        hash: of it.
        script: where that is, if it has one.
    """

    manifest: Manifest
    hash: str
    script: Path | None


class Experiment(BaseModel):
    """One run of a manifest, as a mesh knows it that records for it.

    Attributes:
        hash: of the manifest, which every recording has.
        manifest: it.
        run: what tells this run from others of the same manifest.
        seed: which of the manifest's it is done with; None where each session says so itself.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    hash: ManifestHash
    manifest: Manifest
    run: Label
    seed: Seed | None = None

    @property
    def labels(self) -> dict[str, str]:
        """Of its episodes."""
        seed = {} if self.seed is None else {"seed": str(self.seed)}
        return {"experiment": self.manifest.name, "experiment_run": self.run, **seed}

    def to_environment(self) -> dict[str, str]:
        """The variable by which a process's meshes record for it."""
        return {VARIABLE: self.model_dump_json(exclude_defaults=True)}

    @classmethod
    def from_environment(cls) -> Experiment | None:
        """That which this process was started for, if any.

        Raises:
            UsageError: the variable holds something else.
        """
        text = os.environ.get(VARIABLE)
        if not text:
            return None
        try:
            return cls.model_validate_json(text)
        except ValidationError as exc:
            raise UsageError(
                f"${VARIABLE} is what `meshrl experiment` gives its scripts; unset it: {_why(exc)}"
            ) from exc


def read_manifest(path: Path) -> ManifestFile:
    """The manifest that a file holds.

    Raises:
        UsageError: it cannot be read, or is none: which key is wrong, and what is allowed.
    """
    try:
        text = path.read_text("utf-8")
        manifest = manifest_of(tomllib.loads(text))
        script = None if manifest.script is None else path.parent / manifest.script
        content = None if script is None else script.read_bytes()
    except (OSError, ValueError) as exc:
        raise UsageError(f"{path}: {_why(exc)}", path=str(path)) from exc
    body = manifest.canonical(content)
    return ManifestFile(manifest, hashlib.sha256(body.encode()).hexdigest(), script)


def manifest_of(body: Mapping[str, Any]) -> Manifest:
    """The manifest that a table of TOML says.

    Raises:
        ValidationError: it is none.
    """
    return Manifest.model_validate(body)


def _listed(wrappers: list[Wrapper]) -> str:
    return "[" + ", ".join(one.name if one.kwargs is None else f"{one.name} {one.kwargs}" for one in wrappers) + "]"


def _why(exc: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(exc, OSError):
        return f"cannot be read: {exc.strerror or exc}"
    if not isinstance(exc, ValidationError):
        return f"is no TOML: {exc}" if isinstance(exc, tomllib.TOMLDecodeError) else str(exc)
    return "; ".join(_of_key(".".join(map(str, one["loc"])), one["type"], one["msg"]) for one in exc.errors())


def _of_key(key: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        known = list(Wrapper.model_fields) if key.startswith("wrappers.") else list(Manifest.model_fields)
        close = difflib.get_close_matches(key, known, 1)
        meant = f", maybe {close[0]}" if close else ""
        return f"there is no key {key}{meant}; the keys are {', '.join(known)}"
    if kind == "missing":
        return f"the key {key} is missing"
    text = message.removeprefix("Value error, ")
    return f"{key}: {text[:1].lower()}{text[1:]}" if key else text
