"""A run: starts the systems, gives each its turns, and keeps what they answer."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks import driver, estimates
from benchmarks.works import Turn

FRAME_MB = 84 * 84 * 4 / 1e6
# What one count of a work weighs, for those of which the bytes matter.
MB_A_COUNT = {"image32": FRAME_MB, "image": FRAME_MB, "echo_image": FRAME_MB, "echo_image32": 32 * FRAME_MB}
# A learning run of 100,000 steps takes minutes, and so does opening thousands of sessions on a busy machine.
LONG_ANSWER_S = 600.0

Quantities = dict[str, float]


def quantities(work: str, answer: Mapping[str, Any]) -> Quantities:
    """The figures of an answer; more of some works than of others.

    Args:
        work: which was asked for.
        answer: to it, of a work that went well.
    """
    if "kept" in answer:  # fair
        return {name: float(answer[name]) for name in ("kept", "capacity", "alone", "beside", "greedy")}
    if "n" in answer:  # sessions
        rate = answer["ok"] / answer["seconds"]
        return {
            "rate": rate,
            "succeeded": answer["ok"] / answer["n"],
            "p50_s": answer["p50_s"],
            "p99_s": answer["p99_s"],
        }
    found = {"rate": answer["count"] / answer["seconds"]}
    if work.startswith("ppo"):
        found["taken_s"] = answer["seconds"]
    if work in MB_A_COUNT:
        found["mb_per_s"] = found["rate"] * MB_A_COUNT[work]
    if "samples_us" in answer:
        found["p50_us"] = statistics.median(answer["samples_us"])
    return found


class Run:
    """The systems of one run and their figures.

    Attributes:
        series: by turn and quantity, a value a round; None where a turn went wrong.
        samples: by turn, the latencies of all rounds in microseconds.
        reasons: by turn or system, why there are no figures.
    """

    def __init__(self) -> None:
        self.series: dict[str, dict[str, list[float | None]]] = {}
        self.samples: dict[str, list[float]] = {}
        self.reasons: dict[str, str] = {}
        self._systems: dict[str, driver.PeerProcess] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._taken: dict[str, int] = {}

    def start(self, names: Iterable[str], on_start: Callable[[str], None]) -> None:
        """Starts systems of :data:`driver.PEERS`; one that cannot be is a reason from then on."""
        for name in names:
            on_start(name)
            try:
                process = driver.start(name)
            except driver.Unavailable as error:
                self.reasons[name] = str(error)
                continue
            self._systems[name] = process
            self._notes[name] = {"title": process.peer.title, "notes": process.notes, "versions": process.versions}

    def take(self, turn: Turn, seconds: float, *, keep: bool = True, **parameters: Any) -> None:
        """One turn; what goes wrong becomes a reason and a round without a value.

        Args:
            turn: which.
            seconds: how long.
            keep: whether its figures count; not in a round that only makes everything start.
            parameters: for works that take others than seconds.
        """
        answer = self._ask(turn, seconds * turn.longer, parameters)
        if not keep:
            return
        number = self._taken.get(turn.key, 0)
        self._taken[turn.key] = number + 1
        wrong = answer.get("error") or answer.get("unsupported")
        if wrong:
            self.reasons[turn.key] = wrong
        found = quantities(turn.work, answer) if answer and not wrong else {}
        if answer.get("errors"):
            self.reasons[turn.key] = str(answer["errors"])
        mine = self.series.setdefault(turn.key, {})
        for quantity in {*mine, *found}:
            values = mine.setdefault(quantity, [None] * number)
            values.append(found.get(quantity))
        self.samples.setdefault(turn.key, []).extend(answer.get("samples_us", ()))

    def _ask(self, turn: Turn, seconds: float, parameters: Mapping[str, Any]) -> driver.Answer:
        process = self._systems.get(turn.system)
        if process is None:
            return {"error": self.reasons.get(turn.system, "it was not started")}
        try:
            return process.ask(turn.work, timeout=LONG_ANSWER_S, seconds=seconds, **parameters)
        except driver.Unavailable as error:
            del self._systems[turn.system]  # it is stopped
            self.reasons[turn.system] = f"{error} (in {turn.work})"
            return {"error": str(error)}

    def stop(self) -> None:
        """Ends all systems."""
        for process in self._systems.values():
            process.stop()
        self._systems.clear()

    def as_json(self) -> dict[str, Any]:
        """What there is to be kept."""
        return {
            "systems": self._notes,
            "reasons": self.reasons,
            "series": {key: of_it for key, of_it in sorted(self.series.items()) if of_it},
            "latency_quantiles_us": {
                key: estimates.quantiles(samples) for key, samples in sorted(self.samples.items()) if samples
            },
        }


def machine() -> dict[str, Any]:
    """What it runs on."""
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:  # noqa: PTH123  not a path of ours
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else ""
    except OSError:
        pass  # not Linux
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def load() -> list[float] | None:
    """Processes that want to run, over 1, 5 and 15 minutes; None where the system does not say."""
    return [round(one, 2) for one in os.getloadavg()] if hasattr(os, "getloadavg") else None


def now() -> str:
    """The time as a text, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
