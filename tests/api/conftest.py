"""The project that verbs are tried on is that of ``tests.cli``."""

from tests.cli.conftest import (
    exported,
    graphs,
    known_traces,
    originals,
    project,
    run,
    traced_once,
)

__all__ = ["exported", "graphs", "known_traces", "originals", "project", "run", "traced_once"]
