"""What a user may give a model: filled in where it may be left out, refused where nothing runs."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.data.model_arrays import model_arrays
from mtl_export.errors import CalibrationError

BERT = {
    "model_type": "bert", "vocab_size": 50, "type_vocab_size": 2, "max_position_embeddings": 8,
}  # fmt: skip
IDS = np.arange(12).reshape(2, 6)
GOOD: dict[str, Array] = {"input_ids": IDS, "task_ids": np.arange(2)}


def test_what_is_left_out_is_filled_in_once() -> None:
    """Nothing is padding, all is of the first type; models without types get none."""
    found = model_arrays(GOOD, BERT, "x.npz")
    assert set(found) == {"input_ids", "attention_mask", "token_type_ids", "task_ids"}
    np.testing.assert_array_equal(found["attention_mask"], np.ones((2, 6)))
    np.testing.assert_array_equal(found["token_type_ids"], np.zeros((2, 6)))
    types = {"token_type_ids": IDS % 2}
    assert (
        model_arrays({**GOOD, **types}, BERT, "x.npz")["token_type_ids"] is types["token_type_ids"]
    )
    assert set(model_arrays(GOOD, {"vocab_size": 50}, "x.npz")) == {*GOOD, "attention_mask"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_ids": IDS + 40}, "input_ids 40 to 51, of a model with 50"),
        ({"input_ids": IDS - 1}, "input_ids -1 to 10, of a model with 50"),
        ({"token_type_ids": IDS}, "token_type_ids 0 to 11, of a model with 2"),
        ({"input_ids": np.ones((2, 9), np.int64)}, "9 tokens, of a model with 8 positions"),
        ({"input_ids": np.ones((2, 0), np.int64)}, "row 1 has no token"),
        ({"attention_mask": np.array([[1] * 6, [0] * 6])}, "row 2 has no token"),
        ({"attention_mask": np.ones((2, 5), np.int64)}, "attention_mask int64 [2, 5]"),
        ({"input_ids": IDS.astype(str)}, "input_ids <U21 [2, 6]"),
        ({"input_ids": IDS.astype(np.float32)}, "input_ids float32 [2, 6]"),
        ({"input_ids": np.arange(2)}, "input_ids int64 [2]"),
    ],
)
def test_what_no_runtime_can_compute_is_refused(changes: dict[str, Array], reason: str) -> None:
    """Where, and what was found: no traceback, and no graph is blamed."""
    with pytest.raises(CalibrationError) as caught:
        model_arrays({**GOOD, **changes}, BERT, "--inputs x.npz")
    assert reason in caught.value.problem
    assert caught.value.problem.startswith("--inputs x.npz")


def test_rows_that_can_be_computed_pass() -> None:
    """Padding behind the last token takes no position, nor do models without a table end."""
    wide = np.ones((2, 9), np.int64)
    mask = (np.arange(9) < 8).astype(np.int64) * wide
    model_arrays({"input_ids": wide, "attention_mask": mask}, BERT, "x")
    model_arrays({"input_ids": wide}, {**BERT, "model_type": "llama"}, "x")
    roberta = {**BERT, "model_type": "roberta", "max_position_embeddings": 10, "pad_token_id": 1}
    left = np.concatenate([wide[:, :4], wide + 1], axis=1)[:, :12]
    model_arrays({"input_ids": left, "attention_mask": (left != 1).astype(np.int64)}, roberta, "x")
    images = {"pixel_values": np.zeros((2, 3, 4, 4)), "task_ids": np.arange(2)}
    assert set(model_arrays(images, {"image_size": 4}, "x")) == set(images)
