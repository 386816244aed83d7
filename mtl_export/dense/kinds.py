"""What the tasks of dense prediction are: how raw values become what a user looks at.

    classes      semseg, human_parts    argmax over channels, int64 [B, H, H]
    probability  sal, edge              255 sigmoid, [B, H, H]
    directions   normals                (n / |n| + 1) 127.5, [B, H, H, 3]
    values       depth                  [B, H, H, n]

Source: evaluation/evaluate_utils.py of https://github.com/scale-lab/MTLoRA/tree/333a375.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mtl_export.errors import UsageError

CLASSES, PROBABILITY, DIRECTIONS, VALUES = "classes", "probability", "directions", "values"
KINDS = {
    "semseg": CLASSES,
    "human_parts": CLASSES,
    "sal": PROBABILITY,
    "edge": PROBABILITY,
    "normals": DIRECTIONS,
    "depth": VALUES,
}


def kind_of(task: str) -> str:
    """Return the kind of a task by its name; empty if the name is none of the trainer's."""
    return KINDS.get(task, "")


def refuse_unknown(tasks: tuple[str, ...]) -> None:
    """Refuse to post-process tasks whose kind is not known.

    Raises:
        UsageError: There is one.
    """
    for task in tasks:
        if not kind_of(task):
            raise UsageError(
                f"--postprocess: nobody says what {task} is of",
                expected=f"tasks named {', '.join(KINDS)}",
                fix="Leave out --postprocess; the graph then answers with raw values",
            )


def postprocessed(task: str, values: torch.Tensor) -> torch.Tensor:
    """Return what a user looks at, from raw values ``[B, n, H, H]``; see the table above."""
    kind = kind_of(task)
    if kind == CLASSES:
        return values.argmax(1)
    if kind == PROBABILITY:
        return 255 * torch.sigmoid(values[:, 0])
    if kind == DIRECTIONS:
        values = (functional.normalize(values, dim=1) + 1) * 127.5
    return values.permute(0, 2, 3, 1)
