"""A model's class and config -> what rows of it are made of, where the user gives none.

    model takes                          rows
    text                                 input_ids, attention_mask, token_type_ids
    images                               pixel_values [C, H, W]
    text and images, a tower for each    all of these
    text around images                   all of these, where the config says how many tokens an
                                         image is; else text alone
    sound as a wave                      input_values [samples]
    sound as a spectrogram               input_features [bins, frames] or [frames, bins]
    a decoder that reads tokens beside   decoder_input_ids [8]; encoder-decoders get theirs later

What else a forward pass takes is told by its signature, and taken from the user's arrays alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.checkpoint.model_inputs import PIXEL_VALUES, image_shape
from mtl_export.checkpoint.own_classes import own_class
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import ParityError
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, TASK_IDS

DECODER_IDS, DECODER_TOKENS = "decoder_input_ids", 8
WAVE, SPECTROGRAM = "input_values", "input_features"
# Of models that take images or sounds of any size: an image with more places, at strides 8, 16
# and 32, than RT-DETR's 300 queries; and a length that leaves so many frames.
ANY_IMAGE, FRAMES = (3, 128, 128), 24
# Tokens that stand for something beside the text, as configs call them.
PLACEHOLDERS = tuple(
    f"{kind}_token_{word}" for kind in ("image", "video", "audio") for word in ("id", "index")
)


@dataclass(frozen=True)
class ModelRows:
    """What the rows of a model are made of.

    Attributes:
        text: The config that describes its text; empty for a model that reads none.
        features: Shape of one row of each other input, float32; () where the config does not
            tell.
        is_fixed: The rows of these inputs have that shape and no other.
        decoder_vocabulary: Of the tokens that its decoder reads beside; 0: none.
        image_token: What stands in the text for a part of the image; -1: nothing does.
        image_tokens: How many of them stand for an image.
        end_token: What a tower of texts looks its answer up at; -1: nothing.
        arguments: What its forward pass takes; empty where the class is not transformers'.
    """

    text: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    is_fixed: bool = False
    decoder_vocabulary: int = 0
    image_token: int = -1
    image_tokens: int = 0
    end_token: int = -1
    arguments: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int:
        """Return below what seeded token ids lie: no placeholder is among them."""
        size = int(self.text.get("vocab_size") or 1)
        special = [self.text.get(name) for name in PLACEHOLDERS]
        return min([size, *(one for one in special if isinstance(one, int) and 1 < one < size)])

    def refuse_unknown(self, model_class: str) -> None:
        """Refuse to make rows of a kind that is not known.

        Raises:
            ParityError: The shape of an input is not.
        """
        for name, shape in self.features.items():
            if not shape:
                raise ParityError(
                    f"{model_class}: it takes {name}, and its config does not say of what shape",
                    expected="rows to compare on, because parity makes none of this kind",
                    fix=(
                        f"Pass --inputs arrays.npz with {name} [N, ...], whatever else it takes by "
                        "name, and task_ids [N]"
                    ),
                )

    @property
    def text_names(self) -> list[str]:
        """Return the inputs that are text."""
        if not self.text:
            return []
        types = ["token_type_ids"] if self.text.get("type_vocab_size") else []
        return [INPUT_IDS, ATTENTION_MASK, *types]

    def completed(self, rows: Mapping[str, Array]) -> dict[str, Array]:
        """Return seeded rows with the tokens that decide where an answer is looked up."""
        found = dict(rows)
        count = len(rows[TASK_IDS])
        if self.end_token >= 0:
            last = rows[ATTENTION_MASK].sum(axis=1) - 1
            found[INPUT_IDS] = rows[INPUT_IDS].copy()
            found[INPUT_IDS][np.arange(count), last] = self.end_token
        if self.image_tokens:
            before = (count, self.image_tokens)
            tokens = np.full(before, self.image_token, np.int64)
            found[INPUT_IDS] = np.concatenate([tokens, found[INPUT_IDS]], axis=1)
            mask = np.ones(before, np.int64)
            found[ATTENTION_MASK] = np.concatenate([mask, rows[ATTENTION_MASK]], axis=1)
        if self.decoder_vocabulary:
            generator = np.random.default_rng(4)
            shape = (count, DECODER_TOKENS)
            found[DECODER_IDS] = generator.integers(0, self.decoder_vocabulary, shape)
        return found


def model_rows(model_class: str, config: Mapping[str, Any]) -> ModelRows:
    """Return what the rows of a model are made of."""
    image, main = image_shape(config), INPUT_IDS
    arguments: tuple[str, ...] = ()
    known = None if own_class(model_class) or is_causal_lm(model_class) else _known(model_class)
    if known is not None:
        main = known.main_input_name
        arguments = tuple(inspect.signature(known.forward).parameters)[1:]
    elif image:
        main = PIXEL_VALUES
    text = _text_config(config)
    if main != INPUT_IDS:
        decoder = {} if is_seq2seq(model_class, config) else _decoder_config(config, arguments)
        return ModelRows(
            features={main: _feature_shape(main, config)},
            is_fixed=main == PIXEL_VALUES and image is not None,
            decoder_vocabulary=int(decoder.get("vocab_size") or 0),
            arguments=arguments,
        )
    seen = image_shape(config.get("vision_config") or {})
    if PIXEL_VALUES not in arguments or seen is None:
        return ModelRows(text, arguments=arguments)
    token = next((config[name] for name in PLACEHOLDERS[:2] if config.get(name) is not None), None)
    features = {PIXEL_VALUES: seen}
    if token is None:  # a tower for texts and one for images
        end = text.get("eos_token_id")
        return ModelRows(
            text, features, end_token=end if isinstance(end, int) else -1, arguments=arguments
        )
    sizes = (config.get("image_seq_length"), config.get("mm_tokens_per_image"),
             text.get("num_image_tokens"))  # fmt: skip
    count = next((int(size) for size in sizes if size), 0)
    if not count:
        return ModelRows(text, arguments=arguments)
    return ModelRows(
        text, features, image_token=int(token), image_tokens=count, arguments=arguments
    )


def _known(model_class: str) -> Any:
    import transformers

    found = getattr(transformers, model_class, None)
    return found if hasattr(found, "main_input_name") else None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of what reads text, with the placeholders that the whole one names."""
    parts = [config, *(config.get(name) or {} for name in ("text_config", "encoder", "decoder"))]
    own = next((part for part in parts if part.get("vocab_size")), config)
    return {**own, **{name: config[name] for name in PLACEHOLDERS if name in config}}


def _decoder_config(config: Mapping[str, Any], arguments: tuple[str, ...]) -> Mapping[str, Any]:
    if DECODER_IDS not in arguments:
        return {}
    found: Mapping[str, Any] = config.get("decoder") or config
    return found


def _feature_shape(name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of one row of ``name``; () if the config does not tell."""
    if name == PIXEL_VALUES:
        inner = config.get("vision_config") or config.get("encoder") or {}
        fixed = {"image_size": config.get("anchor_image_size")}  # RT-DETR's word
        return image_shape(config) or image_shape(inner) or image_shape(fixed) or ANY_IMAGE
    bins = config.get("num_mel_bins")
    if name == WAVE and config.get("conv_kernel"):
        length = FRAMES
        layers = zip(config["conv_kernel"], config["conv_stride"], strict=True)
        for kernel, stride in reversed([*layers]):
            length = (length - 1) * int(stride) + int(kernel)
        return (length,)
    if name == WAVE and bins and config.get("max_length"):
        return int(config["max_length"]), int(bins)
    if name == SPECTROGRAM and bins and config.get("max_source_positions"):
        # Whisper halves the frames once, by the stride of its second convolution.
        return int(bins), 2 * int(config["max_source_positions"])
    width = config.get("feature_projection_input_dim") or config.get("input_feat_per_channel")
    if name == SPECTROGRAM and width:
        return FRAMES, int(width)
    return ()
