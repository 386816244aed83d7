"""How good answers are, given the right ones: one number a task, larger is better.

accuracy   share of rows whose largest logit is the label's
f1         of every label, averaged without weights (macro), as scikit-learn defines it
auc        area under the ROC curve: the chance that a row of the label scores higher than
           one without it, ties half; averaged over labels where there are more than two
           (one against the rest, macro)
ndcg       of every query's ranking, averaged: gain 2^relevance - 1, discount log2(rank + 1)
           (Järvelin and Kekäläinen 2002, with Burges et al. 2005's gain)
spearman   correlation of ranks, ties share their mean rank

N rows, L logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.checkpoint import TaskKind
from mtl_export.checkpoint.tensors import Array


@dataclass(frozen=True)
class Answers:
    """What a model answered, beside what is right.

    Attributes:
        logits: float64 ``[N, L]``.
        labels: int64 ``[N]``, the index of the right label; float64 ``[N]`` for regression
            and for the relevance of ``ndcg``; bool ``[N, L]`` for multi-label tasks.
        queries: int64 ``[N]``: rows of one number are ranked against each other; None where
            all rows are one query.
    """

    logits: Array
    labels: Array
    queries: Array | None = None

    def rows(self, places: Array) -> Answers:
        """Return the rows at ``places``; a row may be taken twice."""
        queries = None if self.queries is None else self.queries[places]
        return Answers(self.logits[places], self.labels[places], queries)


Score = Callable[[Answers], float]


def accuracy(answers: Answers) -> float:
    """Return the share of right decisions; of multi-label rows, that of right signs."""
    if answers.labels.ndim == 2:
        return float(((answers.logits > 0) == answers.labels).mean())
    return float((answers.logits.argmax(axis=1) == answers.labels).mean())


def f1(answers: Answers) -> float:
    """Return the mean F1 of the labels that occur in the decisions or in the truth."""
    width = answers.logits.shape[1]
    if answers.labels.ndim == 2:
        found, right = answers.logits > 0, answers.labels
    else:
        found = answers.logits.argmax(axis=1)[:, None] == np.arange(width)
        right = answers.labels[:, None] == np.arange(width)
    hits = (found & right).sum(axis=0)
    seen = found.sum(axis=0) + right.sum(axis=0)
    occurs = seen > 0
    return float((2 * hits[occurs] / seen[occurs]).mean()) if occurs.any() else 0.0


def auc(answers: Answers) -> float:
    """Return the area under the ROC curve; NaN where a label is on all rows or on none."""
    logits, labels = answers.logits, answers.labels
    width = logits.shape[1]
    if labels.ndim == 2:
        return float(np.mean([_area(logits[:, n], labels[:, n]) for n in range(width)]))
    if width == 1:
        return _area(logits[:, 0], labels > 0)
    shifted = logits - logits.max(axis=1, keepdims=True)
    shares = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    if width == 2:
        # The difference ranks as the share does, and never rounds to 1.
        return _area(logits[:, 1] - logits[:, 0], labels == 1)
    return float(np.mean([_area(shares[:, n], labels == n) for n in range(width)]))


def ndcg(answers: Answers) -> float:
    """Return the mean over queries; one without any relevant row does not count.

    A row's score is its only logit, or the last one's lead over the first.
    """
    logits = answers.logits
    scores = logits[:, 0] if logits.shape[1] == 1 else logits[:, -1] - logits[:, 0]
    queries = np.zeros(len(scores), np.int64) if answers.queries is None else answers.queries
    gains = 2.0 ** answers.labels.astype(np.float64) - 1
    found = []
    for query in np.unique(queries):
        own = queries == query
        best = _discounted(np.sort(gains[own])[::-1])
        if best > 0:
            # Ties in the order that is worst for the model: it did not tell them apart.
            order = np.lexsort((gains[own], -scores[own]))
            found.append(_discounted(gains[own][order]) / best)
    return float(np.mean(found)) if found else float("nan")


def spearman(answers: Answers) -> float:
    """Return the rank correlation of the only logit with the truth; NaN if one is constant."""
    found, right = ranks(answers.logits[:, 0]), ranks(answers.labels.astype(np.float64))
    found, right = found - found.mean(), right - right.mean()
    size = np.sqrt((found**2).sum() * (right**2).sum())
    return float((found * right).sum() / size) if size > 0 else float("nan")


SCORES: Mapping[str, Score] = MappingProxyType(
    {"accuracy": accuracy, "f1": f1, "auc": auc, "ndcg": ndcg, "spearman": spearman}
)


def usual_score(kind: TaskKind) -> str:
    """Return the score a task of ``kind`` is judged by where nothing else is asked for."""
    return {"regression": "spearman", "multi_label_classification": "f1"}.get(kind, "accuracy")


def ranks(values: Array) -> Array:
    """Return the rank of each value from 1, float64 ``[N]``; ties share their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    group = np.cumsum(first) - 1
    ends = np.append(np.flatnonzero(first)[1:], len(values))
    begins = np.flatnonzero(first)
    found = np.empty(len(values))
    found[order] = ((begins + 1 + ends) / 2)[group]
    return found


def _area(scores: Array, positive: Array) -> float:
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return float("nan")
    return float((ranks(scores)[positive].sum() - count * (count + 1) / 2) / (count * others))


def _discounted(gains: Array) -> float:
    return float((gains / np.log2(np.arange(len(gains)) + 2)).sum())
