"""How long ``mtl-export --help`` takes, beside importing its command-line library.

Peer: ``python -c 'import click'``, the least any click program can take.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

ROUNDS = 15
LIMIT_S = 0.2


def seconds(command: list[str]) -> float:
    """Return how long ``command`` takes, in seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


@pytest.mark.benchmark
def test_help_starts_quickly() -> None:
    """``--help`` answers within 0.2 s; the two commands are timed in turns."""
    ours = [str(Path(sys.executable).with_name("mtl-export")), "--help"]
    peer = [sys.executable, "-c", "import click"]
    seconds(ours), seconds(peer)  # warm the file cache
    rounds = [(seconds(ours), seconds(peer)) for _ in range(ROUNDS)]
    our_times, peer_times = zip(*rounds, strict=True)
    print(
        f"\nmtl-export --help    best {min(our_times) * 1e3:6.1f} ms"
        f"   median {median(our_times) * 1e3:6.1f} ms"
        f"\nimport click         best {min(peer_times) * 1e3:6.1f} ms"
        f"   median {median(peer_times) * 1e3:6.1f} ms"
        f"\nratio of medians     {median(our_times) / median(peer_times):.2f}  ({ROUNDS} rounds)"
    )
    assert min(our_times) <= LIMIT_S
