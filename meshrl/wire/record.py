"""What a client asks for of the recording of its session."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Nothing; seeds, actions, rewards and flags, from which observations can be made again; those and infos as well; or the
# same, with no answer that is not stored.
RecordLevel = Literal["off", "actions", "full", "strict"]
RECORD_LEVELS: tuple[RecordLevel, ...] = get_args(RecordLevel)
Label = Annotated[str, StringConstraints(max_length=256)]
Labels = Annotated[dict[Annotated[str, StringConstraints(min_length=1, max_length=64)], Label], Field(max_length=32)]
ManifestHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8,64}$")]


class Record(BaseModel):
    """Of an open.

    Attributes:
        level: how much is recorded; None as the worker's operator has it.
        every: of each sub-environment, every so many episodes, the first among them.
        labels: what episodes can be found by later.
        policy: the name of whoever chooses the actions.
        manifest: the hash of the experiment's manifest.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    level: RecordLevel | None = None
    every: Annotated[int, Field(ge=1, lt=2**31)] = 1
    labels: Labels = Field(default_factory=dict)
    policy: Label | None = None
    manifest: ManifestHash | None = None
