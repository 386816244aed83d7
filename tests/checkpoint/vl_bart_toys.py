"""A toy LAST.pth: the key layout of the repository's VL-BART, and a forward pass of its own.

``Reference`` is written from the paper with functional calls on the state dict's names; it
shares no code with the class that merged folders load into.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mtl_export.checkpoint.tensors import Array

D, HEADS, FFN, VOCABULARY, BASE_VOCABULARY, POSITIONS, FEATURES = 12, 3, 20, 41, 37, 30, 7
LAYERS, IMAGES, TASKS, RANK, UPS = 2, 2, 4, 5, 2
ALPHA, TEMPERATURE = 7.0, 0.8
VISUAL = "model.encoder.visual_embedding"
TIED = (
    "model.shared.weight", "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight", f"{VISUAL}.obj_order_embedding.weight", "lm_head.weight",
)  # fmt: skip
Weights = dict[str, torch.Tensor]


def base_folder(folder: Path, **changes: Any) -> Path:
    """Write the BART that the toy was trained from: only its config matters."""
    from safetensors.numpy import save_file
    from transformers import BartConfig

    config = BartConfig(
        vocab_size=BASE_VOCABULARY,
        d_model=D,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        max_position_embeddings=POSITIONS,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    save_file({"nothing.of.it.is.used": np.zeros(1)}, str(folder / "model.safetensors"))
    return folder


def state_dict(*, norms: str = "individual", seed: int = 5) -> Weights:
    """Return the state dict, without the wrapper's prefix; nothing in it is zero.

    Args:
        norms: Where the visual embedding has LayerNorms: ``individual``, ``one`` or ``none``.
        seed: Decides the values.
    """
    generator = torch.Generator().manual_seed(seed)
    state: Weights = {}

    def draw(name: str, *shape: int, around: float = 0.0) -> None:
        state[name] = torch.randn(shape, generator=generator) * 0.3 + around

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs)
        draw(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        draw(f"{name}.weight", D, around=1.0)
        draw(f"{name}.bias", D)

    draw("model.shared.weight", VOCABULARY, D)
    for side in ("encoder", "decoder"):
        draw(f"model.{side}.embed_positions.weight", POSITIONS + 2, D)
        norm(f"model.{side}.layernorm_embedding")
        for index in range(LAYERS):
            layer = f"model.{side}.layers.{index}"
            for attention in ["self_attn"] + ["encoder_attn"] * (side == "decoder"):
                for letter in ("q", "k", "v", "out"):
                    linear(f"{layer}.{attention}.{letter}_proj", D, D)
                for letter in "qv":
                    module = f"{layer}.{attention}.{letter}_proj"
                    draw(f"{module}.lora_A", 1, RANK, D)
                    draw(f"{module}.lora_lambdas", TASKS, RANK, RANK)
                    draw(f"{module}.lora_B", UPS, D, RANK)
                    draw(f"{module}.lora_B_w", TASKS, UPS)
                norm(f"{layer}.{attention}_layer_norm")
            linear(f"{layer}.fc1", FFN, D)
            linear(f"{layer}.fc2", D, FFN)
            norm(f"{layer}.final_layer_norm")
    for part, size in (("feat_embedding", FEATURES), ("absolute_vis_pos_embedding", 5)):
        linear(f"{VISUAL}.{part}.0", D, size)
        if norms == "individual":
            norm(f"{VISUAL}.{part}.1")
    if norms == "one":
        norm(f"{VISUAL}.layer_norm")
    draw(f"{VISUAL}.img_order_embedding.weight", IMAGES, D)
    draw("final_logits_bias", 1, VOCABULARY)
    # One tensor under five names, as a model that ties them saves it.
    return state | dict.fromkeys(TIED, state["model.shared.weight"])


def write(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """Write ``state`` as a distributed run does and return the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({f"module.{name}": value for name, value in state.items()}, folder / "LAST.pth")
    return folder


def rows(batch: int = 4) -> dict[str, Array]:
    """Return seeded inputs: ragged text, five regions of two images, a decoder's tokens."""
    generator = np.random.default_rng(8)
    lengths = np.array([6, 3, 5, 4])[:batch]
    corners = generator.uniform(0, 1, (batch, 5, 4))
    return {
        "input_ids": generator.integers(4, VOCABULARY, (batch, 6)),
        "attention_mask": (np.arange(6) < lengths[:, None]).astype(np.int64),
        "vis_feats": generator.normal(size=(batch, 5, FEATURES)),
        "boxes": corners,
        "img_order_ids": np.tile([0, 0, 0, 1, 1], (batch, 1)),
        "obj_order_ids": np.tile([0, 1, 2, 0, 1], (batch, 1)),
        "decoder_input_ids": generator.integers(4, VOCABULARY, (batch, 4)),
    }


class Reference:
    """The unmerged model in float64, one row at a time.

    Args:
        state: The state dict, without the wrapper's prefix.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._w = {name: value.double() for name, value in state.items()}
        self._task = 0

    def logits(self, inputs: Mapping[str, Array], row: int, task: int) -> Array:
        """Return one row's logits ``[D, vocabulary]`` under ``task``, padding cut off."""
        self._task = task
        length = int(inputs["attention_mask"][row].sum())
        x = {name: torch.from_numpy(value[row]) for name, value in inputs.items()}
        memory = self._encoded(x, length)
        hidden = self._embedded("decoder", x["decoder_input_ids"])
        causal = torch.ones(len(hidden), len(hidden)).tril() == 1
        for index in range(LAYERS):
            layer = f"model.decoder.layers.{index}"
            hidden = self._attended(f"{layer}.self_attn", hidden, hidden, causal)
            hidden = self._attended(f"{layer}.encoder_attn", hidden, memory, None)
            hidden = self._fed_forward(layer, hidden)
        result = hidden @ self._w["model.shared.weight"].T + self._w["final_logits_bias"]
        return np.asarray(result.numpy())

    def _encoded(self, x: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
        text = self._embedded("encoder", x["input_ids"][:length])
        hidden = torch.cat([text, self._regions(x)])
        for index in range(LAYERS):
            layer = f"model.encoder.layers.{index}"
            hidden = self._attended(f"{layer}.self_attn", hidden, hidden, None)
            hidden = self._fed_forward(layer, hidden)
        return hidden

    def _embedded(self, side: str, ids: torch.Tensor) -> torch.Tensor:
        positions = self._w[f"model.{side}.embed_positions.weight"][2 : len(ids) + 2]
        tokens = self._w["model.shared.weight"][ids]
        return self._norm(f"model.{side}.layernorm_embedding", tokens + positions)

    def _regions(self, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
        box = x["boxes"]
        area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
        parts = {
            "feat_embedding": x["vis_feats"],
            "absolute_vis_pos_embedding": torch.cat([box, area[:, None]], dim=1),
        }
        total = torch.zeros(len(box), D, dtype=torch.float64)
        for part, value in parts.items():
            name = f"{VISUAL}.{part}"
            own = value @ self._w[f"{name}.0.weight"].T + self._w[f"{name}.0.bias"]
            total = total + (self._norm(f"{name}.1", own) if f"{name}.1.bias" in self._w else own)
        total = total + self._w[f"{VISUAL}.img_order_embedding.weight"][x["img_order_ids"]]
        total = total + self._w["model.shared.weight"].flip(0)[x["obj_order_ids"]]
        name = f"{VISUAL}.layer_norm"
        return self._norm(name, total) if f"{name}.bias" in self._w else total

    def _attended(
        self, name: str, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        size = D // HEADS
        parts = {"q": x, "k": memory, "v": memory}
        q, k, v = (
            self._linear(f"{name}.{letter}_proj", value).reshape(-1, HEADS, size).transpose(0, 1)
            for letter, value in parts.items()
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(size)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        mixed = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(-1, D)
        return self._norm(f"{name}_layer_norm", x + self._linear(f"{name}.out_proj", mixed))

    def _fed_forward(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        inner = functional.gelu(self._linear(f"{layer}.fc1", x))
        return self._norm(f"{layer}.final_layer_norm", x + self._linear(f"{layer}.fc2", inner))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self._w[f"{name}.weight"].T + self._w[f"{name}.bias"]
        if f"{name}.lora_A" not in self._w:
            return y
        logits = [float(w) / TEMPERATURE for w in self._w[f"{name}.lora_B_w"][self._task]]
        powers = [math.exp(logit) for logit in logits]
        z = x @ self._w[f"{name}.lora_A"][0].T @ self._w[f"{name}.lora_lambdas"][self._task].T
        for power, up in zip(powers, self._w[f"{name}.lora_B"], strict=True):
            y = y + ALPHA / RANK * power / sum(powers) * (z @ up.T)
        return y

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (D,), self._w[f"{name}.weight"], self._w[f"{name}.bias"])
