"""Names for the outputs of heads that differ, and how our own folder keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.checkpoint import Readout, TaskKind
from mtl_export.checkpoint.formats.own_folder import CONFIG_FILE, read_folder, store_checkpoint
from mtl_export.checkpoint.outputs import BARE, named_outputs
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import CheckpointError
from tests.checkpoint import adapterhub_toys as hub
from tests.checkpoint.own_toys import assert_same
from tests.factories import HIDDEN
from tests.graph.mixed_heads import NAMES, OUTPUTS, write_mixed

FIRST, LAST = Readout("first", ("tanh",)), Readout("last", ())
TOKENS = Readout("tokens", ())


def test_names_follow_what_a_head_gives() -> None:
    """One name for one computation and word; a second computation of a word is numbered."""
    heads: list[tuple[Readout, TaskKind]] = [
        (FIRST, "single_label_classification"),
        (FIRST, "multi_label_classification"),
        (LAST, "single_label_classification"),
        (FIRST, "regression"),
        (TOKENS, "single_label_classification"),
        (BARE, "headless"),
        (LAST, "single_label_classification"),
    ]
    named = named_outputs(heads)
    assert [one.name for one in named] == [
        "classification",
        "classification",
        "classification_2",
        "regression",
        "token_classification",
        "last_hidden_state",
        "classification_2",
    ]
    assert named[0].modules == ("head.classification.0", "head.classification.1")
    assert named[5].modules == ()


@pytest.mark.parametrize("is_shared", [True, False])
def test_our_own_folder_keeps_them(tmp_path: Path, *, is_shared: bool) -> None:
    """Written and read again a checkpoint is the same: outputs, heads, and where there is none."""
    checkpoint = open_checkpoint(write_mixed(tmp_path / "hub", is_shared=is_shared))
    store_checkpoint(tmp_path / "own", checkpoint)
    again = read_folder(tmp_path / "own")
    assert_same(again, checkpoint)
    assert {task.name: task.output for task in again.tasks} == OUTPUTS
    if is_shared:
        owners = {
            module: [name for name, head in zip(NAMES, heads, strict=True) if head]
            for module, heads in again.heads.items()
        }
        assert owners["head.classification.1"] == ["topic", "mood"]
        assert owners["head.token_classification.0"] == ["entities"]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"outputs": "all"}, "outputs beside a readout"),
    "beside a readout": (
        {"readout": {"pooling": "first", "activations": []}},
        "outputs beside a readout",
    ),
    "none": ({"outputs": []}, "outputs is []"),
    "a name with a dot": (
        {"outputs": [{"name": "a.b", "pooling": "first", "activations": [], "is_bare": False}]},
        "output {'name': 'a.b'",
    ),
    "one left out": (
        {"outputs": [{"name": "regression", "pooling": "first", "activations": [],
                      "is_bare": False}]},
        "described are ['regression']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_outputs_that_contradict_the_tasks_are_refused(tmp_path: Path, case: str) -> None:
    """Every task has one output, and every output is described once."""
    store_checkpoint(tmp_path / "own", open_checkpoint(write_mixed(tmp_path / "hub")))
    changes, found = BROKEN[case]
    file = tmp_path / "own" / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError) as caught:
        read_folder(tmp_path / "own")
    assert found in caught.value.problem


def test_outputs_that_nobody_describes_are_refused(tmp_path: Path) -> None:
    """A task's output is no more than a word where the folder does not say what it is."""
    store_checkpoint(tmp_path / "own", open_checkpoint(write_mixed(tmp_path / "hub")))
    file = tmp_path / "own" / CONFIG_FILE
    config = json.loads(file.read_text())
    del config["outputs"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'regression' of a task is not described"):
        read_folder(tmp_path / "own")


def test_a_head_of_another_output_is_refused(tmp_path: Path) -> None:
    """A task that answers elsewhere must bring no numbers for this head."""
    checkpoint = open_checkpoint(write_mixed(tmp_path / "hub"))
    store_checkpoint(tmp_path / "own", checkpoint)
    file = tmp_path / "own" / CONFIG_FILE
    config = json.loads(file.read_text())
    config["tasks"][0]["output"] = "classification_2"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing 'heads\.0\.head\.classification_2\.0"):
        read_folder(tmp_path / "own")


def test_heads_of_another_function_are_another_output(tmp_path: Path) -> None:
    """The same layers with another function between them are another computation."""
    folder = hub.write_mtl(tmp_path / "a")
    hub.edit_json(folder / "task1" / "head_config.json", activation_function="gelu")
    checkpoint = open_checkpoint(folder)
    outputs = [task.output for task in checkpoint.tasks]
    assert outputs == ["classification", "classification_2", "regression"]


def test_heads_of_a_class_that_differ_are_refused(tmp_path: Path) -> None:
    """What a class computes with its own head is not known: it cannot stand beside another's."""
    states = hub.mtl_states(hub.NAMES)
    facts = {"config": None, "num_labels": 2, "label2id": None}
    for name, module in zip(hub.NAMES, ("classifier", "classifier", "score"), strict=True):
        head: hub.State = {f"{module}.weight": np.ones((2, HIDDEN), np.float32)}
        hub.write_adapter(
            tmp_path / name, name, states[name], hub.MTL_CONFIG, head=(facts, head),
            model_class="BertForSequenceClassification",
        )  # fmt: skip
    hub.write_setup(tmp_path, hub.NAMES)
    with pytest.raises(CheckpointError, match="the tasks' heads differ in what they compute"):
        open_checkpoint(tmp_path)
