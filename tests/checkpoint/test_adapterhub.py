"""AdapterHub checkpoints: every layout, the numbers, the faults, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.adapters.binding import bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import Checkpoint, Readout
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import (
    AdapterError,
    BaseModelError,
    CheckpointError,
    MtlExportError,
    UsageError,
)
from tests.checkpoint import adapterhub_toys as hub
from tests.checkpoint.messages import assert_whole
from tests.factories import HIDDEN, VOCABULARY, toy_base

QUERY = "bert.encoder.layer.0.attention.self.query"
ADAPTER_BIN, CONFIG = "pytorch_adapter.bin", "adapter_config.json"


def names(checkpoint: Checkpoint) -> list[str]:
    """Return the tasks' names in id order."""
    return [task.name for task in checkpoint.tasks]


def paper_delta(
    state: hub.State,
    name: str,
    module: str,
    *,
    alpha: float = hub.ALPHA,
    tau: float = hub.TAU,
    is_averaged: bool = False,
    is_scaled: bool = True,
    is_reversed: bool = False,
) -> Array:
    """Return MTL-LoRA's delta of one module, float64, in plain loops."""
    down, up, diagonal, mixing = (
        state[f"{module}.loras.{name}.{key}"].astype(np.float64)
        for key in ("lora_A", "lora_B", "task_specific.values", "weights")
    )
    powers = [np.exp((w - max(mixing)) / tau) for w in mixing]
    shares = [1 / len(mixing) if is_averaged else power / sum(powers) for power in powers]
    diagonal = diagonal[::-1] if is_reversed else diagonal
    delta = np.zeros((up.shape[1], down.shape[1]))
    for share, one in zip(shares, up, strict=True):
        for rank in range(len(diagonal)):
            delta += share * diagonal[rank] * np.outer(one[:, rank], down[rank])
    return delta * (alpha / len(diagonal) if is_scaled else 1.0)


@pytest.mark.parametrize("is_safetensors", [False, True])
def test_a_setup_has_the_order_of_the_tasks(tmp_path: Path, is_safetensors: bool) -> None:
    """A setup folder opens by itself: order, labels, kinds, base, class."""
    folder = hub.write_mtl(tmp_path / "a", is_safetensors=is_safetensors)
    checkpoint = open_checkpoint(folder)
    assert names(checkpoint) == list(hub.NAMES)
    assert [task.labels for task in checkpoint.tasks] == [
        ("L0", "L1"),
        ("L0", "L1", "L2", "L3"),
        ("L0",),
    ]
    assert [task.kind for task in checkpoint.tasks] == [
        "single_label_classification",
        "single_label_classification",
        "regression",
    ]
    assert (checkpoint.format, checkpoint.family) == ("adapterhub", "mtl_lora")
    assert checkpoint.base.id == "toy/bert"
    assert not checkpoint.members
    assert sorted(checkpoint.layers) == sorted(hub.MODULES)
    assert checkpoint.sha256 == open_checkpoint(folder, task_names=hub.NAMES).sha256


def test_every_delta_is_the_papers(tmp_path: Path) -> None:
    """B, mixed with the stored sharpness, times the diagonal, times A, times alpha / r."""
    adapters = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    states = hub.mtl_states()
    for module in hub.MODULES:
        for index, name in enumerate(hub.NAMES):
            expected = paper_delta(states[name], name, module)
            np.testing.assert_allclose(adapters.layers[module].delta(index), expected, atol=1e-12)


@pytest.mark.parametrize(
    "fault",
    [{"is_reversed": True}, {"tau": hub.TAU * 1.5}, {"is_averaged": True}, {"is_scaled": False}],
    ids=["Lambda in another order", "tau changed", "B averaged", "scale dropped"],
)
def test_a_wrong_formula_is_seen(tmp_path: Path, fault: dict[str, Any]) -> None:
    """Each fault moves every task's delta by far more than any tolerance."""
    adapters = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    states = hub.mtl_states()
    for index, name in enumerate(hub.NAMES):
        wrong = paper_delta(states[name], name, QUERY, **fault)
        assert np.abs(adapters.layers[QUERY].delta(index) - wrong).max() > 1e-2


def test_permuted_tasks_are_seen(tmp_path: Path) -> None:
    """No two tasks have the same delta or head."""
    adapters = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    layer = adapters.layers[QUERY]
    for one, other in ((0, 1), (1, 2), (2, 0)):
        assert np.abs(layer.delta(one) - layer.delta(other)).max() > 1e-2


@pytest.mark.parametrize("edit", ["weights_sharpness", "alpha"])
def test_the_config_decides_sharpness_and_scale(tmp_path: Path, edit: str) -> None:
    """Changing a number in every adapter_config.json changes the delta accordingly."""
    folder = hub.write_mtl(tmp_path / "a")
    for name in hub.NAMES:
        hub.edit_json(folder / name / CONFIG, **{edit: 0.9})
    adapters = read_adapters(open_checkpoint(folder))
    state = hub.mtl_states()["zeta"]
    expected = (
        paper_delta(state, "zeta", QUERY, alpha=0.9)
        if edit == "alpha"
        else paper_delta(state, "zeta", QUERY, tau=0.9)
    )
    np.testing.assert_allclose(adapters.layers[QUERY].delta(0), expected, atol=1e-12)


def test_half_precision_does_not_overflow(tmp_path: Path) -> None:
    """Default mixing weights at tau = 0.05 are exp(20) = Inf in half precision, not here."""
    folder = hub.write_mtl(tmp_path / "a", config={"weights_sharpness": 0.05})
    states = hub.mtl_states()
    for name in hub.NAMES:
        half = {key: value.astype(np.float16) for key, value in states[name].items()}
        for key in half:
            half[key] = np.ones_like(half[key]) if key.endswith(".weights") else half[key]
        hub.write_state(folder / name, "pytorch_adapter", half, is_safetensors=False)
        states[name] = half
    adapters = read_adapters(open_checkpoint(folder))
    expected = paper_delta(states["task1"], "task1", QUERY, tau=0.05)
    np.testing.assert_allclose(adapters.layers[QUERY].delta(1), expected, atol=1e-12)


def test_mixed_dtypes_are_normal(tmp_path: Path) -> None:
    """dtype="bfloat16" in the config casts A and B alone; each tensor is read as it is."""
    folder = hub.write_mtl(tmp_path / "a")
    state = {key: torch.from_numpy(value) for key, value in hub.mtl_states()["zeta"].items()}
    for name in hub.NAMES:
        own = {
            key.replace(".zeta.", f".{name}."): value.bfloat16() if "lora_" in key else value
            for key, value in state.items()
        }
        torch.save(own, folder / name / ADAPTER_BIN)
    layer = open_checkpoint(folder).layers[QUERY]
    assert [layer.tensors[r].dtype for r in ("down", "up", "lambda")] == ["BF16", "BF16", "F32"]


def test_folders_alone_have_lost_the_order(tmp_path: Path) -> None:
    """Without a setup file the order must be given, and is then the tasks' order."""
    folder = hub.write_mtl(tmp_path / "a", has_setup=False)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where=str(folder), found="no adapter_setup.json",
                 expected="the tasks in id order")  # fmt: skip
    assert "--tasks task1,task10,zeta" in caught.value.fix
    given = open_checkpoint(folder, task_names=hub.NAMES)
    assert names(given) == list(hub.NAMES)
    reference = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "b")))
    for index in range(3):
        np.testing.assert_array_equal(
            read_adapters(given).layers[QUERY].delta(index), reference.layers[QUERY].delta(index)
        )


@pytest.mark.parametrize("order", [("zeta", "task1"), ("zeta", "task1", "other")])
def test_an_order_of_other_names_is_refused(tmp_path: Path, order: tuple[str, ...]) -> None:
    """--tasks must be the folders' names."""
    folder = hub.write_mtl(tmp_path / "a", has_setup=False)
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folder, task_names=order)
    assert_whole(caught.value, where="--tasks", found="3 adapters: task1, task10, zeta")


def test_a_setup_is_not_overruled(tmp_path: Path) -> None:
    """--tasks in another order than the setup's contradicts it."""
    folder = hub.write_mtl(tmp_path / "a")
    with pytest.raises(UsageError, match="the checkpoint has 3 tasks: zeta, task1, task10"):
        open_checkpoint(folder, task_names=("task1", "zeta", "task10"))


def test_one_adapter_needs_no_order(tmp_path: Path) -> None:
    """A single adapter's folder, and a folder of one, are one task."""
    folder = hub.write_mtl(tmp_path / "a")
    alone = open_checkpoint(folder / "task1")
    assert names(alone) == ["task1"]
    shutil.copytree(folder / "task1", tmp_path / "b" / "mine")
    assert names(open_checkpoint(tmp_path / "b")) == ["mine"]
    expected = paper_delta(hub.mtl_states()["task1"], "task1", QUERY)
    for path in (folder / "task1", tmp_path / "b"):
        delta = read_adapters(open_checkpoint(path)).layers[QUERY].delta(0)
        np.testing.assert_allclose(delta, expected, atol=1e-12)


def test_unequal_factors_become_members(tmp_path: Path) -> None:
    """Tasks that never shared A and B are exported all the same, each with its own."""
    folder = hub.write_mtl(tmp_path / "a", is_shared=False)
    checkpoint = open_checkpoint(folder)
    assert [names(member) for member in checkpoint.members] == [["zeta"], ["task1"], ["task10"]]
    states, adapters = hub.mtl_states(is_shared=False), read_adapters(checkpoint)
    for index, name in enumerate(hub.NAMES):
        expected = paper_delta(states[name], name, QUERY)
        np.testing.assert_allclose(adapters.layers[QUERY].delta(index), expected, atol=1e-12)
    assert not [e for e in checkpoint.ledger if "equal" in e.reason]


def test_different_numbers_become_members(tmp_path: Path) -> None:
    """Equal factors with an alpha of one task's own are not one set of factors."""
    folder = hub.write_mtl(tmp_path / "a")
    hub.edit_json(folder / "task1" / CONFIG, alpha=9)
    adapters = read_adapters(checkpoint := open_checkpoint(folder))
    assert len(checkpoint.members) == 3
    expected = paper_delta(hub.mtl_states()["task1"], "task1", QUERY, alpha=9)
    np.testing.assert_allclose(adapters.layers[QUERY].delta(1), expected, atol=1e-12)


def test_every_tensor_has_a_fate(tmp_path: Path) -> None:
    """The ledger names each key of each file once, and why a dead one is dead."""
    checkpoint = open_checkpoint(hub.write_mtl(tmp_path / "a"))
    fates = {entry.tensor: entry for entry in checkpoint.ledger}
    assert len(fates) == len(checkpoint.ledger) == 3 * (4 * 4 + 12)
    key = f"{QUERY}.loras.NAME.lora_A"
    assert fates[f"zeta/{key.replace('NAME', 'zeta')}"].fate == "folded"
    copy = fates[f"task1/{key.replace('NAME', 'task1')}"]
    assert (copy.fate, copy.reason) == ("known-dead", "equal to zeta's, bit for bit")
    assert fates[f"task1/{QUERY}.loras.task1.weights"].fate == "stacked"
    assert fates["task1/heads.task1.4.bias"].fate == "head"
    assert fates["task1/heads.task10.4.bias"].reason == "another task's head, saved along"


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
    assert checkpoint.readout == readout
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


SINGLES = {
    "lora": (hub.LORA_CONFIG, "lora"),
    "dora": (hub.DORA_CONFIG, "adapterhub_dora"),
    "ia3": (hub.IA3_CONFIG, "ia3"),
}


@pytest.mark.parametrize("kind", SINGLES)
def test_single_adapters_become_members(tmp_path: Path, kind: str) -> None:
    """LoRA, DoRA and (IA)^3 adapters of one base are tasks with factors of their own."""
    config, family = SINGLES[kind]
    for index, name in enumerate(hub.NAMES):
        hub.write_adapter(tmp_path / name, name, hub.single_state(name, config, index), config)
    checkpoint = open_checkpoint(tmp_path, task_names=hub.NAMES)
    assert {member.family for member in checkpoint.members} == {family}
    scaling = 2.0 if kind == "ia3" else hub.ALPHA / hub.RANK
    assert checkpoint.members[1].layers[QUERY.removeprefix("bert.")].hyper["scaling"] == scaling
    assert family == open_checkpoint(tmp_path / "zeta").family


@pytest.mark.parametrize(
    ("version", "scaling"),
    [
        ("adapters.0.2.1", 1.0),
        ("adapters.1.0.1", 1.0),
        ("adapters.1.1.0.dev0", 1.0),
        ("adapters.1.1.0", hub.ALPHA / hub.RANK),
        ("adapters.1.10.0", hub.ALPHA / hub.RANK),
        ("3.2.1", hub.ALPHA / hub.RANK),
        ("", hub.ALPHA / hub.RANK),
    ],
)
def test_old_versions_ignored_alpha(tmp_path: Path, version: str, scaling: float) -> None:
    """Before 1.1.0 a LoRA was trained with s = 1 whatever its config says."""
    state = hub.single_state("zeta", hub.LORA_CONFIG)
    hub.write_adapter(tmp_path / "a", "zeta", state, hub.LORA_CONFIG, version=version)
    layer = open_checkpoint(tmp_path / "a").layers[QUERY.removeprefix("bert.")]
    assert layer.hyper["scaling"] == pytest.approx(scaling)


REFUSALS: dict[str, tuple[type[MtlExportError], str, dict[str, Any]]] = {
    "gating": (AdapterError, "use_gating", {"use_gating": True}),
    "full Lambda": (AdapterError, "'linear'", {"task_specific_matrix_type": "linear"}),
    "DoRA": (AdapterError, "MTL-LoRA with use_dora", {"use_dora": True}),
    "VeRA": (AdapterError, "VeRA", {"vera_d": 0.1}),
    "DVoRA": (AdapterError, "VeRA or DVoRA", {"vera_b": 0.1, "architecture": "lora"}),
    "union": (AdapterError, "architecture 'union'", {"architecture": "union"}),
    "prefix": (AdapterError, "'prefix_tuning'", {"architecture": "prefix_tuning"}),
    "scaled": (AdapterError, "composition_mode 'scale'", {"composition_mode": "scale"}),
    "scaled LoRA": (AdapterError, "no (IA)^3",
                    {"composition_mode": "scale", "architecture": "lora"}),
    "no alpha": (CheckpointError, "alpha is None", {"alpha": None}),
    "tau zero": (CheckpointError, "weights_sharpness is 0", {"weights_sharpness": 0}),
    "another rank": (CheckpointError, "with r = 4", {"r": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_supported_is_refused_with_its_reason(tmp_path: Path, case: str) -> None:
    """Each refusal says what it found, why, and what to do instead."""
    kind, found, changes = REFUSALS[case]
    folder = hub.write_mtl(tmp_path / "a", config=changes)
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where="zeta", found=found)
    assert caught.value.why


def broken(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """Return a maker of a checkpoint with one thing broken."""

    def make(folder: Path) -> Path:
        hub.write_mtl(folder)
        change(folder)
        return folder

    return make


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the adapter file of one task."""
    file = folder / ADAPTER_BIN
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


BREAKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a tensor too many": (
        broken(lambda f: resave(f / "task1", lambda s: s.update(stray=torch.ones(2)))),
        "unknown 'stray'",
    ),
    "a tensor missing": (
        broken(lambda f: resave(f / "task1", lambda s: s.pop(f"{QUERY}.loras.task1.weights"))),
        f"missing {QUERY}.loras.task1.weights",
    ),
    "no weights": (
        broken(lambda f: (f / "task1" / ADAPTER_BIN).unlink()),
        "neither adapter.safetensors nor pytorch_adapter.bin",
    ),
    "both kinds of weights": (
        broken(lambda f: hub.write_state(f / "task1", "pytorch_adapter",
                                         hub.mtl_states()["task1"], is_safetensors=True)),
        "both adapter.safetensors and pytorch_adapter.bin",
    ),
    "no folder": (broken(lambda f: shutil.rmtree(f / "task1")), "no adapter_config.json"),
    "half a head": (
        broken(lambda f: (f / "task1" / "head_config.json").unlink()),
        "only one of head_config.json",
    ),
    "labels": (
        broken(lambda f: hub.edit_json(f / "task1" / "head_config.json", label2id={"a": 0})),
        "label2id numbers 1 labels",
    ),
    "layers": (
        broken(lambda f: hub.edit_json(f / "task1" / "head_config.json", layers=3)),
        f"weights [({HIDDEN}, {HIDDEN}), (4, {HIDDEN})]",
    ),
    "different heads": (
        broken(lambda f: hub.edit_json(f / "task1" / "head_config.json",
                                       activation_function="gelu")),
        "task1: 2 layers on first (gelu)",
    ),
    "a stack": (broken(lambda f: hub.write_setup(f, hub.NAMES, "Stack")), "setup is Stack"),
    "another class": (
        broken(lambda f: hub.edit_json(f / "task1" / CONFIG, model_class="RobertaAdapterModel")),
        "task1 of RobertaAdapterModel",
    ),
    "a preset": (
        broken(lambda f: hub.edit_json(f / "task1" / CONFIG, config="seq_bn")), "'seq_bn'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_what_is_broken_is_refused(tmp_path: Path, case: str) -> None:
    """Nothing is guessed where files are missing or contradict each other."""
    make, found = BREAKS[case]
    folder = make(tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where=str(folder), found=found)


@pytest.mark.parametrize("head_type", ["question_answering", "multiple_choice", "causal_lm"])
def test_other_heads_are_refused(tmp_path: Path, head_type: str) -> None:
    """Heads whose answers are no logits per label are refused by name."""
    folder = hub.write_mtl(tmp_path / "a", head={"head_type": head_type})
    with pytest.raises(AdapterError) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where="head of 'zeta'", found=f"a head of type {head_type!r}")


def write_whole(folder: Path, base: Path, *, changed: str = "") -> Path:
    """Write what ``save_pretrained`` writes: everything in one file, tied copies included."""
    from safetensors.torch import load_file

    state = {f"bert.{key}": value for key, value in load_file(base / "model.safetensors").items()}
    state["bert.prompt_tuning.base_model_embeddings.weight"] = state[
        "bert.embeddings.word_embeddings.weight"
    ]
    heads = {}
    for index, (name, own) in enumerate(hub.mtl_states().items()):
        heads[name] = hub.head_config(hub.LABELS[index])
        flexible = hub.head_state(name, heads[name], index)
        state |= {key: torch.from_numpy(value) for key, value in {**own, **flexible}.items()}
    for module in hub.MODULES:
        for key in ("lora_A", "lora_B"):
            shared = f"{module}.shared_parameters.{','.join(hub.NAMES)}.{key}"
            state[shared] = state[f"{module}.loras.zeta.{key}"]
    if changed:
        state[changed] = state[changed] * 2
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    adapters = {name: "hash" for name in sorted(hub.NAMES)}
    config = {
        "architectures": ["BertAdapterModel"], "model_type": "bert", "prediction_heads": heads,
        "adapters": {"adapters": adapters, "config_map": {"hash": hub.MTL_CONFIG}},
    }  # fmt: skip
    hub.write_json(folder / "config.json", config)
    return folder


def test_a_whole_model_is_its_adapters(tmp_path: Path) -> None:
    """A whole model in one pickle has the same deltas and heads as the folders per task."""
    base = toy_base(tmp_path / "base")
    folder = write_whole(tmp_path / "whole", base)
    with pytest.raises(CheckpointError, match=r"names in config\.json alone do not keep"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, task_names=hub.NAMES)
    found = read_adapters(checkpoint)
    expected = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    for module, layer in expected.layers.items():
        for index in range(3):
            np.testing.assert_array_equal(found.layers[module].delta(index), layer.delta(index))
    for module, heads in expected.heads.items():
        for own, head in zip(found.heads[module], heads, strict=True):
            np.testing.assert_array_equal(own.weight, head.weight)
    bind(checkpoint, found, open_base(str(base)))
    keys = torch.load(folder / "pytorch_model.bin", weights_only=True).keys()
    assert sorted(entry.tensor for entry in checkpoint.ledger) == sorted(keys)


def test_a_whole_model_on_another_base_is_refused(tmp_path: Path) -> None:
    """The base inside the file and the base given must be the same, number for number."""
    base = toy_base(tmp_path / "base")
    folder = write_whole(tmp_path / "whole", base, changed="bert.pooler.dense.bias")
    checkpoint = open_checkpoint(folder, task_names=hub.NAMES)
    with pytest.raises(BaseModelError, match=r"'bert.pooler.dense.bias' has other values"):
        bind(checkpoint, read_adapters(checkpoint), open_base(str(base)))


def test_unlisted_adapters_in_a_whole_model_are_refused(tmp_path: Path) -> None:
    """A tensor of an adapter that config.json does not name has no fate."""
    folder = write_whole(tmp_path / "whole", toy_base(tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    del config["adapters"]["adapters"]["task1"]
    hub.write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=r"that config.json does not list: .*loras.task1"):
        open_checkpoint(folder, task_names=("zeta", "task10"))


def test_numbers_given_again_must_agree(tmp_path: Path) -> None:
    """--alpha and --temperature cannot overrule the config, of members neither."""
    shared = hub.write_mtl(tmp_path / "a")
    open_checkpoint(shared, alpha=float(hub.ALPHA), temperature=hub.TAU)
    unshared = hub.write_mtl(tmp_path / "b", is_shared=False)
    for folder in (shared, unshared):
        with pytest.raises(UsageError, match="the checkpoint itself says 5"):
            open_checkpoint(folder, alpha=9.0)


def test_peft_folders_are_not_ours(tmp_path: Path) -> None:
    """PEFT uses the same file name with other keys."""
    hub.write_json(tmp_path / CONFIG, {"peft_type": "LORA", "r": 8})
    with pytest.raises(MtlExportError) as caught:
        open_checkpoint(tmp_path)
    assert "adapterhub" not in str(caught.value)
