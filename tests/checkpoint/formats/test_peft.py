"""PEFT folders: what is read from them, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.checkpoint import Checkpoint, LedgerEntry
from mtl_export.checkpoint.formats.peft import is_peft, read_peft, read_peft_in_order
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, CheckpointError, UsageError
from tests.checkpoint import peft_toys as toys
from tests.checkpoint.messages import assert_whole


def one(
    folder: Path, fields: dict[str, Any] | None = None, extra: Mapping[str, Array] | None = None
) -> Checkpoint:
    """Return an adapter on QUERY with a head of three labels, and ``extra``, read back."""
    stored = {**toys.lora(toys.QUERY), **toys.head(3), **(extra or {})}
    return open_checkpoint(toys.write(folder / "task", stored, fields))


def fates(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what becomes of each tensor, by the end of its key."""
    return {
        entry.tensor.removeprefix("base_model.model."): entry.fate for entry in checkpoint.ledger
    }


def test_one_adapter_is_one_task(tmp_path: Path) -> None:
    """Named after its folder; roles, scaling, head, base, class and the fate of each tensor."""
    checkpoint = one(tmp_path)
    (task,) = checkpoint.tasks
    assert (task.name, task.index, task.kind) == ("task", 0, "single_label_classification")
    assert task.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    (layer,) = checkpoint.layers.values()
    assert (layer.module, layer.embedding) == (toys.QUERY, False)
    assert {role: tensor.shape for role, tensor in layer.tensors.items()} == {
        "down": (2, toys.HIDDEN),
        "up": (toys.HIDDEN, 2),
    }
    assert layer.hyper == {"scaling": 3.0, "alpha": 6.0}
    (head,) = checkpoint.heads["classifier"]
    assert head is not None
    assert head.weight.shape == (3, toys.HIDDEN)
    assert checkpoint.base.id == "toy/bert"
    assert checkpoint.model_class == "AutoModelForSequenceClassification"
    assert (checkpoint.format, checkpoint.family) == ("peft", "lora")
    assert fates(checkpoint) == {
        f"{toys.QUERY}.lora_A.weight": "folded", f"{toys.QUERY}.lora_B.weight": "folded",
        "classifier.weight": "head", "classifier.bias": "head",
    }  # fmt: skip


def test_one_label_is_a_regression(tmp_path: Path) -> None:
    """Transformers' own rule for a head of one label."""
    folder = toys.write(tmp_path / "score", toys.lora(toys.QUERY) | toys.head(1))
    assert read_peft(folder).tasks[0].kind == "regression"


def test_a_pickle_reads_like_safetensors(tmp_path: Path) -> None:
    """adapter_model.bin holds the same."""
    stored = toys.lora(toys.QUERY) | toys.head(3)
    plain = read_peft(toys.write(tmp_path / "a", stored))
    pickled = read_peft(toys.write(tmp_path / "b", stored, pickled=True))
    for role, tensor in plain.layers[toys.QUERY].tensors.items():
        other = pickled.layers[toys.QUERY].tensors[role]
        np.testing.assert_array_equal(tensor.numpy(), other.numpy())
    assert set(plain.ledger) == set(pickled.ledger)


def folders(tmp_path: Path) -> Path:
    """Write two adapters of unequal rank, family and head, one folder each."""
    toys.write(tmp_path / "all" / "zeta", toys.lora(toys.QUERY) | toys.head(2))
    toys.write(
        tmp_path / "all" / "alpha",
        toys.lora(toys.NARROW, rank=3, lora_magnitude_vector="O") | toys.head(4),
        {"r": 3, "use_dora": True},
    )
    return tmp_path / "all"


def test_several_adapters_are_tasks_in_the_order_given(tmp_path: Path) -> None:
    """Ids follow --tasks, not the alphabet; every adapter stays a checkpoint of its own."""
    checkpoint = open_checkpoint(folders(tmp_path), task_names=["zeta", "alpha"])
    assert [(task.name, task.index) for task in checkpoint.tasks] == [("zeta", 0), ("alpha", 1)]
    assert [len(task.labels) for task in checkpoint.tasks] == [2, 4]
    assert [member.family for member in checkpoint.members] == ["lora", "dora"]
    assert (checkpoint.family, checkpoint.layers) == ("lora", {})
    assert checkpoint.notes == ("the adapters are of several families: zeta lora, alpha dora",)
    assert f"alpha/base_model.model.{toys.NARROW}.lora_A.weight" in {
        entry.tensor for entry in checkpoint.ledger
    }
    turned = open_checkpoint(tmp_path / "all", task_names=["alpha", "zeta"])
    assert turned.sha256 == checkpoint.sha256, "the files are the same"


def test_several_adapters_without_an_order_are_refused(tmp_path: Path) -> None:
    """Sorted names are no ids: the user says which is which."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folders(tmp_path))
    assert_whole(caught.value, where="all", found="alpha, zeta", expected="order")
    assert caught.value.fix.startswith("Pass --tasks alpha,zeta")


@pytest.mark.parametrize("names", [["zeta"], ["zeta", "alpha", "mid"], ["zeta", "Alpha"]])
def test_other_names_are_refused(tmp_path: Path, names: list[str]) -> None:
    """A task that is not there, or one left out, changes every id."""
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folders(tmp_path), task_names=names)
    assert_whole(caught.value, where="--tasks", found="alpha, zeta")


def test_the_root_adapter_is_called_default(tmp_path: Path) -> None:
    """A PeftModel with several adapters; the trainer's checkpoint folders are no tasks."""
    root = toys.write(tmp_path / "model", toys.lora(toys.QUERY) | toys.head(2))
    toys.write(root / "checkpoint-500", toys.lora(toys.QUERY) | toys.head(2))
    assert [task.name for task in read_peft(root).tasks] == ["model"]
    toys.write(root / "other", toys.lora(toys.QUERY) | toys.head(3))
    checkpoint = read_peft_in_order(root, ["other", "default"])
    assert [len(task.labels) for task in checkpoint.tasks] == [3, 2]


def test_a_single_adapter_takes_any_name(tmp_path: Path) -> None:
    """With one task there is nothing to mix up."""
    one(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "task", task_names=["spam"])
    assert [task.name for task in checkpoint.tasks] == ["spam"]


def test_alpha_may_be_repeated_but_not_changed(tmp_path: Path) -> None:
    """The config knows alpha; another one on the command line is refused, in members too."""
    path = folders(tmp_path)
    assert open_checkpoint(path, task_names=["zeta", "alpha"], alpha=6.0).tasks
    with pytest.raises(UsageError) as caught:
        open_checkpoint(path, task_names=["zeta", "alpha"], alpha=8.0)
    assert_whole(caught.value, where="--alpha 8", found="6")


def test_trained_biases_take_the_bases_place(tmp_path: Path) -> None:
    """bias="all": of adapted layers, of others and of norms; copies beside heads are dead."""
    bias, norm = np.ones(toys.HIDDEN, np.float32), "bert.embeddings.LayerNorm.bias"
    extra = {
        f"{toys.QUERY}.base_layer.bias": bias, f"{toys.NARROW}.bias": bias, norm: bias,
        "classifier.modules_to_save.bias": toys.head(3)["classifier.bias"],
        "classifier.original_module.bias": np.ones(3, np.float32),
    }  # fmt: skip
    checkpoint = one(tmp_path, {"bias": "all"}, extra=extra)
    assert set(checkpoint.replaced) == {f"{toys.QUERY}.bias", f"{toys.NARROW}.bias", norm}
    dead = {name: fate for name, fate in fates(checkpoint).items() if "module" in name}
    assert set(dead.values()) == {"known-dead"}
    assert len(dead) == 2


def test_a_copy_that_differs_is_refused(tmp_path: Path) -> None:
    """Two values for one bias: neither is guessed."""
    with pytest.raises(CheckpointError, match=r"classifier\.modules_to_save\.bias"):
        one(tmp_path, extra={"classifier.modules_to_save.bias": np.ones(3, np.float32)})


def test_a_bias_that_is_added_to_is_handed_to_the_family(tmp_path: Path) -> None:
    """lora_bias with bias="all": b' = trained b + s b_B is the family's sum."""
    bias = np.ones(toys.HIDDEN, np.float32)
    extra = {f"{toys.QUERY}.lora_B.bias": bias, f"{toys.QUERY}.base_layer.bias": 2 * bias}
    checkpoint = one(tmp_path, {"lora_bias": True, "bias": "all"}, extra=extra)
    assert set(checkpoint.layers[toys.QUERY].tensors) == {"down", "up", "up_bias", "bias"}
    assert not checkpoint.replaced


def test_embeddings_are_layers_of_one_hot_inputs(tmp_path: Path) -> None:
    """lora_embedding_A and _B; an untrained copy of the base is only a check."""
    copy = np.ones((toys.VOCABULARY, toys.HIDDEN), np.float32)
    extra = toys.lora(toys.WORDS) | {f"{toys.WORDS}.base_layer.weight": copy}
    checkpoint = one(tmp_path, extra=extra)
    layer = checkpoint.layers[toys.WORDS]
    assert layer.embedding
    assert layer.tensors["down"].shape == (2, toys.VOCABULARY)
    assert list(checkpoint.base_copies) == [f"{toys.WORDS}.weight"]


@pytest.mark.parametrize("given", [[4, 1], {"word_embeddings": [4, 1]}, {toys.WORDS: [4, 1]}])
def test_trained_tokens_are_new_rows(tmp_path: Path, given: object) -> None:
    """In the order of the index list, whatever form it has."""
    key = f"{toys.WORDS}.token_adapter.trainable_tokens_delta"
    values = np.ones((2, toys.HIDDEN), np.float32)
    checkpoint = one(tmp_path, {"trainable_token_indices": given}, extra={key: values})
    rows = checkpoint.rows[f"{toys.WORDS}.weight"]
    assert rows.indices == (4, 1)
    np.testing.assert_array_equal(rows.values.numpy(), values)


@pytest.mark.parametrize("given", [None, [4], {"position_embeddings": [4, 1]}])
def test_trained_tokens_without_their_indices_are_refused(tmp_path: Path, given: object) -> None:
    """Rows whose place nobody knows."""
    key = f"{toys.WORDS}.token_adapter.trainable_tokens_delta"
    with pytest.raises(CheckpointError) as caught:
        one(
            tmp_path,
            {"trainable_token_indices": given},
            extra={key: np.ones((2, toys.HIDDEN), np.float32)},
        )
    assert_whole(caught.value, where="adapter_model", found="2 trained rows of", expected="row")


def test_a_saved_module_inside_the_model_is_replaced(tmp_path: Path) -> None:
    """The pooler is no head; the classifier of two layers is, and its last layer has the labels."""
    square = np.ones((toys.HIDDEN, toys.HIDDEN), np.float32)
    stored = toys.lora(toys.QUERY) | toys.head(2, module="classifier.out_proj")
    stored |= {"classifier.dense.weight": square, "bert.pooler.dense.weight": square}
    checkpoint = read_peft(toys.write(tmp_path / "a", stored))
    assert set(checkpoint.heads) == {"classifier.dense", "classifier.out_proj"}
    assert len(checkpoint.tasks[0].labels) == 2
    assert set(checkpoint.replaced) == {"bert.pooler.dense.weight"}


def test_heads_without_a_last_layer_are_refused(tmp_path: Path) -> None:
    """Which of several saved layers has the labels is not guessed."""
    stored = toys.lora(toys.QUERY) | toys.head(2, module="a") | toys.head(3, module="b")
    with pytest.raises(CheckpointError, match="the saved modules a, b"):
        read_peft(toys.write(tmp_path / "a", stored))


def test_a_language_model_has_no_head_of_its_own(tmp_path: Path) -> None:
    """CAUSAL_LM: what is saved takes the base's place."""
    stored = toys.lora(toys.QUERY) | toys.head(2, module="lm_head")
    checkpoint = read_peft(toys.write(tmp_path / "a", stored, {"task_type": "CAUSAL_LM"}))
    assert (checkpoint.heads, checkpoint.tasks[0].kind) == ({}, "headless")
    assert set(checkpoint.replaced) == {"lm_head.weight", "lm_head.bias"}


@pytest.mark.parametrize(
    "key",
    [
        "bert.encoder.lora_lambdas", f"{toys.QUERY}.lora_A.default.weight",
        f"{toys.QUERY}.lora_A.bias", f"{toys.QUERY}.lora_C.weight", "classifier.running_mean",
        "x.modules_to_save.weight", f"{toys.WORDS}.token_adapter.base_layer.weight",
    ],
)  # fmt: skip
def test_a_key_that_no_rule_fits_is_refused(tmp_path: Path, key: str) -> None:
    """Nothing is dropped silently."""
    with pytest.raises(CheckpointError) as caught:
        one(tmp_path, extra={key: np.ones(3, np.float32)})
    assert_whole(caught.value, where="adapter_model", found=f"base_model.model.{key}")


def test_an_empty_tensor_is_refused(tmp_path: Path) -> None:
    """A save under ZeRO-3 that did not gather its shards."""
    with pytest.raises(CheckpointError) as caught:
        one(tmp_path, extra={f"{toys.NARROW}.lora_A.weight": np.ones((0, 4), np.float32)})
    assert_whole(caught.value, where="adapter_model", found="F32 [0, 4]")
    assert "gather" in caught.value.fix


def test_a_rank_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    """Alpha / r would be another number."""
    with pytest.raises(CheckpointError) as caught:
        one(tmp_path, {"rank_pattern": {"self.query": 5}})
    assert_whole(caught.value, where="adapter_model", found="rank 2, not 5")


def test_convolutions_are_refused(tmp_path: Path) -> None:
    """They are named; the normal form holds matrices."""
    conv = {"conv.lora_A.weight": np.ones((2, 3, 1, 1), np.float32)}
    with pytest.raises(AdapterError) as caught:
        one(tmp_path, extra=conv)
    assert_whole(caught.value, where="adapter_model", found="convolutions: conv")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """A config alone is no adapter; neither are weights without an adapted layer."""
    one(tmp_path)
    (tmp_path / "task" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        read_peft(tmp_path / "task")
    assert_whole(caught.value, where="task", found="no adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no adapted layer"):
        read_peft(toys.write(tmp_path / "b", toys.head(2)))


def test_models_of_different_kinds_are_not_one_checkpoint(tmp_path: Path) -> None:
    """A classifier and a language model cannot be one graph."""
    path = folders(tmp_path)
    shutil.rmtree(path / "alpha")
    toys.write(path / "alpha", toys.lora(toys.QUERY), {"task_type": "CAUSAL_LM"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, task_names=["zeta", "alpha"])
    assert_whole(caught.value, where="all", found="AutoModelForCausalLM")


def test_fields_of_a_newer_peft_are_said_not_fatal(tmp_path: Path) -> None:
    """Only those that are set; the ledger keeps to tensors."""
    checkpoint = one(tmp_path, {"use_new_thing": True, "other_new_thing": None})
    (note,) = checkpoint.notes
    assert "use_new_thing" in note
    assert "other_new_thing" not in note
    assert all(isinstance(entry, LedgerEntry) for entry in checkpoint.ledger)


def test_other_folders_are_not_mine(tmp_path: Path) -> None:
    """An adapter_config.json without peft_type is somebody else's."""
    assert not is_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"format": "mtl-export"}')
    assert not is_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert not is_peft(tmp_path)
    assert not is_peft(tmp_path / "adapter_config.json")
