"""What a model takes, told from its ``config.json``: text of what length, images of what size.

transformers itself is not imported.

>>> image_shape({"image_size": 224, "patch_size": 16})
(3, 224, 224)
>>> longest_sequence({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
512
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_export.checkpoint.files.json_file import Shape, shown
from mtl_export.errors import BaseModelError

PIXEL_VALUES = "pixel_values"
# Model types that number positions from pad_token_id + 1 on. Found by searching transformers
# 5.23 (src/transformers/models) for create_position_ids_from_input_ids.
OFFSET_POSITIONS = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
# Model types that look positions up in a table as long as the config says, of transformers 5.23:
# a row with more tokens cannot be computed. All others may run on, as those that rotate do.
TABLE_POSITIONS = OFFSET_POSITIONS - {"esm"} | {
    "albert", "bart", "bert", "blenderbot", "distilbert", "electra", "gpt2", "gpt_neo", "layoutlm",
    "mbart", "mobilebert", "opt",
}  # fmt: skip
# What is read of a ``config.json``, here and elsewhere; all of it may be absent.
_TEXT: Shape = {
    "model_type?": str,
    "architectures?": [str],
    "num_channels?": int,
    "vocab_size?": int,
    "type_vocab_size?": int,
    "max_position_embeddings?": int,
    "n_positions?": int,
    "pad_token_id?": int,
    "is_encoder_decoder?": bool,
    "tie_word_embeddings?": bool,
}
CONFIG: Shape = {**_TEXT, "text_config?": _TEXT}
# Of one side; images are made to trace and compare models.
MOST_PIXELS = 2**14
# Beyond any length a user would ask of a model that does not name its own.
NO_LIMIT = 2**15


def image_shape(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images a model takes; None if it takes none."""
    size = config.get("image_size")
    if size is None or config.get("vocab_size") is not None:
        return None
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MOST_PIXELS for side in sides):
        raise BaseModelError(
            f"config.json: image_size: {shown(size)}",
            expected=f"height and width, 1 to {MOST_PIXELS}",
            fix="Correct it to what the model was trained on",
        )
    return int(config.get("num_channels") or 3), *sides


def has_position_table(config: Mapping[str, Any]) -> bool:
    """Return whether the model is known to end at the positions of its config."""
    return config.get("model_type") in TABLE_POSITIONS


def placed_by(config: Mapping[str, Any]) -> str:
    """Return the input that positions are counted from, so that its padding takes none.

    "" where every place of a row has its position, padding too.
    """
    model_type = config.get("model_type")
    if model_type == "opt":
        return "attention_mask"
    return "input_ids" if model_type in OFFSET_POSITIONS else ""


def longest_sequence(config: Mapping[str, Any], unlimited: int = NO_LIMIT) -> int:
    """Return how many tokens a model takes; ``unlimited`` if its config does not say."""
    positions = int(config.get("max_position_embeddings") or 0)
    if not positions and "relative_attention_num_buckets" not in config:
        # GPT-2's word for it; a T5 may say it too, and has no table of positions.
        positions = int(config.get("n_positions") or 0)
    if not positions:
        return unlimited
    if config.get("model_type") in OFFSET_POSITIONS:
        positions -= int(config.get("pad_token_id") or 0) + 1
    return positions
