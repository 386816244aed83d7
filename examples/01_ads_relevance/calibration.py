"""The rows that ``mtl-export calibrate`` asks for; mtl-export.toml names both functions.

Ranges are taken from training rows; the test rows are kept for the accuracy gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data import Row, load_splits


def train_rows() -> Iterator[dict[str, Any]]:
    """Yield the training rows of all tasks."""
    for name, splits in load_splits(dev_share=0.0).items():
        yield from _objects(name, splits.train)


def test_rows() -> Iterator[dict[str, Any]]:
    """Yield the test rows of all tasks."""
    for name, splits in load_splits().items():
        yield from _objects(name, splits.test)


def _objects(task: str, rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {"task": task, "text": row.text, "text_pair": row.text_pair, "label": row.label}
