"""Which outputs of a model are compared, and which of their numbers count.

    a model with a head         logits, and pred_boxes and the like beside them
    a bare encoder              everything it returns: last_hidden_state, pooler_output
    with pooling in the graph   sentence_embedding, pooled here from the oracle's hidden states
    heads of several kinds      every output, for the tasks whose answer it is

B rows, S tokens, H features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint import sentence_embedding
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.model_outputs import answers_among
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import ParityError
from mtl_export.names import ATTENTION_MASK, LOGITS
from mtl_export.parity.cases import Case
from mtl_export.runtime.runners.language import NEW_TOKENS

# Of every row with every other one of the batch: rows of another batch have other columns.
ACROSS_ROWS = "logits_per_"


@dataclass(frozen=True, slots=True)
class Subject:
    """One output that is compared.

    Attributes:
        output: Its name.
        embedding: How it is pooled from the hidden states; None for an output of the model.
        tasks: Names of the tasks whose answer it is; empty where it is every task's.
        has_labels: Whether its columns are these tasks' labels.
    """

    output: str
    embedding: SentenceEmbedding | None = None
    tasks: frozenset[str] = frozenset()
    has_labels: bool = False

    @property
    def decides(self) -> bool:
        """Return whether decisions are read off it: its columns are labels or tokens."""
        return self.has_labels or self.output == LOGITS

    @property
    def is_across_rows(self) -> bool:
        """Return whether it has a column for each row of the batch."""
        return self.output.startswith(ACROSS_ROWS)

    def columns(self, task: Task, rows: int) -> int | None:
        """Return how many columns answer for ``task`` in a batch of its ``rows``; None: all."""
        return rows if self.is_across_rows else (self.decides and len(task.labels)) or None

    @property
    def merged_output(self) -> str:
        """Return what a merged model of one of its tasks calls it."""
        return LOGITS if self.has_labels else self.output

    def serves(self, task: Task) -> bool:
        """Return whether it is the task's answer."""
        return not self.tasks or task.name in self.tasks

    def of(self, outputs: Mapping[str, Array], case: Case) -> Array:
        """Return its values, given the outputs of the oracle for ``case``.

        Raises:
            ParityError: The oracle has no hidden states to pool.
        """
        if self.embedding is None:
            return outputs[self.output]
        hidden = outputs.get(sentence_embedding.HIDDEN_STATES)
        if hidden is None:
            raise ParityError(
                f"oracle: outputs {', '.join(outputs)}",
                expected=(
                    f"{sentence_embedding.HIDDEN_STATES}, because the graph pools it to one vector "
                    "a row"
                ),
                fix="Export this model without --pooling",
            )
        with np.errstate(invalid="ignore"):  # rows of tasks that have none are -inf
            return embedded(hidden, case.inputs.get(ATTENTION_MASK), self.embedding)


def subjects(
    outputs: Mapping[str, Array],
    embedding: SentenceEmbedding | None,
    tasks: Sequence[Task] = (),
) -> list[Subject]:
    """Return what is compared of an artefact, given the oracle's outputs.

    Args:
        outputs: Of the oracle.
        embedding: How the artefact pools hidden states, None if it does not.
        tasks: All tasks of the checkpoint.
    """
    by_output = {task.output: [t for t in tasks if t.output == task.output] for task in tasks}
    if embedding is not None:
        own = by_output.get(sentence_embedding.HIDDEN_STATES, ())
        return [Subject(sentence_embedding.OUTPUT, embedding, frozenset(t.name for t in own))]
    if by_output.keys() - {""}:
        return [
            Subject(
                name,
                tasks=frozenset(task.name for task in by_output[name]),
                has_labels=any(task.labels for task in by_output[name]),
            )
            for name in outputs
        ]
    return [Subject(name) for name in answers_among(outputs)]


def embedded(hidden: Array, mask: Array | None, embedding: SentenceEmbedding) -> Array:
    """Return one vector a row, ``[B, H]``, of hidden states ``[B, S, H]``."""
    weights = np.ones(hidden.shape[:2]) if mask is None else mask.astype(np.float64)
    if embedding.pooling == "cls":
        vectors: Array = hidden[:, 0]
    else:
        vectors = (hidden * weights[..., None]).sum(axis=1) / weights.sum(axis=1, keepdims=True)
    if embedding.normalize:
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


def answers(case: Case, rows: Array, values: Array) -> Array:
    """Return the numbers that count, ``[N, L]``: of the rows ``[B]``, and no padding token's.

    Of maps ``[B, L, H, W]`` every place counts; numbers ``[B]`` are one column.
    """
    if values.ndim <= 2:
        return values[rows] if values.ndim == 2 else values[rows][:, None]
    if values.ndim > 3:
        return np.moveaxis(values[rows], 1, -1).reshape(-1, values.shape[1])
    mask = None if NEW_TOKENS in case.inputs else case.inputs.get(ATTENTION_MASK)
    is_text = mask is not None and mask.shape == values.shape[:2]
    counts = mask == 1 if is_text else np.ones(values.shape[:2], np.bool_)
    counting: Array = values[counts & rows[:, None]]
    return counting


def largest_error(case: Case, wanted: Array, found: Array | None) -> float:
    """Return how far ``found`` is from ``wanted`` where they count.

    Inf where shapes differ, or which of the numbers are finite.
    """
    if found is None or found.shape != wanted.shape:
        return float("inf")
    rows = np.ones(len(wanted), np.bool_)
    left, right = answers(case, rows, wanted), answers(case, rows, found.astype(np.float64))
    finite = np.isfinite(left)
    if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
        return float("inf")
    error = np.abs(right[finite] - left[finite])
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))
