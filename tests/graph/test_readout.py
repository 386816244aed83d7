"""Heads and rules of AdapterHub's own, from checkpoint to merged folder and single graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.readout import with_readouts
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import Readout
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, CheckpointError
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import trace
from mtl_export.graph.writer import write_graph
from mtl_export.merge.head_file import HEAD_FILE, head_note, read_readout
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner
from tests.adapters import toys
from tests.checkpoint import adapterhub_toys as hub
from tests.factories import HIDDEN, toy_base

ATOL = 3e-5
TASK_IDS = np.array([2, 0, 1, 0, 2])


def write_singles(folder: Path) -> Path:
    """Write a LoRA, a DoRA and an (IA)^3 adapter, each with a head of three layers."""
    configs = (hub.LORA_CONFIG, hub.DORA_CONFIG, hub.IA3_CONFIG)
    for index, (name, config) in enumerate(zip(hub.NAMES, configs, strict=True)):
        own = hub.head_config(hub.LABELS[index], layers=3, activation_function="gelu")
        head = ({"config": own}, hub.head_state(name, own, index))
        hub.write_adapter(
            folder / name, name, hub.single_state(name, config, index), config, head=head
        )
    return folder


CASES: dict[str, Callable[[Path], Path]] = {
    "one layer": lambda f: hub.write_mtl(f, head={"layers": 1}, has_setup=False),
    "tokens": lambda f: hub.write_mtl(f, head={"head_type": "tagging"}, has_setup=False),
    "each its own": write_singles,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the toy base."""
    return toy_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=CASES)
def bound(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> BoundModel:
    """Return one of the checkpoints, bound."""
    folder = CASES[request.param](tmp_path_factory.mktemp("hub"))
    checkpoint = open_checkpoint(folder, task_names=hub.NAMES)
    opened = open_base(str(base))
    return bind(checkpoint, read_adapters(checkpoint, opened), opened)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Array]:
    """Return text inputs at a size nobody traced."""
    return toys.token_rows(len(TASK_IDS), 6)


@pytest.fixture(scope="module")
def expected(bound: BoundModel, inputs: dict[str, Array]) -> Array:
    """Return the unmerged model's logits in float64."""
    with OracleRunner(bound, "fp64") as runner:
        return runner.infer({**inputs, "task_ids": TASK_IDS})["logits"]


def assert_same(found: Array, expected: Array) -> None:
    """Compare finite logits, and where there are none."""
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], atol=ATOL)


def test_the_chain_is_applied_as_written(bound: BoundModel, inputs: dict[str, Array]) -> None:
    """The oracle's logits are the stored layers, applied to the adapted encoder's states."""
    (readout,) = bound.checkpoint.readouts
    states: list[torch.Tensor] = []
    with OracleRunner(bound, "fp64") as runner:
        first = runner._models[0].model.get_submodule(readout.modules[0])
        first.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        logits = runner.infer({**inputs, "task_ids": np.zeros_like(TASK_IDS)})["logits"]
    x = states[0].numpy()
    assert x.shape[1:] == ((6, HIDDEN) if readout.pooling == "tokens" else (HIDDEN,))
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "gelu": torch.nn.functional.gelu,
        "tanh": torch.tanh,
    }
    for module, word in zip(readout.modules, (*readout.activations, None), strict=True):
        head = bound.adapters.heads[module][0]
        x = x @ head.weight.T.astype(np.float64) + head.bias
        x = x if word is None else functions[word](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(logits[..., : x.shape[-1]], x, atol=1e-9)


def test_graphs(
    bound: BoundModel, inputs: dict[str, Array], expected: Array, tmp_path: Path
) -> None:
    """The single graph serves a mixed batch, the merged graphs their own rows; bad ids are NaN."""
    traced = trace(bound)
    write_graph(routed_graph(traced, bound), bound, tmp_path, None)
    with OrtRunner(tmp_path / "model.onnx", threads=1) as runner:
        assert_same(runner.infer({**inputs, "task_ids": TASK_IDS})["logits"], expected)
        bad = runner.infer({**inputs, "task_ids": np.array([0, 3, -1, 1, 2])})["logits"]
        assert np.isnan(bad[1:3]).all()
        assert not np.isnan(bad[[0, 3, 4]]).any()
    for task in bound.adapters.tasks:
        folder = tmp_path / task.name
        folder.mkdir()
        write_graph(merged_graph(traced, bound, task), bound, folder, task)
        with OrtRunner(folder / "model.onnx", threads=1) as runner:
            logits = runner.infer(inputs)["logits"]
        rows = task.index == TASK_IDS
        assert_same(logits[rows], expected[rows][..., : len(task.labels)])


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_merged_folders(
    bound: BoundModel,
    inputs: dict[str, Array],
    expected: Array,
    tmp_path: Path,
    dtype: str | None,
) -> None:
    """The folder is the bare base's, the head lies beside it, and both say so."""
    import transformers

    task = bound.adapters.tasks[1]
    readout, note = bound.checkpoint.readout_of(task), head_note(bound, task)
    assert readout is not None
    assert note is not None
    write_merged(bound, task, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "merge-report.json").read_text())["head"] == note
    assert HEAD_FILE in note
    with safe_open(str(tmp_path / HEAD_FILE), framework="pt") as stored:
        assert stored.metadata()["pooling"] == readout.pooling
        types = {str(stored.get_tensor(key).dtype) for key in stored.keys()}  # noqa: SIM118
    assert types == {"torch.bfloat16" if dtype else "torch.float32"}
    assert read_readout(tmp_path / HEAD_FILE)[0] == readout
    encoder = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert "head.0.weight" not in encoder.state_dict()
    if dtype is None:
        with MergedRunner(tmp_path) as runner:
            logits = runner.infer(inputs)["logits"]
        rows = task.index == TASK_IDS
        assert_same(logits[rows], expected[rows][..., : len(task.labels)])


def test_a_head_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    """Without its metadata nobody knows how the head is applied."""
    from safetensors.numpy import save_file

    save_file({"head.0.weight": np.ones((2, 3), np.float32)}, str(tmp_path / HEAD_FILE))
    with pytest.raises(CheckpointError, match="pooling '' and 1 tensors"):
        read_readout(tmp_path / HEAD_FILE)


def test_unknown_functions_are_refused() -> None:
    """A function that transformers does not have cannot be computed."""
    import transformers

    readout: Any = Readout("first", ("snake",))
    with pytest.raises(AdapterError, match="function snake"):
        with_readouts(transformers.BertModel, [readout], {})
