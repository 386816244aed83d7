"""LLaMA-shaped bases and MTL-LoRA checkpoints of any size, written without a model object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = PROJECTIONS[:4]


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA.

    Attributes:
        hidden: Width of the residual stream.
        inner: Width of the feed-forward layer.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        layers: Blocks.
        vocabulary: Tokens.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int

    @property
    def narrow(self) -> int:
        """Return the width of keys and values."""
        return self.hidden // self.heads * self.kv_heads

    def linear(self) -> dict[str, tuple[int, int]]:
        """Return ``(outputs, inputs)`` of every linear layer of a block, by name."""
        hidden, inner, narrow = self.hidden, self.inner, self.narrow
        return {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip

    def tensors(self, *, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of every tensor, in the order transformers writes them."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for index in range(self.layers):
            for name, shape in self.linear().items():
                yield f"model.layers.{index}.{name}.weight", shape
            yield f"model.layers.{index}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{index}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


# Nothing divides anything: a block, a page or a chunk that is off by one shows.
ODD = Shape(hidden=66, inner=131, heads=3, kv_heads=1, layers=2, vocabulary=57)


def write_base(
    folder: Path,
    shape: Shape = ODD,
    *,
    dtype: str = "BF16",
    shard_bytes: int | None = None,
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """Write a base with normal weights of deviation 0.02 to ``folder`` and return it.

    Args:
        folder: To create.
        shape: Its sizes.
        dtype: Of every tensor.
        shard_bytes: Cut into files at this size; None for a single file.
        tied: Leave the output layer out and say so in the config.
        seed: Decides the values.
    """
    folder.mkdir(parents=True)
    itemsize = NUMPY_DTYPES[dtype].itemsize
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in shape.tensors(tied=tied):
        tensor_bytes = int(np.prod(dims)) * itemsize
        if shard_bytes is not None and groups[-1] and size + tensor_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((name, dims))
        size += tensor_bytes
    generator = np.random.default_rng(seed)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = "model.safetensors" if shard_bytes is None else file
        _write_file(folder / file, group, dtype, generator)
        weight_map.update({name: file for name, _ in group})
    if shard_bytes is not None:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype, tied=tied)))
    return folder


def write_checkpoint(
    folder: Path,
    shape: Shape = ODD,
    *,
    tasks: int = 3,
    rank: int = 5,
    ups: int = 2,
    projections: tuple[str, ...] = PROJECTIONS,
    more: tuple[str, ...] = (),
    seed: int = 1,
) -> Path:
    """Write a headless MTL-LoRA checkpoint to ``folder`` and return it.

    Args:
        folder: To create.
        shape: The base's sizes.
        tasks: T.
        rank: r.
        ups: n.
        projections: Which linear layers of every block are adapted.
        more: Further adapted modules as wide as the vocabulary.
        seed: Decides the values.
    """
    generator = np.random.default_rng(seed)

    def draw(*dims: int, scale: float = 0.05) -> Array:
        values: Array = generator.standard_normal(dims, dtype=np.float32) * np.float32(scale)
        return values

    adapted = {
        f"model.layers.{index}.{name}": dims
        for index in range(shape.layers)
        for name, dims in shape.linear().items()
        if name.rpartition(".")[2] in projections
    }
    adapted |= {name: (shape.vocabulary, shape.hidden) for name in more}
    layers = {
        name: {
            "down": draw(rank, inputs),
            "lambda": draw(tasks, rank, rank, scale=0.1) + np.eye(rank, dtype=np.float32),
            "up": draw(ups, outputs, rank),
            "mixing": draw(tasks, ups, scale=1.0),
        }
        for name, (outputs, inputs) in adapted.items()
    }
    write_folder(
        folder,
        tasks=tuple(Task(f"task{index}", index) for index in range(tasks)),
        layers=layers,
        heads={},
        alpha=2.0 * rank,
        temperature=0.7,
        model_class="LlamaForCausalLM",
        base=BaseReference(),
    )
    return folder


def bound_model(base: Path, checkpoint: Path) -> BoundModel:
    """Return the checkpoint bound to the base."""
    opened, model = open_checkpoint(checkpoint), open_base(str(base))
    return bind(opened, read_adapters(opened, model), model)


def _write_file(
    path: Path,
    group: list[tuple[str, tuple[int, ...]]],
    dtype: str,
    generator: np.random.Generator,
) -> None:
    """Write one safetensors file tensor by tensor: a base may be larger than memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in group:
        size = int(np.prod(dims)) * NUMPY_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, dims in group:
            values = generator.standard_normal(dims, dtype=np.float32) * np.float32(0.02)
            (values if len(dims) > 1 else values + 1).astype(NUMPY_DTYPES[dtype]).tofile(file)


def _config(shape: Shape, dtype: str, *, tied: bool) -> dict[str, object]:
    word = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "dtype": word,
    }
