"""``config.json`` of a VL-BART, told from its tensors: the checkpoint has none.

Fields and defaults are the trainer's, whose command line is lost:
https://github.com/pUmpKin-Co/MTL-LoRA/blob/7848a70/image_text_understanding/VL-T5/src/param.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtl_export.errors import BaseModelError, CheckpointError, shortened

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array, Tensor

MODEL_CLASS = "VLBart"
SHARED = "model.shared.weight"
VISUAL = "model.encoder.visual_embedding"
# The positions table begins with two rows that no position uses.
POSITION_OFFSET = 2
SEEDED_REGIONS = 7
DOWNSAMPLE = "downsample"
# The trainer's --n_boxes, in its recipe and by default: of each image so many regions stay.
POOLED_REGIONS = 36
SEEDED_GRID = 7


def config_of(
    base: Mapping[str, Any], tensors: Mapping[str, Tensor], hyper: Mapping[str, float]
) -> dict[str, Any]:
    """Return the config of the VL-BART that has ``tensors``.

    Args:
        base: ``config.json`` of the BART it was trained from.
        tensors: By their names in the model class, without the tied copies.
        hyper: What no tensor tells: ``downsample``, 1 if features are pooled, else 0.

    Raises:
        CheckpointError: A tensor is missing, one too many, or of another shape than the others
            make necessary.
        BaseModelError: ``base`` is of another size or another architecture.
    """
    sizes = _sizes(tensors)
    wrong = [
        f"{name} {base.get(name)}, the checkpoint's is {value}"
        for name, value in {"model_type": "bart", **sizes}.items()
        if base.get(name) != value
    ]
    if wrong:
        raise BaseModelError(
            f"base config.json: {shortened(wrong)}",
            expected=(
                "the BART that the checkpoint was trained from, because number of heads, "
                "activation and special tokens are in no checkpoint"
            ),
            fix="Pass that BART to --base, e.g. facebook/bart-base",
        )
    _check_shapes(tensors, sizes)
    feature = tensors[f"{VISUAL}.feat_embedding.0.weight"]
    position = tensors[f"{VISUAL}.absolute_vis_pos_embedding.0.weight"]
    individual = f"{VISUAL}.feat_embedding.1.weight" in tensors
    return {
        **base,
        "architectures": [MODEL_CLASS],
        "tie_word_embeddings": True,
        "vocab_size": tensors[SHARED].shape[0],
        "feat_dim": feature.shape[1],
        # The box's area joins its corners.
        "pos_dim": position.shape[1] - 1,
        "n_images": tensors[f"{VISUAL}.img_order_embedding.weight"].shape[0],
        "individual_vis_layer_norm": individual,
        "use_vis_layer_norm": individual or f"{VISUAL}.layer_norm.weight" in tensors,
        "downsample": bool(hyper[DOWNSAMPLE]),
        "n_boxes": POOLED_REGIONS,
    }


def seeded_inputs(config: Mapping[str, Any], rows: int) -> dict[str, Array]:
    """Return features, boxes, image order, region order and mask of some regions a row.

    Features and boxes are float32 ``[rows, V, ...]``, the others int64 ``[rows, V]``: rows have
    between one region and all of them, of several images where the model knows several; where
    it pools them, between one image and all of them, each a whole grid.
    """
    # Here, because --help of commands that ask for a model's class must not wait for it.
    import numpy as np

    generator = np.random.default_rng(0)
    images, count = int(config["n_images"]), SEEDED_REGIONS
    orders = generator.integers(0, images, (rows, count))
    numbers = np.arange(count)
    counts = generator.integers(1, count + 1, (rows, 1))
    if config.get(DOWNSAMPLE):
        cells = SEEDED_GRID**2
        orders, numbers = np.arange(images).repeat(cells), np.tile(np.arange(cells), images)
        count, counts = images * cells, cells * generator.integers(1, images + 1, (rows, 1))
    shape = (rows, count)
    features = generator.normal(size=(*shape, int(config["feat_dim"])))
    boxes = generator.uniform(size=(*shape, int(config["pos_dim"])))
    return {
        "vis_feats": features.astype(np.float32),
        "boxes": boxes.astype(np.float32),
        "img_order_ids": np.array(np.broadcast_to(orders, shape)),
        "obj_order_ids": np.array(np.broadcast_to(numbers, shape)),
        "vis_attention_mask": (np.arange(count) < counts).astype(np.int64),
    }


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    needed = [
        SHARED,
        "final_logits_bias",
        *(f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")),
        *(f"model.{side}.layers.0.fc1.weight" for side in ("encoder", "decoder")),
        *(f"{VISUAL}.{part}.weight" for part in (
            "feat_embedding.0", "absolute_vis_pos_embedding.0", "img_order_embedding",
        )),
    ]  # fmt: skip
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{MODEL_CLASS}: no {shortened(missing)}",
            expected=(
                "the whole model, with an embedding for the order of images, because a VL-BART is "
                "read from its checkpoint alone"
            ),
            fix="Point --checkpoint at LAST.pth of a run with --use_vis_order_embedding True",
        )
    positions = tensors["model.encoder.embed_positions.weight"].shape[0]
    return {
        "d_model": tensors[SHARED].shape[1],
        "encoder_layers": _layer_count(tensors, "encoder"),
        "decoder_layers": _layer_count(tensors, "decoder"),
        "encoder_ffn_dim": tensors["model.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": tensors["model.decoder.layers.0.fc1.weight"].shape[0],
        "max_position_embeddings": positions - POSITION_OFFSET,
    }


def _check_shapes(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Refuse tensors that do not make up one model."""
    expected = _shapes(tensors, sizes)
    problems = [f"{name!r} is missing" for name in expected if name not in tensors]
    problems += [f"{name!r} is one too many" for name in tensors if name not in expected]
    problems += [
        f"{name!r} is {list(tensor.shape)}, not {list(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if problems:
        raise CheckpointError(
            f"{MODEL_CLASS}: {shortened(problems)}",
            expected=(
                "every tensor of one model, because a VL-BART is read from its checkpoint alone"
            ),
            fix="Save the whole state dict of a single run",
        )


def _shapes(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's name and shape, from those that decide the others'."""
    vocabulary, width = tensors[SHARED].shape
    image_order = f"{VISUAL}.img_order_embedding.weight"
    shapes: dict[str, tuple[int, ...]] = {
        SHARED: (vocabulary, width),
        "final_logits_bias": (1, vocabulary),
        image_order: (tensors[image_order].shape[0], width),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for side in ("encoder", "decoder"):
        attentions = ["self_attn"] if side == "encoder" else ["self_attn", "encoder_attn"]
        positions = sizes["max_position_embeddings"] + POSITION_OFFSET
        shapes[f"model.{side}.embed_positions.weight"] = (positions, width)
        norm(f"model.{side}.layernorm_embedding")
        for index in range(sizes[f"{side}_layers"]):
            layer = f"model.{side}.layers.{index}"
            for attention in attentions:
                for letter in ("q", "k", "v", "out"):
                    linear(f"{layer}.{attention}.{letter}_proj", width, width)
                norm(f"{layer}.{attention}_layer_norm")
            norm(f"{layer}.final_layer_norm")
            linear(f"{layer}.fc1", sizes[f"{side}_ffn_dim"], width)
            linear(f"{layer}.fc2", width, sizes[f"{side}_ffn_dim"])
    for part in ("feat_embedding", "absolute_vis_pos_embedding"):
        first = f"{VISUAL}.{part}.0"
        linear(first, width, tensors[f"{first}.weight"].shape[1])
        if f"{VISUAL}.feat_embedding.1.weight" in tensors:
            norm(f"{VISUAL}.{part}.1")
    if f"{VISUAL}.layer_norm.weight" in tensors:
        norm(f"{VISUAL}.layer_norm")
    return shapes


def _layer_count(tensors: Mapping[str, Tensor], side: str) -> int:
    pattern = re.compile(rf"model\.{side}\.layers\.(\d+)\..+")
    return 1 + max(int(match[1]) for name in tensors if (match := pattern.fullmatch(name)))
