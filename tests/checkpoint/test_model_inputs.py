from __future__ import annotations

from typing import Any

import pytest

from mtl_export.checkpoint.model_inputs import (
    NO_LIMIT,
    TABLE_POSITIONS,
    has_position_table,
    image_shape,
    longest_sequence,
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"image_size": 32}, (3, 32, 32)),
        ({"image_size": [32, 48], "num_channels": 1}, (1, 32, 48)),
        ({"image_size": 32, "vocab_size": 99}, None),
        ({"vocab_size": 99}, None),
    ],
)
def test_images_have_one_size(config: dict[str, Any], shape: tuple[int, int, int] | None) -> None:
    """Channels, height and width; a model that also reads text is none of these."""
    assert image_shape(config) == shape


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "t5"}, NO_LIMIT),
        ({"n_positions": 512, "relative_attention_num_buckets": 32}, NO_LIMIT),
    ],
)
def test_positions_may_begin_behind_the_padding(config: dict[str, Any], longest: int) -> None:
    """RoBERTa's positions begin after its padding token."""
    assert longest_sequence(config) == longest
    assert longest_sequence({}, unlimited=7) == 7


def test_only_tables_of_positions_end() -> None:
    """What rotates or counts distances runs on; the names are transformers' own."""
    from transformers import CONFIG_MAPPING

    assert set(CONFIG_MAPPING.keys()) >= TABLE_POSITIONS
    assert has_position_table({"model_type": "roberta"})
    for name in ("llama", "modernbert", "deberta-v2", "t5", "esm"):
        assert not has_position_table({"model_type": name})
