"""Logits of one row -> what its task says: labels, probabilities, a decision.

    kind of task                    probabilities        decision
    single_label_classification     softmax(logits)      the likeliest label
    multi_label_classification      sigmoid(logits)      labels of probability 0.5 or more
    regression                      none                 the number, or the numbers
    headless                        none                 none: the outputs are the answer

L labels of the task, S tokens of the row; a model that labels every token has one decision for
each. Labels without a name are called by their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.errors import EngineRunError
from mtl_export.names import LOGITS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mtl_export.checkpoint.tensors import Array

# Of one row, or of one token of it.
Choice = str | tuple[str, ...] | float | tuple[float, ...]
Decision = Choice | list[Choice]
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
REGRESSION, HEADLESS = "regression", "headless"


@dataclass(frozen=True)
class Answer:
    """What the model says to one row.

    Attributes:
        task: The row's task.
        outputs: The row's own part of every output, without padding; of an encoder that reads
            more than text, what its ``encoder_attention_mask`` counts.
        logits: ``[L]``, or ``[S, L]`` where every token is labelled; L are the task's own
            labels. None where the model has no such output.
        probabilities: As ``logits``; None where the kind of task has none.
        decision: As the table above says.
    """

    task: Task
    outputs: Mapping[str, Array]
    logits: Array | None = None
    probabilities: Array | None = None
    decision: Decision | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the logits, in their order."""
        return self.task.labels


def answer_of(
    task: Task, outputs: Mapping[str, Array], logits_name: str = LOGITS, *, row: int = 0
) -> Answer:
    """Return the answer that one row's ``outputs`` give under ``task``.

    Args:
        task: The row's task.
        outputs: By name, ``[...]``: the row's own, without padding.
        logits_name: The output that holds the task's logits, ``[..., W]`` with W >= L, where
            the task does not say.
        row: Its place in the batch, for messages.

    Raises:
        EngineRunError: The task's logits or probabilities are NaN, which would otherwise look
            like its first label, or like no label.
    """
    logits_name = task.output or logits_name
    if task.kind == HEADLESS and task.output:
        return Answer(task, outputs)
    if logits_name not in outputs:
        return Answer(task, outputs)
    logits = outputs[logits_name]
    if task.kind == HEADLESS:
        return Answer(task, outputs, logits)
    # The single graph's logits are as wide as the widest head.
    logits = logits[..., : len(task.labels)] if task.labels else logits
    labels = task.labels or tuple(map(str, range(logits.shape[-1])))
    probabilities = probabilities_of(task, logits)
    if np.isnan(logits).any() or (probabilities is not None and np.isnan(probabilities).any()):
        what = "NaN" if np.isnan(logits).any() else "infinite"
        raise EngineRunError(
            f"row {row} of task {task.name!r}: its {logits_name} are {what}",
            expected="numbers, because the largest of these would look like a decision",
            fix="Check the row's inputs for NaN; if there is none, export with --dtype fp32",
        )
    return Answer(
        task, outputs, logits, probabilities, _decided(probabilities, logits, labels, task)
    )


def probabilities_of(task: Task, logits: Array) -> Array | None:
    """Return the probabilities of ``logits`` ``[..., L]``, at least float32."""
    wide = logits.astype(np.promote_types(logits.dtype, np.float32))
    if task.kind == SINGLE_LABEL:
        with np.errstate(invalid="ignore"):  # infinity less infinity: answer_of refuses it
            powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        softmax: Array = powers / powers.sum(axis=-1, keepdims=True)
        return softmax
    if task.kind == MULTI_LABEL:
        # tanh does not overflow, exp(-x) does.
        sigmoid: Array = 0.5 * (1.0 + np.tanh(0.5 * wide))
        return sigmoid
    return None


def _decided(
    probabilities: Array | None, logits: Array, labels: tuple[str, ...], task: Task
) -> Decision:
    if logits.ndim > 1:
        likely = [None] * len(logits) if probabilities is None else probabilities
        # [S, L]: a list, one choice for each token.
        return [_choice(p, row, labels, task) for p, row in zip(likely, logits, strict=True)]
    return _choice(probabilities, logits, labels, task)


def _choice(
    probabilities: Array | None, logits: Array, labels: tuple[str, ...], task: Task
) -> Choice:
    if probabilities is None:
        numbers = tuple(float(value) for value in logits)
        return numbers[0] if len(numbers) == 1 else numbers
    if task.kind == MULTI_LABEL:
        chosen = zip(labels, probabilities, strict=True)
        return tuple(label for label, probability in chosen if probability >= 0.5)
    return labels[int(probabilities.argmax())]
