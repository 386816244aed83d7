"""Embeddings, norms, biases, whole layers and Conv1D that differ between tasks, end to end.

The checkpoints have PEFT's form, but nothing here depends on it: the oracle is the unmerged
model of each task, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.checkpoint.base_model import BaseModel, open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, Task
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, GraphError
from mtl_export.graph.external_data import SharedData, externalised, write_data
from mtl_export.graph.lower import adapter_input_graph, merged_graph, routed_graph
from mtl_export.graph.marking import mark
from mtl_export.graph.task_edit import remove_task
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graph, write_graphs
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.onnx_adapters import AdapterRunner, adapter_file, write_adapter
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner
from tests import factories
from tests.checkpoint import peft_toys as toys
from tests.checkpoint.messages import assert_whole

TOLERANCE = 2e-5
NORM = "bert.encoder.layer.1.attention.output.LayerNorm"
ONES = np.ones(toys.HIDDEN, np.float32)
Adapter = tuple[dict[str, Array], dict[str, Any]]


def drawn(seed: int, *shape: int) -> Array:
    """Return seeded values."""
    return toys.draw(np.random.default_rng(seed), *shape)


def adapted_embeddings() -> dict[str, Adapter]:
    """Adapters on token and position embeddings, of unequal rank, one with DoRA's gains."""
    return {
        "words": (toys.lora(toys.WORDS, seed=1) | toys.lora(toys.QUERY, seed=1), {}),
        "positions": (
            toys.lora(toys.POSITIONS, rank=3, seed=2, lora_magnitude_vector="O")
            | toys.lora(toys.WORDS, rank=3, seed=2, lora_magnitude_vector="O"),
            {"r": 3, "use_dora": True},
        ),
        "none": (toys.lora(toys.NARROW, seed=3), {}),
    }


def replaced_tensors() -> dict[str, Adapter]:
    """Trained rows, a whole embedding, a pooler, norms and biases; adapters only beside them."""
    tokens = f"{toys.WORDS}.token_adapter.trainable_tokens_delta"
    return {
        "rows": (
            toys.lora(toys.QUERY, seed=1) | {tokens: drawn(4, 3, toys.HIDDEN)},
            {"trainable_token_indices": [50, 7, 2]},
        ),
        "whole": (
            toys.lora(toys.QUERY, seed=2)
            | {
                f"{toys.WORDS}.weight": drawn(5, toys.VOCABULARY, toys.HIDDEN),
                "bert.pooler.dense.weight": drawn(6, toys.HIDDEN, toys.HIDDEN),
                "bert.pooler.dense.bias": drawn(7, toys.HIDDEN),
                f"{NORM}.weight": ONES + drawn(8, toys.HIDDEN),
                f"{NORM}.bias": drawn(9, toys.HIDDEN),
            },
            {},
        ),
        "biases": (
            toys.lora(toys.NARROW, seed=3)
            | {
                f"{toys.NARROW}.base_layer.bias": drawn(10, toys.HIDDEN),
                f"{toys.QUERY}.bias": drawn(11, toys.HIDDEN),
                "bert.encoder.layer.0.attention.self.key.bias": drawn(12, toys.HIDDEN),
                "bert.embeddings.LayerNorm.bias": drawn(13, toys.HIDDEN),
            },
            {"bias": "all"},
        ),
    }


def conv1d() -> dict[str, Adapter]:
    """GPT-2: layers stored [I, O], one of them square, with DoRA, a bias and a whole layer."""
    modules = [f"{toys.GPT2}attn.c_attn", f"{toys.GPT2}attn.c_proj", f"{toys.GPT2}mlp.c_fc"]
    lora = [toys.lora(module, seed=1) for module in modules]
    dora = [toys.lora(module, seed=2, lora_magnitude_vector="O") for module in modules[:2]]
    narrow = f"{toys.GPT2}mlp.c_proj"
    own = {
        f"{narrow}.weight": drawn(14, toys.INTERMEDIATE, toys.HIDDEN),
        f"{toys.GPT2}ln_1.bias": drawn(15, toys.HIDDEN),
        f"{modules[0]}.base_layer.bias": drawn(16, 3 * toys.HIDDEN),
    }
    return {
        "lora": ({**lora[0], **lora[1], **lora[2]}, {"fan_in_fan_out": False}),
        "dora": ({**dora[0], **dora[1]}, {"use_dora": True}),
        "own": ({**lora[0], **own, **toys.lora("transformer.wte", seed=4)}, {}),
    }


CHECKPOINTS = {
    "adapted_embeddings": adapted_embeddings,
    "replaced_tensors": replaced_tensors,
    "conv1d": conv1d,
}


def bound_model(folder: Path, adapters: Mapping[str, Adapter], *, gpt2: bool = False) -> BoundModel:
    """Write one folder per task, heads of 2, 3, ... labels, and bind them to a toy base."""
    for index, (task, (tensors, fields)) in enumerate(adapters.items()):
        head = toys.head(2 + index, seed=index, module="score" if gpt2 else "classifier")
        if gpt2:
            del head["score.bias"]
        toys.write(folder / "tasks" / task, {**tensors, **head}, fields)
    base_folder = folder / "base"
    base = toys.gpt2_base(base_folder) if gpt2 else factories.toy_base(base_folder)
    opened_base = open_base(str(base))
    checkpoint = open_checkpoint(folder / "tasks", task_names=list(adapters))
    return bind(checkpoint, read_adapters(checkpoint, opened_base), opened_base)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def bound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return each of the checkpoints, bound."""
    folder = tmp_path_factory.mktemp(request.param)
    return bound_model(folder, CHECKPOINTS[request.param](), gpt2=request.param == "conv1d")


@pytest.fixture(scope="module")
def inputs(bound: BoundModel) -> dict[str, Array]:
    """Return rows that hold the trained tokens, padded on the right."""
    generator = np.random.default_rng(3)
    ids = generator.integers(3, toys.VOCABULARY, (6, 8))
    ids[:, :3] = [50, 7, 2]
    lengths = np.array([8, 5, 4, 8, 7, 6])
    mask = (np.arange(8) < lengths[:, None]).astype(np.int64)
    found = {"input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask}
    if bound.base.config["model_type"] == "bert":
        found["token_type_ids"] = generator.integers(0, 2, (6, 8))
    return found


@pytest.fixture(scope="module")
def expected(bound: BoundModel, inputs: dict[str, Array]) -> list[Array]:
    """Return every task's logits for all rows: float64, each from its own unmerged model."""
    with OracleRunner(bound, "fp64") as runner:
        return [
            runner.infer({**inputs, "task_ids": np.full(6, task.index)})["logits"][
                :, : len(task.labels)
            ]
            for task in bound.adapters.tasks
        ]


def test_tasks_differ(expected: list[Array]) -> None:
    """No task's answers are near another's: a confusion would show."""
    for index, one in enumerate(expected):
        for other in expected[index + 1 :]:
            assert np.abs(one[:, :2] - other[:, :2]).max() > 1e-2


@pytest.fixture(scope="module")
def traced(bound: BoundModel) -> TracedModel:
    """Return the one trace."""
    return trace(bound)


def test_graphs(
    bound: BoundModel,
    traced: TracedModel,
    inputs: dict[str, Array],
    expected: list[Array],
    tmp_path: Path,
) -> None:
    """One graph for all tasks, mixed and unknown ids included, and one graph per task."""
    write_graph(routed_graph(traced, bound), bound, tmp_path, None)
    with OrtRunner(tmp_path / "model.onnx") as runner:
        mixed = np.array([0, 1, 2, 2, 1, 0])
        found = runner.infer({**inputs, "task_ids": mixed})["logits"]
        spoilt = runner.infer({**inputs, "task_ids": np.array([0, -1, 2, 3, 1, 2**33])})["logits"]
    for row, task in enumerate(mixed):
        width = expected[task].shape[1]
        np.testing.assert_allclose(found[row, :width], expected[task][row], atol=TOLERANCE)
        assert np.isneginf(found[row, width:]).all()
    assert np.isnan(spoilt[[1, 3, 5]]).all()
    np.testing.assert_array_equal(spoilt[[0, 2, 4]], found[[0, 2, 4]])
    for gone in bound.adapters.tasks:
        others = mixed != gone.index
        ids = np.where(mixed > gone.index, mixed - 1, mixed)[others]
        rows = {name: value[others] for name, value in inputs.items()}
        np.testing.assert_array_equal(
            without(tmp_path, gone.name, {**rows, "task_ids": ids}), found[others]
        )
    shared = SharedData()
    for task in bound.adapters.tasks:
        folder = tmp_path / task.name
        folder.mkdir()
        models = {"model": merged_graph(traced, bound, task)}
        write_graphs(models, bound, folder, task, shared)
        shared.settle(folder)
        with OrtRunner(folder / "model.onnx") as runner:
            alone = runner.infer(inputs)["logits"]
        np.testing.assert_allclose(alone, expected[task.index], atol=TOLERANCE)


def test_adapters_as_input(
    bound: BoundModel,
    traced: TracedModel,
    inputs: dict[str, Array],
    expected: list[Array],
    tmp_path: Path,
) -> None:
    """One adapter file per task, mixed in one batch by the runner."""
    model, parameters = adapter_input_graph(traced, bound)
    write_graph(model, bound, tmp_path, None)
    for task in bound.adapters.tasks:
        values = {p.name: p.value(task.index).astype(np.float32) for p in parameters}
        write_adapter(tmp_path / adapter_file("model", task.name), values)
    mixed = np.array([0, 1, 2, 2, 1, 0])
    with AdapterRunner(tmp_path / "model.onnx") as runner:
        found = runner.infer({**inputs, "task_ids": mixed})["logits"]
    for row, task_id in enumerate(mixed):
        width = expected[task_id].shape[1]
        np.testing.assert_allclose(found[row, :width], expected[task_id][row], atol=TOLERANCE)
        assert np.isneginf(found[row, width:]).all()


def without(folder: Path, name: str, inputs: dict[str, Array]) -> Array:
    """Return what the graph in ``folder`` answers after a task was cut out of it."""
    models = {"model": ir.load(folder / "model.onnx")}
    remove_task(models, name)
    edited = folder / f"without-{name}"
    edited.mkdir()
    places, _ = write_data(models, edited)
    with externalised(models, places):
        ir.save(models["model"], edited / "model.onnx")
    with OrtRunner(edited / "model.onnx") as runner:
        logits: Array = runner.infer(inputs)["logits"]
    return logits


def test_merged_folders(
    bound: BoundModel, inputs: dict[str, Array], expected: list[Array], tmp_path: Path
) -> None:
    """What from_pretrained loads answers alike."""
    for task in bound.adapters.tasks:
        folder = tmp_path / task.name
        folder.mkdir()
        write_merged(bound, task, folder)
        with MergedRunner(folder) as runner:
            found = runner.infer(inputs)["logits"]
        np.testing.assert_allclose(found, expected[task.index], atol=TOLERANCE)


def test_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    """GPT-2's output layer is its embedding; the graph would give it the base's weight."""
    tensors = toys.lora(f"{toys.GPT2}attn.c_attn") | {
        "transformer.wte.token_adapter.trainable_tokens_delta": drawn(1, 1, toys.HIDDEN)
    }
    fields = {"task_type": "CAUSAL_LM", "trainable_token_indices": [4]}
    checkpoint = open_checkpoint(toys.write(tmp_path / "lm", tensors, fields))
    base = open_base(str(toys.gpt2_base(tmp_path / "base")))
    bound = bind(checkpoint, read_adapters(checkpoint, base), base)
    with pytest.raises(GraphError) as caught:
        trace(bound)
    assert_whole(caught.value, where="transformer.wte", found="lm_head", expected="its own")
    assert "mtl-export merge" in caught.value.fix


def test_a_kind_without_a_marker_is_refused() -> None:
    """Only linear layers, embeddings and LayerNorms can be told apart by row."""
    model = torch.nn.Module()
    model.norm = torch.nn.RMSNorm(3)
    adapters = AdapterSet(
        family="lora", tasks=(Task("a", 0),), layers={}, heads={}, model_class="Toy",
        checkpoint_sha256="", task_replaced={"norm.weight": (np.ones(3),)},
    )  # fmt: skip
    with pytest.raises(GraphError) as caught:
        mark(model, unbound(adapters))
    assert_whole(caught.value, where="norm", found="of a RMSNorm", expected="LayerNorm")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"copy": 1.5}, "other values than the checkpoint's copy"),
        ({"extra": 1}, f"the checkpoint's copy [{toys.VOCABULARY + 1}"),
        ({"rows": toys.VOCABULARY}, f"rows up to {toys.VOCABULARY}"),
    ],
)
def test_another_base_is_refused(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    """An untrained copy of the embedding that differs; a resized one; rows beyond its end."""
    base = open_base(str(factories.toy_base(tmp_path / "base")))
    stored = base.tensors["embeddings.word_embeddings.weight"].numpy()
    stored = np.concatenate([stored, stored[: change.get("extra", 0)]]) * change.get("copy", 1.0)
    tensors, fields = toys.lora(toys.QUERY), {}
    if "rows" in change:
        key = f"{toys.WORDS}.token_adapter.trainable_tokens_delta"
        tensors[key] = drawn(1, 1, toys.HIDDEN)
        fields = {"trainable_token_indices": [change["rows"]]}
    else:
        tensors |= toys.lora(toys.WORDS)
        tensors[f"{toys.WORDS}.base_layer.weight"] = stored.astype(np.float32)
    checkpoint = open_checkpoint(toys.write(tmp_path / "a", tensors | toys.head(2), fields))
    with pytest.raises(BaseModelError) as caught:
        bind(checkpoint, read_adapters(checkpoint, base), base)
    assert found in caught.value.problem


def unbound(adapters: AdapterSet) -> BoundModel:
    """Return ``adapters`` as if bound to an empty base."""
    checkpoint = Checkpoint(
        path=Path("memory"), format="memory", family="lora", tasks=adapters.tasks, layers={},
        heads={}, base=BaseReference(), model_class="Toy", sha256="",
    )  # fmt: skip
    return BoundModel(checkpoint, adapters, BaseModel("memory", Path("memory"), {}, {}, ()), "")
