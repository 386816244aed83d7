"""Language models that arrange rows another way inside a part: each row keeps its task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.errors import GraphError
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.parts import trace_parts
from mtl_export.graph.passes.markers import markers, module_of
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graph, write_graphs
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.language import NEW_TOKENS, OrtLanguageRunner
from mtl_export.runtime.runners.pytorch import oracle_model
from mtl_export.runtime.runners.torch_language import OracleLanguageRunner
from tests.graph import language, seq2seq_toys

ATOL = 2e-5
Forward = Callable[..., torch.Tensor]


def packed(forward: Forward) -> Forward:
    """Return a layer that sees all tokens of all rows as one list, as experts do."""

    def own(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x.reshape(-1, x.shape[-1])).reshape(x.shape)

    return own


def beams(forward: Forward) -> Forward:
    """Return a layer that sees every row twice, one after the other, and takes the first."""

    def own(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x.repeat_interleave(2, dim=0))[::2]

    return own


def copies(forward: Forward) -> Forward:
    """Return a layer that sees the batch twice and takes the second."""

    def own(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x.repeat(2, 1, 1))[x.shape[0] :]

    return own


def both_ways(forward: Forward) -> Forward:
    """Return a layer that sees the batch, and then the batch backwards."""

    def own(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, torch.cat([x, x.flip(0)]))[: x.shape[0]]

    return own


def noted(part: TracedModel) -> dict[str, str | None]:
    """Return what each marker says of its rows."""
    found = {}
    for node in markers(part.model):
        rows = node.attributes.get("rows")
        found[module_of(node)] = None if rows is None else rows.as_string()
    return found


def test_rows_of_a_causal_model_keep_their_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and decode route what layers flatten or repeat, at sizes nobody traced."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

    bound = language.language_bound(tmp_path, "LlamaForCausalLM")
    plain, begin = LlamaMLP.forward, LlamaDecoderLayer.__init__
    forwards = (packed(plain), copies(plain))

    def numbered(self: Any, config: Any, layer_idx: int) -> None:
        begin(self, config, layer_idx)
        self.mlp.number = layer_idx

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forwards[self.number](self, x)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", numbered)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    parts = trace_parts(bound)
    # Of one token a row the list of all tokens is the batch itself.
    for part, listed in zip(parts, ("repeated", None), strict=True):
        orders = noted(part)
        found = [orders[f"model.layers.{layer}.mlp.down_proj"] for layer in range(2)]
        assert found == [listed, "tiled"]
        assert orders["model.layers.1.self_attn.q_proj"] is None
    folder = tmp_path / "single"
    folder.mkdir()
    write_graphs({one.stem: routed_graph(one, bound) for one in parts}, bound, folder, None)
    ids, mask = language.prompts(4, 7)
    tokens = np.random.default_rng(0).integers(3, language.VOCABULARY, (4, 3))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        NEW_TOKENS: tokens,
        "task_ids": np.array([2, 0, 1, 2]),
    }
    with OracleLanguageRunner(bound, "fp64") as oracle:
        expected = oracle.infer(inputs)["logits"]
    with OrtLanguageRunner(folder / "prefill.onnx", decode="decode.onnx", threads=1) as runner:
        np.testing.assert_allclose(runner.infer(inputs)["logits"], expected, atol=ATOL)


@pytest.mark.slow
def test_rows_of_an_encoder_decoder_keep_their_task_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's beams are routed; a decoder whose rows run backwards is merged only."""
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5Stack

    bound = seq2seq_toys.bound_toy("t5", tmp_path)
    plain = T5DenseGatedActDense.forward
    forwards = {False: beams(plain), True: both_ways(plain)}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forwards[self.is_in_decoder](self, x)

    begin = T5Stack.__init__

    def numbered(self: Any, config: Any, *others: Any, **settings: Any) -> None:
        begin(self, config, *others, **settings)
        for module in self.modules():
            if isinstance(module, T5DenseGatedActDense):
                module.__dict__["is_in_decoder"] = bool(config.is_decoder)

    monkeypatch.setattr(T5Stack, "__init__", numbered)
    monkeypatch.setattr(T5DenseGatedActDense, "forward", forward)
    encoder, *others = trace_parts(bound)
    assert noted(encoder)["encoder.block.0.layer.1.DenseReluDense.wi_0"] == "repeated"
    routed = routed_graph(encoder, bound)
    task_ids, inputs = np.array([1, 0, 1, 1, 0]), seq2seq_toys.rows(5, 9)
    oracle = oracle_model(bound, torch.float64)
    encode: Any = oracle.model.get_encoder
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    expected = np.zeros((5, 9, seq2seq_toys.WIDTH))
    for row, task in enumerate(task_ids):
        # Alone in its batch: the oracle's layers know nothing of beams.
        oracle.routing.set(torch.tensor([task]))
        own = {name: value[row : row + 1] for name, value in tensors.items()}
        with torch.inference_mode():
            states: Any = encode()(**own)
        expected[row] = states.last_hidden_state[0].numpy()
    write_graph(routed, bound, tmp_path, None)
    with OrtRunner(tmp_path / "model.onnx", threads=1) as runner:
        found = runner.infer({**inputs, "task_ids": task_ids})["last_hidden_state"]
    np.testing.assert_allclose(found, expected, atol=ATOL)
    for part in others:
        with pytest.raises(GraphError, match="trying inputs did not tell whose row is whose"):
            routed_graph(part, bound)
        merged_graph(part, bound, bound.adapters.tasks[0])
