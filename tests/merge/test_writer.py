from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.checkpoint.base_model import SINGLE_FILE, open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import read_folder
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.errors import BaseModelError
from mtl_export.merge.layout import DTYPES
from mtl_export.merge.writer import merged_size_bytes, write_merged
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.adapters import toys
from tests.factories import VOCABULARY


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return the toy checkpoint bound to the toy base."""
    return toys.toy_bound(tmp_path_factory.mktemp("toy"))


def merged(bound: BoundModel, task: Task, folder: Path, dtype: str | None = None) -> Path:
    """Write ``task`` merged to the new folder ``folder``."""
    folder.mkdir()
    write_merged(bound, task, folder, dtype=dtype)
    return folder


def changed_base(bound: BoundModel, folder: Path, **tensors: Array) -> BoundModel:
    """Return the toy adapter bound to its base with tensors added or replaced."""
    shutil.copytree(bound.base.folder, folder / "base")
    file = folder / "base" / SINGLE_FILE
    save_file(load_file(file) | tensors, file, {"format": "pt"})
    parts = toys.checkpoint_parts()
    adapter = toys.write_checkpoint(folder / "adapter", parts, BaseReference())
    return toys.bound_model(folder / "base", adapter)


@pytest.mark.parametrize("task", toys.TASKS, ids=lambda task: task.name)
def test_transformers_loads_the_folder_and_answers_as_the_oracle(
    bound: BoundModel, task: Task, tmp_path: Path
) -> None:
    """AutoModelForSequenceClassification gives the unmerged model's logits, head included."""
    folder = merged(bound, task, tmp_path / task.name)
    inputs = toys.token_rows(5, 9)
    with OracleRunner(bound, "fp64") as oracle:
        ids = np.full(5, task.index)
        expected = oracle.infer({**inputs, "task_ids": ids})["logits"]
    with quiet_transformers():
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        logits = model.eval()(**{n: torch.from_numpy(v) for n, v in inputs.items()}).logits
    assert logits.shape == (5, len(task.labels))
    np.testing.assert_allclose(logits.numpy(), expected[:, : len(task.labels)], atol=2e-5)
    assert model.config.id2label == dict(enumerate(task.labels))
    assert model.config.problem_type == task.kind


def test_merged_tasks_differ(bound: BoundModel, tmp_path: Path) -> None:
    """Every adapted weight and the head differ between tasks; everything else is the base's."""
    first, second = (
        load_file(merged(bound, task, tmp_path / task.name) / SINGLE_FILE)
        for task in (toys.TASKS[0], toys.TASKS[1])
    )
    assert first.keys() == second.keys()
    adapted = {f"{module}.weight" for module in toys.MODULES}
    for name, value in first.items():
        if name in adapted:
            assert np.abs(value - second[name]).max() > 1e-3
        elif not name.startswith(toys.HEAD):
            assert value.tobytes() == second[name].tobytes()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_float_is_in_the_dtype_asked_for(
    bound: BoundModel, dtype: str, tmp_path: Path
) -> None:
    """Merged, untouched and head tensors are the float64 values rounded once to the dtype."""
    task = toys.TASKS[1]
    found = load_torch_file(merged(bound, task, tmp_path / dtype, dtype) / SINGLE_FILE)
    out = NUMPY_DTYPES[DTYPES[dtype][0]]
    expected = {bound.prefix + n: t.numpy().astype(out) for n, t in bound.base.tensors.items()}
    weight, bias = toys.checkpoint_parts()["heads"][toys.HEAD][task.name]
    expected |= {f"{toys.HEAD}.weight": weight.astype(out), f"{toys.HEAD}.bias": bias.astype(out)}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert str(value.dtype) == f"torch.{DTYPES[dtype][1]}"
        module = name.removesuffix(".weight")
        if module in toys.MODULES and name != module:
            base = bound.base_tensor(name).numpy().astype(np.float64)
            exact = base + bound.adapters.layers[module].delta(task.index)
            gap = np.abs(value.to(torch.float64).numpy() - exact)
            assert (gap <= np.abs(exact) * torch.finfo(value.dtype).eps / 2 * (1 + 1e-6)).all()
        else:
            np.testing.assert_array_equal(
                value.to(torch.float64).numpy(), expected[name].astype(np.float64)
            )
    config = json.loads((tmp_path / dtype / "config.json").read_text())
    assert config["dtype"] == DTYPES[dtype][1]


@pytest.mark.filterwarnings("error")
def test_tensors_the_adapter_does_not_know_are_copied_byte_for_byte(
    bound: BoundModel, tmp_path: Path
) -> None:
    """Integers, booleans, half floats, NaN and tied copies keep dtype and bits."""
    embedding = bound.base.tensors["embeddings.word_embeddings.weight"].numpy()
    extra: dict[str, Array] = {
        "embeddings.position_ids": np.arange(40)[None],
        "cls.decoder.weight": embedding,
        "flags.mask": np.array([True, False, True]),
        "flags.half": np.array([1.5, np.nan, -np.inf], np.float16),
        "flags.scalar": np.array(3, np.uint8),
        "flags.empty": np.zeros((0, 3), np.float32),
    }
    changed = changed_base(bound, tmp_path, **extra)
    found = load_file(merged(changed, toys.TASKS[2], tmp_path / "out") / SINGLE_FILE)
    for name, value in extra.items():
        copied = found[f"bert.{name}"]
        assert (copied.dtype, copied.shape) == (value.dtype, value.shape)
        assert copied.tobytes() == value.tobytes()


def test_integers_stay_when_floats_are_converted(bound: BoundModel, tmp_path: Path) -> None:
    """--dtype concerns floating tensors only."""
    ids = np.arange(40)[None]
    changed = changed_base(bound, tmp_path, **{"embeddings.position_ids": ids})
    found = load_torch_file(merged(changed, toys.TASKS[0], tmp_path / "out", "bf16") / SINGLE_FILE)
    np.testing.assert_array_equal(found["bert.embeddings.position_ids"].numpy(), ids)
    assert found["bert.embeddings.position_ids"].dtype == torch.int64


def test_the_bases_own_head_is_replaced(bound: BoundModel, tmp_path: Path) -> None:
    """A base saved with a classifier gives way to the task's, and no prefix is added."""
    tensors = {f"bert.{name}": t.numpy() for name, t in bound.base.tensors.items()}
    tensors |= {"classifier.weight": np.ones((9, 12), "f4"), "classifier.bias": np.ones(9, "f4")}
    base = shutil.copytree(bound.base.folder, tmp_path / "base")
    save_file(tensors, base / SINGLE_FILE, {"format": "pt"})
    parts = toys.checkpoint_parts()
    adapter = toys.write_checkpoint(tmp_path / "adapter", parts, BaseReference())
    full = toys.bound_model(base, adapter)
    assert full.prefix == ""
    bare = merged(bound, toys.TASKS[1], tmp_path / "bare")
    found, expected = (
        load_file(folder / SINGLE_FILE)
        for folder in (merged(full, toys.TASKS[1], tmp_path / "full"), bare)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_companions_and_config_travel_along(bound: BoundModel, tmp_path: Path) -> None:
    """Tokenizer files are copied, the config names class, labels and problem type."""
    folder = merged(bound, toys.TASKS[1], tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", SINGLE_FILE, "tokenizer.json", "tokenizer_config.json"} <= names
    base_tokenizer = (bound.base.folder / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == base_tokenizer
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "ads", "1": "jobs", "2": "news", "3": "sport"}
    assert config["label2id"] == {"ads": 0, "jobs": 1, "news": 2, "sport": 3}
    assert config["problem_type"] == "multi_label_classification"
    assert config["vocab_size"] == VOCABULARY
    assert "mtl_export" not in json.dumps(config)


def test_the_same_input_gives_the_same_bytes(bound: BoundModel, tmp_path: Path) -> None:
    """Merging twice writes identical files."""
    first, second = (merged(bound, toys.TASKS[0], tmp_path / n, "bf16") for n in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_sharded_base_merges_to_the_same_weights(bound: BoundModel, tmp_path: Path) -> None:
    """The base's files and their names are kept, and what they hold is the same."""
    base = shutil.copytree(bound.base.folder, tmp_path / "base")
    tensors = load_file(base / SINGLE_FILE)
    (base / SINGLE_FILE).unlink()
    weight_map = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, base / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = replace(bound, base=open_base(str(base)))
    folder = merged(sharded, toys.TASKS[0], tmp_path / "sharded")
    expected = load_file(merged(bound, toys.TASKS[0], tmp_path / "whole") / SINGLE_FILE)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in sorted(set(index["weight_map"].values()))}
    assert sorted(files) == sorted(set(weight_map.values()))
    found = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_an_untouched_tensor_that_overflows_is_refused(bound: BoundModel, tmp_path: Path) -> None:
    """float16 would turn a large embedding into Inf: refused by the tensor's name."""
    name = "embeddings.word_embeddings.weight"
    values = bound.base.tensors[name].numpy().copy()
    values[3, 4] = 1e6
    changed = changed_base(bound, tmp_path, **{name: values})
    with pytest.raises(BaseModelError) as caught:
        merged(changed, toys.TASKS[0], tmp_path / "out", "fp16")
    assert f"bert.{name}" in caught.value.problem
    assert "F16" in caught.value.problem
    assert "bf16" in caught.value.fix
    merged(changed, toys.TASKS[0], tmp_path / "wide", "bf16")


def test_a_head_that_overflows_is_refused(tmp_path: Path) -> None:
    """A head is held to the same range as the base."""
    parts = toys.checkpoint_parts()
    parts["heads"][toys.HEAD]["topics"][1][2] = 1e5
    bound = toys.toy_bound(tmp_path, parts)
    with pytest.raises(BaseModelError) as caught:
        merged(bound, toys.TASKS[1], tmp_path / "out", "fp16")
    assert f"{toys.HEAD}.bias" in caught.value.problem
    merged(bound, toys.TASKS[0], tmp_path / "other", "fp16")


def test_progress_counts_the_bytes_written(bound: BoundModel, tmp_path: Path) -> None:
    """Progress only grows, and ends at the total, which is the size of the tensors."""
    (tmp_path / "out").mkdir()
    seen: list[tuple[int, int]] = []
    write_merged(
        bound, toys.TASKS[0], tmp_path / "out", dtype="fp16",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    done = [count for count, _ in seen]
    size = sum(v.nbytes for v in load_file(tmp_path / "out" / SINGLE_FILE).values())
    assert done == sorted(done)
    assert seen[-1] == (size, size)
    assert {total for _, total in seen} == {size}


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_the_size_is_told_beforehand(bound: BoundModel, dtype: str | None, tmp_path: Path) -> None:
    """The estimate is the base's size in the output dtype, within the head and the header."""
    size = (merged(bound, toys.TASKS[1], tmp_path / "out", dtype) / SINGLE_FILE).stat().st_size
    assert 0 <= size - merged_size_bytes(bound, dtype) < 8000


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_every_stored_part_reaches_the_merged_weights(diagonal: bool, tmp_path: Path) -> None:
    """Merged weights are W + (alpha / r) c sum_i p_ti B_i Lambda_t A, written in loops."""
    parts = toys.checkpoint_parts(diagonal=diagonal)
    bound = toys.toy_bound(tmp_path, parts)
    for task in toys.TASKS:
        found = load_file(merged(bound, task, tmp_path / task.name, "fp32") / SINGLE_FILE)
        for module, values in parts["layers"].items():
            base = bound.base_tensor(f"{module}.weight").numpy().astype(np.float64)
            # The paper's output for each unit vector is a column of the merged weight.
            units, ids = np.eye(base.shape[1]), np.full(base.shape[1], task.index)
            columns = toys.paper_rows(values, base, np.zeros(len(base)), units, ids)
            np.testing.assert_allclose(
                found[f"{module}.weight"], columns.T, rtol=2e-7, atol=1e-7, err_msg=module
            )


def test_a_checkpoint_without_labels_leaves_the_config_alone(
    bound: BoundModel, tmp_path: Path
) -> None:
    """A headless task writes no labels and no problem type."""
    parts: dict[str, Any] = toys.checkpoint_parts()
    parts["tasks"] = (Task("plain", 0), Task("other", 1), Task("third", 2))
    parts["heads"] = {}
    parts["model_class"] = ""
    adapter = toys.write_checkpoint(tmp_path / "adapter", parts, BaseReference())
    assert not read_folder(adapter).heads
    headless = toys.bound_model(bound.base.folder, adapter)
    folder = merged(headless, headless.adapters.tasks[1], tmp_path / "out")
    base_config = json.loads((bound.base.folder / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text()) == base_config
    assert len(load_file(folder / SINGLE_FILE)) == len(bound.base.tensors)
