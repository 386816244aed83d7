"""Toy checkpoints whose tasks' heads differ in what they compute, for the toy BERT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.checkpoint import adapterhub_toys as hub

# Odd widths, so that a head in the wrong place is of the wrong shape. Each task's output: two
# heads of one word differ in their layers, and one task has no head at all.
NAMES = ("topic", "score", "entities", "states", "intent", "mood")
HEADS: dict[str, dict[str, Any] | None] = {
    "topic": hub.head_config(3),
    "score": hub.head_config(1),
    "entities": hub.head_config(5, head_type="tagging", layers=1),
    "states": None,
    "intent": hub.head_config(2, layers=1),
    "mood": hub.head_config(4),
}
OUTPUTS = {
    "topic": "classification",
    "score": "regression",
    "entities": "token_classification",
    "states": "last_hidden_state",
    "intent": "classification_2",
    "mood": "classification",
}


def write_mixed(folder: Path, *, is_shared: bool = True, names: Sequence[str] = NAMES) -> Path:
    """Write one MTL-LoRA task for each head; A and B are equal unless ``is_shared`` is false."""
    states = hub.mtl_states(names, is_shared=is_shared)
    for index, (name, config) in enumerate((name, HEADS[name]) for name in names):
        head = ({"config": config}, hub.head_state(name, config, index)) if config else None
        hub.write_adapter(folder / name, name, states[name], hub.MTL_CONFIG, head=head)
    hub.write_setup(folder, names)
    return folder
