"""AdapterHub heads: where each goes, and which is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.checkpoint import Readout
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import (
    AdapterError,
    CheckpointError,
)
from tests.checkpoint import adapterhub_toys as hub
from tests.checkpoint.messages import assert_whole
from tests.factories import HIDDEN, VOCABULARY

QUERY = "bert.encoder.layer.0.attention.self.query"


def test_the_head_of_task10_is_not_that_of_task1(tmp_path: Path) -> None:
    """The library saves heads by the first letters of their names; ours is exact."""
    adapters = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    for index, (name, labels) in enumerate(zip(hub.NAMES, hub.LABELS, strict=True)):
        state = hub.head_state(name, hub.head_config(labels), index)
        for module, key in (("bert.pooler.dense", "1"), ("classifier", "4")):
            head = adapters.heads[module][index]
            np.testing.assert_array_equal(head.weight, state[f"heads.{name}.{key}.weight"])
            np.testing.assert_array_equal(head.bias, state[f"heads.{name}.{key}.bias"])


HEADS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...], Readout | None]] = {
    "default": ("bert", {}, "BertForSequenceClassification",
                ("bert.pooler.dense", "classifier"), None),
    "pooler": ("bert", {"layers": 1, "use_pooler": True}, "BertForSequenceClassification",
               ("classifier",), None),
    "one layer": ("bert", {"layers": 1}, "BertModel", ("head.0",), Readout("first", ())),
    "gelu": ("bert", {"activation_function": "GELU"}, "BertModel", ("head.0", "head.1"),
             Readout("first", ("gelu",))),
    "no function": ("bert", {"activation_function": None}, "BertModel", ("head.0", "head.1"),
                    Readout("first", ("linear",))),
    "leaky": ("bert", {"activation_function": "leakyrelu", "layers": 3}, "BertModel",
              ("head.0", "head.1", "head.2"), Readout("first", ("leaky_relu", "leaky_relu"))),
    "roberta": ("roberta", {}, "RobertaForSequenceClassification",
                ("classifier.dense", "classifier.out_proj"), None),
    "distilbert": ("distilbert", {"activation_function": "relu"},
                   "DistilBertForSequenceClassification", ("pre_classifier", "classifier"), None),
    "distilbert tanh": ("distilbert", {}, "DistilBertModel", ("head.0", "head.1"),
                        Readout("first", ("tanh",))),
    "tagging": ("bert", {"head_type": "tagging", "layers": 1}, "BertForTokenClassification",
                ("classifier",), None),
    "tagging, two layers": ("bert", {"head_type": "tagging"}, "BertModel", ("head.0", "head.1"),
                            Readout("tokens", ("tanh",))),
    "llama": ("llama", {}, "LlamaModel", ("head.0", "head.1"), Readout("last", ("tanh",))),
}  # fmt: skip
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "llama": "Llama"}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_goes_where_a_class_computes_it(tmp_path: Path, case: str) -> None:
    """Heads become a transformers class's own where it computes the same, else a readout."""
    model_type, settings, model_class, modules, readout = HEADS[case]
    folder = hub.write_mtl(
        tmp_path / "a", head=settings, model_type=model_type,
        model_class=f"{CLASSES[model_type]}AdapterModel",
    )  # fmt: skip
    checkpoint = open_checkpoint(folder)
    assert checkpoint.model_class == model_class
    assert tuple(checkpoint.heads) == modules
    assert checkpoint.readouts == (() if readout is None else (readout,))
    # The bare base's names lack the part that the model with a head puts before them.
    assert (QUERY in checkpoint.layers) == (not model_class.endswith("Model"))
    assert (QUERY.removeprefix("bert.") in checkpoint.layers) == model_class.endswith("Model")


def test_multi_label_heads_say_so(tmp_path: Path) -> None:
    """The kind of the task is the head's."""
    folder = hub.write_mtl(tmp_path / "a", head={"head_type": "multilabel_classification"})
    kinds = {task.kind for task in open_checkpoint(folder).tasks}
    assert kinds == {"multi_label_classification"}


def test_without_heads_the_base_answers(tmp_path: Path) -> None:
    """Adapters saved without heads are served by the bare base."""
    folder = hub.write_mtl(tmp_path / "a")
    for name in hub.NAMES:
        (folder / name / "head_config.json").unlink()
        (folder / name / "pytorch_model_head.bin").unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.model_class == "BertModel"
    assert {task.kind for task in checkpoint.tasks} == {"headless"}
    assert not checkpoint.heads


def test_a_static_head_is_its_classs_own(tmp_path: Path) -> None:
    """One head for all tasks, stored in every folder."""
    head: hub.State = {
        "classifier.weight": hub.draw(np.random.default_rng(1), 3, HIDDEN),
        "classifier.bias": hub.draw(np.random.default_rng(2), 3),
    }
    facts = {"config": None, "num_labels": 3, "label2id": {"b": 1, "a": 0, "c": 2}}
    for name, state in hub.mtl_states().items():
        hub.write_adapter(
            tmp_path / name, name, state, hub.MTL_CONFIG, head=(facts, head),
            model_class="BertForSequenceClassification",
        )  # fmt: skip
    hub.write_setup(tmp_path, hub.NAMES)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model_class == "BertForSequenceClassification"
    assert {task.labels for task in checkpoint.tasks} == {("a", "b", "c")}
    for stored in checkpoint.heads["classifier"]:
        assert stored is not None
        np.testing.assert_array_equal(stored.weight.numpy(), head["classifier.weight"])


def test_a_language_models_head_replaces_the_bases(tmp_path: Path) -> None:
    """lm_head, one copy per folder, is taken from the checkpoint."""
    head = {"lm_head.weight": hub.draw(np.random.default_rng(1), VOCABULARY, HIDDEN)}
    for name, state in hub.mtl_states().items():
        hub.write_adapter(
            tmp_path / name, name, state, hub.MTL_CONFIG, head=({"config": None}, head),
            model_class="LlamaForCausalLM", model_type="llama",
        )  # fmt: skip
    hub.write_setup(tmp_path, hub.NAMES)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.replaced) == ["lm_head.weight"]
    assert {task.kind for task in checkpoint.tasks} == {"headless"}
    changed = {"lm_head.weight": head["lm_head.weight"] * 2}
    hub.write_state(tmp_path / "task1", "pytorch_model_head", changed, is_safetensors=False)
    with pytest.raises(CheckpointError, match="language-model heads of zeta and task1 differ"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("head_type", ["question_answering", "multiple_choice", "causal_lm"])
def test_other_heads_are_refused(tmp_path: Path, head_type: str) -> None:
    """Heads whose answers are no logits per label are refused by name."""
    folder = hub.write_mtl(tmp_path / "a", head={"head_type": head_type})
    with pytest.raises(AdapterError) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where="head of 'zeta'", found=f"a head of type {head_type!r}")
