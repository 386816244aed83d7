from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError, UsageError
from mtl_export.runtime.generation import Decoding, GreedyDecoder, left_padded, next_tokens

VOCABULARY = 10


class Counter:
    """Two graphs in which every row says its last token plus its task plus one, modulo ten.

    The cache is a list of what was fed, which no array could be taken for.
    """

    def __init__(self) -> None:
        self.masks: list[Array] = []

    def prefill(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
        """Read prompts."""
        return self._answer(inputs, [inputs["input_ids"]])

    def decode(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
        """Go on by one token."""
        assert inputs["input_ids"].shape[1] == 1
        past = inputs["past_key_values.0.key"]
        seen = sum(part.shape[1] for part in past)
        assert inputs["attention_mask"].shape[1] == seen + 1
        return self._answer(inputs, [*past, inputs["input_ids"]])

    def _answer(self, inputs: Mapping[str, Any], cache: list[Array]) -> dict[str, Any]:
        self.masks.append(inputs["attention_mask"])
        ids = inputs["input_ids"]
        tasks = inputs.get("task_ids", np.zeros(len(ids), np.int64))
        following = (ids + tasks[:, None] + 1) % VOCABULARY
        return {"logits": np.eye(VOCABULARY)[following], "present.0.key": cache}


def decoder(**options: Any) -> GreedyDecoder:
    """Return what decodes by a ``Counter``."""
    graphs = Counter()
    settings = {"eos_token_ids": (9,), "pad_token_id": 0, **options}
    return GreedyDecoder(graphs.prefill, graphs.decode, **settings)


def test_every_row_goes_on_under_its_own_task() -> None:
    """Tasks 0 and 1 count by one and by two from their prompts' last tokens."""
    ids = np.array([[5, 1], [3, 2]])
    tokens = decoder().generate(ids, task_ids=np.array([0, 1]), max_new_tokens=3)
    assert tokens.tolist() == [[2, 3, 4], [4, 6, 8]]


def test_rows_end_on_their_own_and_are_padded() -> None:
    """A row keeps the token that ended it; the batch ends with its last row."""
    ids = np.array([[6], [7], [4]])
    tokens = decoder(eos_token_ids=(9, 6)).generate(ids, max_new_tokens=20)
    assert tokens.tolist() == [[7, 8, 9], [8, 9, 0], [5, 6, 0]]


def test_without_an_end_the_length_is_the_one_asked_for() -> None:
    """No token ends a row where none is named."""
    tokens = decoder(eos_token_ids=()).generate(np.array([[8]]), max_new_tokens=4)
    assert tokens.tolist() == [[9, 0, 1, 2]]


def test_padding_may_be_on_either_side() -> None:
    """Rows are moved to the left of their padding's place before anything runs."""
    graphs = Counter()
    ids, mask = np.array([[1, 2, 0, 0], [0, 3, 4, 5]]), np.array([[1, 1, 0, 0], [0, 1, 1, 1]])
    decoding = Decoding(graphs.prefill, graphs.decode, ids, mask, None)
    assert decoding.logits.argmax(axis=1).tolist() == [3, 6]
    decoding.feed(np.array([7, 7]))
    assert graphs.masks[0].tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert graphs.masks[1].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_tokens_keep_their_order_when_moved() -> None:
    """Holes close and nothing else changes."""
    ids, mask = left_padded(np.array([[1, 9, 2, 3, 9]]), np.array([[1, 0, 1, 1, 0]]))
    assert ids.tolist() == [[9, 9, 1, 2, 3]]
    assert mask.tolist() == [[0, 0, 1, 1, 1]]


def test_rows_of_nan_are_refused() -> None:
    """NaN has a largest element by numpy's rules, which would look like a token."""
    with pytest.raises(EngineRunError) as caught:
        next_tokens(np.array([[0.0, 1.0], [np.nan, np.nan]]))
    assert caught.value.problem.startswith("rows [1]")
    assert "task_ids" in caught.value.fix


@pytest.mark.parametrize(
    ("mask", "new", "found"),
    [
        ([[1, 1], [0, 0]], 1, "row 1 has no token"),
        (np.zeros((0, 2)), 1, "none"),
        ([[1, 1], [0, 1]], 0, "0"),
        ([[0, 1], [1, 1]], 4, "2 prompt tokens and 4 new ones"),
    ],
)
def test_lengths_that_cannot_be(mask: Any, new: int, found: str) -> None:
    """Empty prompts, no new tokens, and more than the model has positions for."""
    mask = np.array(mask, np.int64)
    with pytest.raises(UsageError) as caught:
        decoder(max_length=5).generate(np.ones_like(mask), mask, max_new_tokens=new)
    assert caught.value.problem.endswith(found)


@pytest.mark.parametrize("count", [0, -1, 2.5, 2.0, True, "3", None])
def test_only_a_whole_number_of_tokens_can_be_asked_for(count: Any) -> None:
    """2.5 tokens are never reached: decoding would not end."""
    with pytest.raises(UsageError, match="Expected a whole number, 1 or more") as caught:
        decoder(eos_token_ids=()).generate(np.array([[1]]), max_new_tokens=count)
    assert caught.value.problem.startswith("max_new_tokens")


def test_numbers_of_numpy_are_whole_numbers_too() -> None:
    """Also from an array."""
    for count in (np.int32(2), np.array(2)):
        tokens = decoder().generate(np.array([[1]]), max_new_tokens=count)  # type: ignore[arg-type]
        assert tokens.tolist() == [[2, 3]]


def test_the_longest_that_fits_is_no_error() -> None:
    """As many tokens as the model has positions."""
    tokens = decoder(max_length=5).generate(np.array([[1, 1]]), max_new_tokens=3)
    assert tokens.shape == (1, 3)
