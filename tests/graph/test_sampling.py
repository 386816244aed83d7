"""What a model must not do in the pass that gives a trace its samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mtl_export.errors import GraphError
from mtl_export.graph.export import exported
from mtl_export.graph.sampling import reason_of, sample_pass, vocabulary
from mtl_export.graph.seq2seq import trace_seq2seq
from tests.graph import seq2seq_toys


class Switching(nn.Module):
    """A layer that is another one after a short text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.kind: str = "sparse"

    def forward(self, x: torch.Tensor) -> Any:
        """Return what the layer makes of ``x``."""
        self.kind = "full" if len(x) < 9 else self.kind
        return self.inner(x)


def test_a_model_that_a_sample_changes_is_refused() -> None:
    """Its trace would be that of the changed model; the attribute is named."""
    model = nn.Sequential(Switching())
    with pytest.raises(GraphError, match=r"0\.kind from 'sparse' to 'full'"), sample_pass(model):
        model(torch.ones(3, 2))
    with sample_pass(model):
        assert not model(torch.ones(3, 2)).requires_grad


def test_a_model_that_fails_on_a_sample_is_one_message() -> None:
    """Whatever it raises becomes a GraphError with the cause; ours stay what they are."""
    model = nn.Linear(2, 2)
    with (
        pytest.raises(GraphError, match=r"Linear: it fails .*: mat1") as caught,
        sample_pass(model),
    ):
        model(torch.ones(3, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)
    ours = GraphError("here: something")
    with pytest.raises(GraphError) as caught, sample_pass(model):
        raise ours
    assert caught.value is ours


def test_the_reason_is_the_cause_without_colours() -> None:
    """Exporters wrap what happened in reports of their own."""
    outer = RuntimeError("\x1b[31mFailed\x1b[0m to export. Long report.")
    assert reason_of(outer) == "Failed to export. Long report"
    outer.__cause__ = ValueError("no padding token.\nMore.")
    assert reason_of(outer) == "no padding token"
    assert reason_of(KeyError()) == "KeyError"


def test_a_model_of_several_inputs_has_no_vocabulary() -> None:
    """Its config keeps the sizes of its parts apart."""
    with pytest.raises(GraphError, match="without vocab_size"):
        vocabulary(SimpleNamespace(config=SimpleNamespace()))


def bigbird(**settings: Any) -> Any:
    """Return a BigBirdPegasus, whose attention is sparse for long texts alone."""
    from transformers import BigBirdPegasusConfig, BigBirdPegasusForConditionalGeneration

    config = BigBirdPegasusConfig(
        vocab_size=61, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=18,
        max_position_embeddings=40, **settings,
    )  # fmt: skip
    return BigBirdPegasusForConditionalGeneration(config)


def test_sparse_attention_is_refused(tmp_path: Path) -> None:
    """A short text makes the model switch to full attention for good."""
    model = bigbird(block_size=2)
    ids = torch.ones(1, 11, dtype=torch.int64)
    switched = "from 'block_sparse' to 'original_full'"
    with pytest.raises(GraphError, match=switched), sample_pass(model):
        model(input_ids=ids, decoder_input_ids=ids)
    bound = seq2seq_toys.bound_model(bigbird(block_size=2), tmp_path)
    with pytest.raises(GraphError, match="attention_type block_sparse in its config"):
        trace_seq2seq(bound)


def test_a_mixture_of_experts_that_returns_more_is_refused(tmp_path: Path) -> None:
    """Switch Transformers does not answer as an encoder-decoder does."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=61, d_model=12, d_kv=5, d_ff=20, num_layers=1, num_decoder_layers=1,
        num_heads=3, num_experts=2, pad_token_id=0,
    )  # fmt: skip
    bound = seq2seq_toys.bound_model(SwitchTransformersForConditionalGeneration(config), tmp_path)
    with pytest.raises(GraphError, match="SwitchTransformersForConditionalGeneration"):
        trace_seq2seq(bound)


def test_a_trace_through_fewer_bits_is_refused() -> None:
    """Falcon rounds its position biases to bfloat16: runtimes on a CPU could not open the graph."""

    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": (x.to(torch.bfloat16) * 3).to(x.dtype)}

    with pytest.raises(GraphError, match=r"Rounding: BFLOAT16 at .* \(Cast\)"):
        exported(Rounding(), {"x": torch.ones(3, 4)}, {"x": {0: "batch"}})
