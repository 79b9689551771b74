"""Starts every peer, asks each work of it for half a second and prints what it answers: the test of the peers.

    python benchmarks/peers/check.py [--seconds 0.5] [--sessions 256] [peer ...]

Its figures are comparable only loosely: nothing is interleaved here. Exits with 1 when a peer is unavailable or a work
fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import driver

WORKS = ("single", "clients16", "image", "image_unix", "vector64", "vector256", "vector2048", "vector4096", "sessions")


def said(answer: driver.Answer) -> str:
    if "n" in answer:
        times = f"{answer['seconds']:.2f} s, p50 {answer['p50_s']:.2f} s, p99 {answer['p99_s']:.2f} s"
        return f"{answer['ok']} of {answer['n']} in {times} {answer['errors'] or ''}".rstrip()
    text = f"{answer['count'] / answer['seconds']:>12,.0f}/s"
    if "samples_us" in answer:
        text += f"   p50 {statistics.median(answer['samples_us']):,.1f} µs"
    return text


def check(peer: driver.Peer, seconds: float, sessions: int) -> bool:
    """Prints a line a work; whether all went well."""
    try:
        began = time.monotonic()
        process = driver.start(peer.name)
    except driver.Unavailable as error:
        print(f"{peer.name}: unavailable: {error}", flush=True)
        return False
    well = True
    try:
        versions = ", ".join(f"{name} {version}" for name, version in process.versions.items())
        print(f"{peer.name}: {peer.title}; started in {time.monotonic() - began:.1f} s; {versions}", flush=True)
        print(f"  {process.notes}", flush=True)
        for work in WORKS:
            more = {"n": sessions} if work == "sessions" else {}
            answer = process.ask(work, seconds=seconds, **more)
            if "unsupported" in answer:
                continue
            print(f"  {work:12}{answer['error'] if 'error' in answer else said(answer)}", flush=True)
            well &= "error" not in answer
    except driver.Unavailable as error:
        print(f"  unavailable: {error}", flush=True)
        return False
    finally:
        process.stop()
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    all_but = "all but this system and sb3, whose works are others, where none is named"
    parser.add_argument("peers", nargs="*", choices=[*driver.PEERS, []], help=all_but)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--sessions", type=int, default=256)
    settings = parser.parse_args()
    names = settings.peers or [name for name, peer in driver.PEERS.items() if name != "sb3" and not peer.ours]
    results = [check(driver.PEERS[name], settings.seconds, settings.sessions) for name in names]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
