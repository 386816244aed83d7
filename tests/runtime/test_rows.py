"""Rows of any inputs: what is padded, what is refused, what of an output is a row's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mtl_export.errors import UsageError
from mtl_export.runtime import TaskSession
from mtl_export.runtime.rows import Field, RowBatch, own_part, rows_from

BATCH = "batch"
IMAGES = (Field("pixel_values", (BATCH, 3, 16, 16), "float32"),)
ANY_IMAGES = (Field("pixel_values", (BATCH, 3, "height", "width"), "float32"),)
REGIONS = (
    Field("input_ids", (BATCH, "sequence"), "int64"),
    Field("attention_mask", (BATCH, "sequence"), "int64"),
    Field("vis_feats", (BATCH, "regions", 7), "float32"),
    Field("boxes", (BATCH, "regions", 4), "float32"),
    Field("vis_attention_mask", (BATCH, "regions"), "int64"),
)


def rows(fields: tuple[Field, ...], inputs: dict[str, Any], **options: Any) -> RowBatch:
    """Read ``inputs`` for a graph with ``fields``."""
    return rows_from(inputs, fields, pad_token_id=1, where="graph", **options)


def image(*shape: int) -> np.ndarray:
    """Return an image of that shape."""
    return np.ones(shape, np.float32)


def seen(regions: int, tokens: int) -> dict[str, Any]:
    """Return one row that reads regions of an image beside text."""
    return {
        "input_ids": np.full(tokens, 5),
        "vis_feats": np.ones((regions, 7)),
        "boxes": np.ones((regions, 4)),
        "vis_attention_mask": np.ones(regions, np.int64),
    }


def together(*single: dict[str, Any]) -> dict[str, Any]:
    """Return rows as inputs by name."""
    return {name: [row[name] for row in single] for name in single[0]}


@pytest.mark.parametrize("shape", [(3, 8, 12), (1, 16, 16), (3, 16, 17)])
def test_an_image_has_the_graphs_size(shape: tuple[int, ...]) -> None:
    """It is not padded with black, nor with channels, beside others or alone."""
    for number, images in ((1, [image(3, 16, 16), image(*shape)]), (0, [image(*shape)])):
        with pytest.raises(UsageError) as caught:
            rows(IMAGES, {"pixel_values": images})
        assert (
            f"row {number} of pixel_values is float32 {list(shape)}, not float32 [3, 16, 16]"
            in caught.value.problem
        )


def test_images_of_any_size_are_of_one_size() -> None:
    """No mask would tell the model what was added."""
    assert rows(ANY_IMAGES, {"pixel_values": [image(3, 8, 12)] * 2}).count == 2
    with pytest.raises(UsageError, match=r"row 1 of pixel_values is \[3, 8, 12\], and row 0 is"):
        rows(ANY_IMAGES, {"pixel_values": [image(3, 16, 12), image(3, 8, 12)]})


def test_dimensions_of_one_name_agree_within_a_row() -> None:
    """Boxes have features and a mask each, and four numbers."""
    good = rows(REGIONS, together(seen(5, 3), seen(2, 4)))
    assert good.sizes == ({"sequence": 3, "regions": 5}, {"sequence": 4, "regions": 2})
    assert good.batch([0, 1])["vis_attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    few = seen(5, 3) | {"vis_feats": np.ones((3, 7))}
    with pytest.raises(UsageError, match=r"row 1 has regions 3 in vis_feats, 5 in boxes, 5 in"):
        rows(REGIONS, together(seen(5, 3), few))
    narrow = seen(5, 3) | {"boxes": np.ones((5, 3))}
    with pytest.raises(UsageError, match=r"row 1 of boxes is float32 \[5, 3\], not .* 4\]"):
        rows(REGIONS, together(seen(5, 3), narrow))


@pytest.mark.parametrize(
    ("placed_by", "refused"), [("", True), ("input_ids", False), ("attention_mask", False)]
)
def test_padding_counts_where_it_takes_positions(placed_by: str, refused: bool) -> None:
    """BERT's places are all numbered, RoBERTa's tokens and language models' masks alone."""
    padded = {"input_ids": [[5, 5, 5, 1, 1]], "attention_mask": [[1, 1, 1, 0, 0]]}
    text = REGIONS[:2]
    if refused:
        with pytest.raises(UsageError, match=r"3 tokens and 2 of padding, .* at most 4"):
            rows(text, padded, longest=4, placed_by=placed_by)
    else:
        assert rows(text, padded, longest=4, placed_by=placed_by).count == 1
    with pytest.raises(UsageError, match=r"row 0 has 3 tokens, .* at most 2"):
        rows(text, {"input_ids": [[5, 5, 5]]}, longest=2, placed_by=placed_by)


def test_a_rows_own_part_has_no_padding() -> None:
    """Cut by the row's sizes, or by the mask of what was put together from several."""
    value = np.arange(5)
    sizes = {"sequence": 2, "regions": 1}
    own = own_part(value, Field("logits", (BATCH, "sequence"), "float32"), sizes, {})
    assert own.tolist() == [0, 1]
    both = Field("states", (BATCH, "regions + sequence"), "float32")
    counted = {"regions + sequence": np.array([1, 1, 0, 1, 0])}
    assert own_part(value, both, sizes, counted).tolist() == [0, 1, 3]
    wide = Field("states", (BATCH, "regions + sequence", 2), "float32")
    assert own_part(np.ones((5, 2)), wide, sizes, counted).shape == (3, 2)


STATES = """
<ir_version: 10, opset_import: ["" : 20]>
toy (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask,
     int64[batch, regions] vis_attention_mask)
    => (int64[batch, both] last_hidden_state, int64[batch, both] encoder_attention_mask)
{
    last_hidden_state = Concat <axis = 1> (input_ids, vis_attention_mask)
    encoder_attention_mask = Concat <axis = 1> (attention_mask, vis_attention_mask)
}
"""


def test_states_of_text_and_regions_are_cut_by_their_mask(tmp_path: Path) -> None:
    """Padding lies between the two, so that no length would cut it."""
    model = onnx.parser.parse_model(STATES)
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "regions + sequence"
    tasks = [{"name": "vqa", "index": 0, "labels": [], "kind": "headless"}]
    onnx.helper.set_model_props(model, {"mtl_export.tasks": json.dumps(tasks)})
    onnx.save(model, tmp_path / "model.onnx")
    inputs = {"input_ids": [[7, 8, 9], [5]], "vis_attention_mask": [[1], [1, 1]]}
    answers = TaskSession(tmp_path, threads=1).run(inputs).answers
    assert [answer.outputs["last_hidden_state"].tolist() for answer in answers] == [
        [7, 8, 9, 1], [5, 1, 1]
    ]  # fmt: skip
    assert answers[1].outputs["encoder_attention_mask"].tolist() == [1, 1, 1]
