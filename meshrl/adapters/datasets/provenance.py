"""Provenance: what a dataset says of where its episodes are from; the same in every format.

Of the dataset, a map that is JSON: its spaces, its env's spec, what its infos hold, and of each recording what that
says of itself, for people and, under ``recorded``, whole. Of each episode, a flat map of numbers, truths and texts.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from meshrl import __version__
from meshrl.adapters.datasets.gathered import Gathered
from meshrl.adapters.datasets.infos import InfoColumn, text_of, value_of
from meshrl.client.episode import Episode
from meshrl.errors import MalformedMessage
from meshrl.wire.recorded import Recorded

FORMAT = 1
# Beyond what files have whole numbers for. A seed may be as long as it likes.
_WIDE = 1 << 63


def dataset_facts(gathered: Gathered) -> dict[str, Any]:
    """What is said of the dataset."""
    description = gathered.recordings[0].description
    return {
        "format": FORMAT,
        "meshrl": __version__,
        "observation_space": description.observation_space,
        "action_space": description.action_space,
        "env_spec": gathered.spec,
        "infos": {key: part.to_json() for key, part in gathered.infos.items()},
        "recordings": [_recording_facts(one) for one in gathered.recordings],
    }


def _recording_facts(recorded: Recorded) -> dict[str, Any]:
    return {
        "session": recorded.session,
        "worker": recorded.worker,
        "user": recorded.user,
        "env": recorded.name,
        "level": recorded.level,
        "labels": dict(recorded.labels),
        "policy": recorded.policy,
        "manifest": recorded.manifest,
        "platform": recorded.platform,
        "versions": dict(recorded.description.versions),
        "recorded": base64.b64encode(recorded.to_stream()).decode(),
    }


def episode_facts(episode: Episode, recording: int) -> dict[str, Any]:
    """What is said of one episode; None where there is nothing to say.

    Args:
        episode: of the dataset.
        recording: the position of its recording in what is said of the dataset.
    """
    recorded = episode.recorded
    return {
        "episode_id": episode.episode_id,
        "env": episode.env,
        "env_id": episode.env_id,
        "recording": recording,
        "session": recorded.session,
        "worker": recorded.worker,
        "user": recorded.user,
        "labels": text_of(dict(recorded.labels)),
        "policy": recorded.policy,
        "seed": None if episode.seed is None or episode.seed >= _WIDE else episode.seed,
        "wide_seed": None if episode.seed is None or episode.seed < _WIDE else str(episode.seed),
        "options": None if episode.options is None else text_of(dict(episode.options)),
        "reason": episode.reason,
        "ended_at": episode.ended_at.isoformat(),
        "remade": episode.remade,
        "platform": recorded.platform,
        "versions": text_of(dict(recorded.description.versions)),
    }


def recordings_of(facts: Mapping[str, Any]) -> list[Recorded]:
    """The recordings of what is said of a dataset.

    Raises:
        MalformedMessage: it says none, or is of a later form.
    """
    if facts.get("format") != FORMAT or not isinstance(facts.get("recordings"), list):
        raise MalformedMessage(f"the dataset is of form {facts.get('format')!r}, and this package reads form {FORMAT}")
    try:
        return [Recorded.from_stream(base64.b64decode(one["recorded"])) for one in facts["recordings"]]
    except (KeyError, TypeError, ValueError) as exc:
        raise MalformedMessage("what the dataset says of its recordings cannot be read") from exc


def infos_in(facts: Mapping[str, Any]) -> dict[str, InfoColumn]:
    """What the infos hold, of what is said of a dataset.

    Raises:
        MalformedMessage: it does not say.
    """
    told = facts.get("infos")
    if not isinstance(told, dict):
        raise MalformedMessage("the dataset does not say what its infos hold")
    return {key: InfoColumn.from_json(part) for key, part in told.items()}


def seed_in(facts: Mapping[str, Any]) -> int | None:
    """The seed of what is said of an episode."""
    seed = facts["seed"] if facts.get("wide_seed") is None else facts["wide_seed"]
    return None if seed is None else int(seed)


def episode_from(facts: Mapping[str, Any], recordings: Sequence[Recorded], **columns: Any) -> Episode:
    """An episode of what is said of it, and its columns.

    Raises:
        MalformedMessage: something is missing.
    """
    try:
        options = facts["options"]
        return Episode(
            episode_id=str(facts["episode_id"]),
            env=str(facts["env"]),
            env_id=int(facts["env_id"]),
            seed=seed_in(facts),
            options=None if options is None else value_of(options),
            reason=str(facts["reason"]),
            ended_at=datetime.fromisoformat(facts["ended_at"]),
            remade=bool(facts["remade"]),
            recorded=recordings[int(facts["recording"])],
            **columns,
        )
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise MalformedMessage(f"what the dataset says of an episode cannot be read: {exc!r}") from exc
