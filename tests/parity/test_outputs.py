from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.errors import ParityError
from mtl_export.parity.cases import Case
from mtl_export.parity.outputs import Subject, answers, embedded, subjects

CASE = Case("two rows", {"attention_mask": np.array([[1, 1, 0], [1, 1, 1]])})
HIDDEN = np.arange(24.0).reshape(2, 3, 4) + 1


def test_a_head_speaks_for_the_model() -> None:
    """With logits nothing else counts; without, every output does; pooled, the vector does."""
    outputs = {"logits": HIDDEN, "encoder_last_hidden_state": HIDDEN}
    assert subjects(outputs, None) == [Subject("logits")]
    bare = {"last_hidden_state": HIDDEN, "pooler_output": HIDDEN[:, 0]}
    assert [subject.output for subject in subjects(bare, None)] == list(bare)
    mean = SentenceEmbedding("mean")
    (pooled,) = subjects(bare, mean)
    assert pooled == Subject("sentence_embedding", mean)
    np.testing.assert_allclose(pooled.of(bare, CASE), [HIDDEN[0, :2].mean(0), HIDDEN[1].mean(0)])
    assert not pooled.decides


def test_only_hidden_states_are_pooled() -> None:
    """A head's logits are no states of tokens."""
    with pytest.raises(ParityError, match="--pooling"):
        Subject("sentence_embedding", SentenceEmbedding("cls")).of({"logits": HIDDEN}, CASE)


def test_vectors_have_length_1_where_asked() -> None:
    """Of the first token, without a mask."""
    found = embedded(HIDDEN, None, SentenceEmbedding("cls", normalize=True))
    np.testing.assert_allclose(found, HIDDEN[:, 0] / np.linalg.norm(HIDDEN[:, 0], axis=1)[:, None])


def test_padding_does_not_count() -> None:
    """Of rows with tokens, those that are not padding; of others, whole rows."""
    rows = np.array([True, False])
    np.testing.assert_array_equal(answers(CASE, rows, HIDDEN), HIDDEN[0, :2])
    np.testing.assert_array_equal(answers(CASE, rows, HIDDEN[:, 0]), HIDDEN[:1, 0])
