from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.runtime.answers import answer_of

SINGLE = Task("single", 0, ("a", "b", "c"), "single_label_classification")
MULTI = Task("multi", 1, ("a", "b", "c"), "multi_label_classification")
SCORE = Task("score", 2, ("score",), "regression")
PAIR = Task("pair", 3, ("x", "y"), "regression")
BARE = Task("bare", 4)
WIDE = np.array([1.0, -2.0, 0.5, -np.inf], np.float32)


def test_single_label_is_a_softmax_over_its_own_labels() -> None:
    """The columns of wider tasks take no part."""
    answer = answer_of(SINGLE, {"logits": WIDE})
    powers = np.exp([1.0, -2.0, 0.5])
    np.testing.assert_allclose(np.asarray(answer.probabilities), powers / powers.sum(), rtol=1e-6)
    assert answer.decision == "a"
    assert answer.labels == ("a", "b", "c")


def test_multi_label_takes_each_label_of_one_half_or_more() -> None:
    """Probabilities are sigmoids; any number of labels may be chosen."""
    answer = answer_of(MULTI, {"logits": WIDE})
    expected = 1 / (1 + np.exp([-1.0, 2.0, -0.5]))
    np.testing.assert_allclose(np.asarray(answer.probabilities), expected, rtol=1e-6)
    assert answer.decision == ("a", "c")
    nothing = answer_of(MULTI, {"logits": np.array([-1e4, -3, -1], np.float32)})
    assert nothing.decision == ()
    assert np.isfinite(np.asarray(nothing.probabilities)).all()


def test_regression_is_its_numbers() -> None:
    """One number, or all of them; no probabilities."""
    answer = answer_of(SCORE, {"logits": WIDE})
    assert answer.decision == 1.0
    assert answer.probabilities is None
    assert answer_of(PAIR, {"logits": WIDE}).decision == (1.0, -2.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_token_may_have_its_own_label(dtype: type) -> None:
    """[S, L] gives a list of S decisions, in float32 whatever the graph's dtype."""
    logits: Array = np.array([[1, 2, 3, 9], [5, 4, 3, 9]]).astype(dtype)
    answer = answer_of(SINGLE, {"logits": logits})
    assert answer.decision == ["c", "a"]
    assert np.asarray(answer.probabilities).dtype == np.float32
    assert answer_of(SCORE, {"logits": logits}).decision == [1.0, 5.0]
    assert answer_of(MULTI, {"logits": -logits}).decision == [(), ()]


def test_headless_tasks_hand_on_the_outputs() -> None:
    """A language model's logits are no labels; other outputs are there by name."""
    answer = answer_of(BARE, {"logits": WIDE, "pooled": WIDE[:2]})
    assert answer.decision is None
    np.testing.assert_array_equal(np.asarray(answer.logits), WIDE)
    assert list(answer.outputs) == ["logits", "pooled"]
    assert answer_of(BARE, {"pooled": WIDE}).logits is None


def test_labels_without_names_are_numbers() -> None:
    """A task whose labels nobody named still decides."""
    nameless = Task("nameless", 0, (), "single_label_classification")
    assert answer_of(nameless, {"logits": WIDE[:3]}).decision == "0"


@pytest.mark.parametrize("task", [SINGLE, MULTI, SCORE, PAIR])
def test_nan_is_no_answer(task: Task) -> None:
    """Neither the first label, nor no label, nor a number; row and task are named."""
    logits = np.array([1.0, np.nan, 2.0, np.nan], np.float32)
    logits = logits[::-1].copy() if task is SCORE else logits
    for value in (logits, np.stack([WIDE, logits])):
        with pytest.raises(EngineRunError, match=f"row 3 of task '{task.name}': its logits are"):
            answer_of(task, {"logits": value}, row=3)


def test_labels_that_others_lack_may_be_nan() -> None:
    """Only the task's own columns are its answer."""
    logits = np.array([1.0, -2.0, 0.5, np.nan], np.float32)
    assert answer_of(SINGLE, {"logits": logits}).decision == "a"
    assert answer_of(SCORE, {"logits": logits}).decision == 1.0


def test_an_overflow_is_no_answer() -> None:
    """The softmax of infinity is NaN; its sigmoid is a probability."""
    logits = np.array([np.inf, 1.0, 0.0], np.float32)
    with pytest.raises(EngineRunError, match="its logits are infinite"):
        answer_of(SINGLE, {"logits": logits})
    assert answer_of(MULTI, {"logits": logits}).decision == ("a", "b", "c")
