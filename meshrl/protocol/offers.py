"""Offers: what a worker's vectors can do of what an open asks for (R6); client and worker ask the same questions."""

from __future__ import annotations

from meshrl.wire.messages import AutoresetName, Form, Seeding, Vectors


def remedy(vectors: Vectors | None, form: Form, autoreset_mode: AutoresetName, seeding: Seeding) -> str:
    """What to pass instead, so that such a worker can do it, as it is written; empty where nothing helps."""
    if vectors is None or not vectors.seedings or (form == "pool" and not vectors.pool):
        return ""
    passed = []
    if form == "vector" and autoreset_mode not in vectors.autoreset_modes:
        if not vectors.autoreset_modes:
            return ""
        passed.append(f'autoreset_mode="{vectors.autoreset_modes[0]}"')
    if seeding not in vectors.seedings:
        passed.append(f'seeding="{vectors.seedings[0]}"')
    return " and ".join(passed)


def lacking(vectors: Vectors | None, form: Form, autoreset_mode: AutoresetName, seeding: Seeding) -> str:
    """What of such an open a worker cannot do (R6), and what it can instead; empty when it can do all of it."""
    if form == "single":
        return ""
    if vectors is None:
        return "vectors of any kind (it has single envs only)"
    lacks = []
    if form == "pool" and not vectors.pool:
        lacks.append("pools (it has vectors)")
    if form == "vector" and autoreset_mode not in vectors.autoreset_modes:
        lacks.append(f"autoreset_mode {autoreset_mode} (it has {', '.join(vectors.autoreset_modes) or 'none'})")
    if seeding not in vectors.seedings:
        lacks.append(f"seeding {seeding} (it has {', '.join(vectors.seedings) or 'none'})")
    return ", ".join(lacks)
