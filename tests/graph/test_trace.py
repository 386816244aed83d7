from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from transformers import BertConfig, BertForSequenceClassification

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import BaseReference
from mtl_export.errors import BaseModelError, GraphError
from mtl_export.graph import trace as trace_module
from mtl_export.graph.marking import mark
from mtl_export.graph.names import OPSET
from mtl_export.graph.passes.markers import markers, module_of
from mtl_export.graph.trace import TracedModel, trace
from tests.adapters import toys
from tests.factories import VOCABULARY


class Config(SimpleNamespace):
    """A model's config."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as ``config.json`` has it."""
        return dict(vars(self))


def test_every_adapted_layer_and_head_is_one_marker(traced: TracedModel) -> None:
    """Each adapted layer and head occurs once in the graph, and only they."""
    found = [module_of(node) for node in markers(traced.model)]
    assert sorted(found) == sorted([*toys.MODULES, toys.HEAD])
    assert sorted(traced.modules) == sorted(toys.MODULES)
    assert traced.heads == (toys.HEAD,)


def test_markers_carry_the_layers_own_weights(traced: TracedModel, bound: BoundModel) -> None:
    """A marker's weight and bias are the base's, under their state-dict names."""
    for node in markers(traced.model):
        module = module_of(node)
        if module == toys.HEAD:
            assert len(node.inputs) == 1
            continue
        for value, kind in zip(node.inputs[1:], ("weight", "bias"), strict=True):
            assert value is not None
            assert value.name == f"{module}.{kind}"
            assert value.const_value is not None
            np.testing.assert_array_equal(
                value.const_value.numpy(), bound.base_tensor(f"{module}.{kind}").numpy()
            )


def test_untouched_initializers_keep_their_names(traced: TracedModel, bound: BoundModel) -> None:
    """Embeddings and norms are found under the names the model class gives them."""
    names = set(traced.model.graph.initializers)
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"):
        assert name in bound.base.tensors
        assert bound.prefix + name in names


def test_inputs_are_the_models_own_with_named_dimensions(traced: TracedModel) -> None:
    """Inputs are int64 [batch, sequence]; the head sees [batch, hidden]; no symbol is left over."""
    inputs = traced.model.graph.inputs
    assert {value.name for value in inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    for value in inputs:
        assert value.dtype == ir.DataType.INT64
        assert value.shape == ir.Shape(["batch", "sequence"])
    head = markers(traced.model)[-1]
    assert head.inputs[0] is not None
    assert head.inputs[0].shape == ir.Shape(["batch", 12])
    assert [value.name for value in traced.model.graph.outputs] == ["logits"]
    for node in traced.model.graph.all_nodes():
        for value in node.outputs:
            for dim in value.shape or ():
                assert "s" not in re.sub("batch|sequence|None", "", str(dim)), dim


def test_nothing_of_the_exporting_machine_is_kept(traced: TracedModel) -> None:
    """Stack traces and documentation strings would carry paths into the file."""
    for node in traced.model.graph.all_nodes():
        assert not node.metadata_props
        assert not node.doc_string
    assert traced.model.graph.opset_imports[""] == OPSET


@pytest.fixture
def exported(traced: TracedModel, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    """Return a copy of the trace that stands in for the exporter's next answer."""
    model = traced.model.clone()
    monkeypatch.setattr(trace_module, "_exported", lambda *_: model)
    return model


def test_a_layer_the_exporter_lost_is_refused(exported: ir.Model, bound: BoundModel) -> None:
    """A layer without its marker would be exported without its adapter."""
    node = next(n for n in markers(exported) if module_of(n) == "bert.pooler.dense")
    node.attributes["module"] = ir.AttrString("module", "bert.somewhere.else")
    with pytest.raises(GraphError) as caught:
        trace(bound)
    assert "bert.pooler.dense" in caught.value.problem
    assert "every adapted layer" in caught.value.expected
    assert caught.value.fix


def test_an_exporter_that_gives_up_is_one_message(
    bound: BoundModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the exporter raises becomes a GraphError with its first line and the cause."""
    from transformers.exporters import exporter_onnx

    def give_up(*_: Any, **__: Any) -> SimpleNamespace:
        raise RuntimeError("constraints violated\nsecond line")

    monkeypatch.setattr(exporter_onnx.OnnxExporter, "export", give_up)
    with pytest.raises(GraphError) as caught:
        trace(bound)
    assert caught.value.problem.startswith("BertForSequenceClassification")
    assert "constraints violated" in caught.value.problem
    assert "mtl-export merge" in caught.value.fix
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_heads_that_do_not_fit_the_model_are_refused(bound: BoundModel, tmp_path: Path) -> None:
    """Heads of 11 features on a model that gives 12 are refused before the trace."""
    parts = toys.checkpoint_parts()
    parts["heads"][toys.HEAD] = {
        name: (np.ascontiguousarray(weight[:, :11]), bias)
        for name, (weight, bias) in parts["heads"][toys.HEAD].items()
    }
    adapter = toys.write_checkpoint(tmp_path / "adapter", parts, BaseReference())
    with pytest.raises(BaseModelError) as caught:
        trace(toys.bound_model(bound.base.folder, adapter))
    assert caught.value.problem.startswith("head classifier")
    assert "take 11 features" in caught.value.problem
    assert caught.value.expected.partition(", because ")[0] == "12 features"
    assert "--base" in caught.value.fix


def test_a_head_that_is_not_linear_is_refused(bound: BoundModel, tmp_path: Path) -> None:
    """A head of several layers is named by its layers, not as a whole."""
    parts = toys.checkpoint_parts()
    parts["heads"]["bert.pooler"] = parts["heads"].pop(toys.HEAD)
    adapter = toys.write_checkpoint(tmp_path / "adapter", parts, BaseReference())
    pooled = toys.bound_model(bound.base.folder, adapter)
    with pytest.raises(
        BaseModelError, match="a BertPooler in BertForSequenceClassification"
    ) as caught:
        mark(BertForSequenceClassification(BertConfig(**bound.base.config)), pooled)
    assert caught.value.problem.startswith("bert.pooler")
    assert "linear layers inside it" in caught.value.fix


def test_a_vision_model_of_no_size_is_refused() -> None:
    """An image must have a size to be traced with."""
    model = SimpleNamespace(main_input_name="pixel_values", config=Config(num_channels=3))
    with pytest.raises(GraphError, match="no image_size"):
        trace_module.sample_inputs(model)
    model.config = Config(num_channels=1, image_size=[6, 4])
    assert trace_module.sample_inputs(model)["pixel_values"].shape == (3, 1, 6, 4)


def test_inputs_that_the_model_does_not_take_are_left_out(
    bound: BoundModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without token types is not traced with them."""
    seen: dict[str, Any] = {}

    def record(model: Any, inputs: dict[str, Any], opset: int) -> ir.Model:
        seen.update(inputs)
        raise GraphError("here: enough seen")

    monkeypatch.setattr(trace_module, "_exported", record)
    with pytest.raises(GraphError, match="enough seen"):
        trace(bound)
    assert list(seen) == ["input_ids", "attention_mask", "token_type_ids"]
    ids, mask = seen["input_ids"], seen["attention_mask"]
    assert ids.shape == mask.shape
    assert ids.min() >= 0
    assert ids.max() < VOCABULARY
    assert 0 < mask.sum() < mask.numel()
    model = SimpleNamespace(
        config=Config(vocab_size=7, type_vocab_size=0),
        forward=lambda input_ids, token_type_ids: None,
    )
    assert list(trace_module.sample_inputs(model)) == ["input_ids"]


@pytest.mark.parametrize(("positions", "length"), [(0, 11), (40, 11), (8, 8)])
def test_a_sample_fits_the_model(positions: int, length: int) -> None:
    """A model of few positions is not traced with more tokens; each row has some."""
    model = SimpleNamespace(
        config=Config(vocab_size=7, max_position_embeddings=positions),
        forward=lambda input_ids, attention_mask: None,
    )
    sample = trace_module.sample_inputs(model)
    assert sample["input_ids"].shape == (3, length)
    assert sample["attention_mask"].sum(1).tolist() == [length, length - length // 3, length]


def test_a_classifier_without_padding_says_what_to_set(
    bound: BoundModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging would not help: the model refuses batches."""
    from transformers.exporters import exporter_onnx

    def give_up(*_: Any, **__: Any) -> SimpleNamespace:
        raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")

    monkeypatch.setattr(exporter_onnx.OnnxExporter, "export", give_up)
    with pytest.raises(GraphError) as caught:
        trace(bound)
    assert caught.value.fix == "Set pad_token_id in config.json of the base"
