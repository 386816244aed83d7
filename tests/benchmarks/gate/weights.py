"""Faults of weights: a paper's formula read wrongly, and single tensors that are not right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from mtl_export.adapters import dora, mtl_lora
from mtl_export.checkpoint.tensors import Array
from tests.benchmarks.gate.fault import ALL, HF, ONE, Fault
from tests.benchmarks.gate.models import RANK, TEMPERATURE, UPS
from tests.benchmarks.gate.project import (
    MERGED,
    PER_TASK,
    ROUTED,
    WEIGHTS,
    Project,
    base_weight,
    edit_values,
    edit_weights,
    wrong_export,
)

_CORES = mtl_lora.task_cores
LLAMA, ROBERTA, T5 = "model.layers.1", "roberta.encoder.layer.1", "decoder.block.1"
QUERY = f"{ROBERTA}.attention.self.query"
HEADS = ("classifier.out_proj.weights", "classifier.out_proj.biases")


def cores(commands: tuple[str, ...], **changes: Callable[[Any], Any]) -> Callable[[Project], None]:
    """Return a wrong export whose cores are made from changed arguments."""

    def wrong(**given: Any) -> Array:
        return _CORES(**{k: changes.get(k, lambda v: v)(v) for k, v in given.items()})

    return wrong_export(commands, mtl_lora, task_cores=wrong)


def interleaved(**given: Any) -> Array:
    """Return cores whose rows are in the order of columns of B, not of one B after another."""
    right = _CORES(**given)
    split = right.reshape(len(right), UPS, RANK, RANK)
    return split.transpose(0, 2, 1, 3).reshape(right.shape)


def over_tasks(**given: Any) -> Array:
    """Return cores whose mixing weights sum to 1 over the tasks, not over the B."""
    powers = np.exp(given["mixing"].astype(np.float64) / given["temperature"])
    shares = np.log(powers / powers.sum(axis=0, keepdims=True))
    right = _CORES(**{**given, "mixing": shares, "temperature": 1.0})
    wrong: Array = right * np.exp(shares).sum(axis=1)[:, None, None]
    return wrong


def transposed(values: Array) -> Array:
    """Return every task's matrix transposed."""
    return values.swapaxes(1, 2)


def diagonal(values: Array) -> Array:
    """Return every task's matrix without what lies off its diagonal."""
    kept: Array = values * np.eye(values.shape[1], dtype=values.dtype)
    return kept


def delta(project: Project, folder: str, name: str) -> Array:
    """Return what merging added to a weight."""
    from safetensors.numpy import load_file

    merged = load_file(project.out / "merged" / folder / WEIGHTS)[name]
    added: Array = merged - base_weight(project, name)
    return added


def weights(task: str, **changes: Callable[[Array], Array]) -> Callable[[Project], None]:
    """Return a fault in a merged folder; in names ``__`` stands for a dot."""
    named = {name.replace("__", "."): change for name, change in changes.items()}
    return lambda project: edit_weights(project.out / "merged" / task, named)


def values(task: str, **changes: Callable[[Array], Array]) -> Callable[[Project], None]:
    """Return a fault in the graphs of ``task``, or with an empty one in the single graph."""
    named = {name.replace("__", "."): change for name, change in changes.items()}
    return lambda project: edit_values(project.out / "onnx" / task, named)


def unmerged(project: Project) -> None:
    """One layer keeps the base's weight."""
    name = f"{QUERY}.weight"
    edit_weights(project.out / "merged" / "topic", {name: lambda value: base_weight(project, name)})


def merged_twice(project: Project) -> None:
    """One layer has the adapter's change added once more."""
    name = f"{LLAMA}.mlp.down_proj.weight"
    more = delta(project, "reply", name)
    edit_weights(project.out / "merged" / "reply", {name: lambda value: value + more})


def swapped_folders(project: Project) -> None:
    """The weights of two tasks change places."""
    one, other = (project.out / "merged" / task / WEIGHTS for task in ("ads_rel", "spam"))
    kept = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(kept)


def stale_head(project: Project) -> None:
    """The head is the base's, which nobody trained for the task."""
    names = [f"classifier.out_proj.{kind}" for kind in ("weight", "bias")]
    stale = {name: base_weight(project, name) for name in names}
    edit_weights(project.out / "merged" / "ads_rel", {n: put(v) for n, v in stale.items()})


def untied(project: Project) -> None:
    """The output layer is no longer the embedding it is tied to."""
    edit_values(
        project.out / "onnx" / "reply",
        {"lm_head.weight_t": lambda value: value + np.float32(0.01) * np.roll(value, 1, axis=0)},
    )


def first_row(value: Array) -> Array:
    """Return a tensor without its last rows."""
    return value[:1]


def put(value: Array) -> Callable[[Array], Array]:
    """Return a change: another tensor."""
    return lambda old: value


def row(index: int) -> Callable[[Array], Array]:
    """Return a change: one row is the row before it."""

    def change(value: Array) -> Array:
        value[index] = value[index - 1]
        return value

    return change


def only(index: int, change: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return a change of one task's slice of a stack."""

    def changed(value: Array) -> Array:
        value[index] = change(value[index])
        return value

    return changed


def swap(one: int, other: int) -> Callable[[Array], Array]:
    """Return a change: two slices change places."""

    def change(value: Array) -> Array:
        value[[one, other]] = value[[other, one]]
        return value

    return change


def l1_gain(magnitude: Array, directions: Array) -> Array:
    """Return a gain that divides by the sum of magnitudes, not by the L2 norm."""
    gain: Array = magnitude / np.abs(directions).sum(axis=1)
    return gain[None]


WHERE = "error .* allowed"
FAULTS = (
    Fault("Lambda transposed", "roberta", ALL, cores(ROUTED, lambdas=transposed), WHERE),
    Fault("Lambda transposed", "llama", ONE, cores(PER_TASK, lambdas=transposed), WHERE),
    Fault("diagonal of Lambda for all of it", "t5", ALL, cores(ROUTED, lambdas=diagonal), WHERE),
    Fault("tau missing", "roberta", HF, cores(MERGED, temperature=lambda t: 1.0), WHERE),
    Fault("tau x 2", "llama", ALL, cores(ROUTED, temperature=lambda t: 2 * t), WHERE),
    Fault("tau x 1.01", "t5", ONE, cores(PER_TASK, temperature=lambda t: 1.01 * t), WHERE),
    Fault("tau multiplied", "llama", HF,
          cores(MERGED, temperature=lambda t: 1 / TEMPERATURE), WHERE),
    Fault("alpha / r missing", "roberta", ONE, cores(PER_TASK, scale=lambda s: 1.0), WHERE),
    Fault("alpha / sqrt(r) for alpha / r", "llama", HF,
          cores(MERGED, scale=lambda s: s * RANK**0.5), WHERE),
    Fault("mean of the B_i", "t5", HF, cores(MERGED, mixing=np.zeros_like), WHERE),
    Fault("B_i in another order", "llama", ALL, cores(ROUTED, mixing=lambda w: w[:, ::-1]), WHERE),
    Fault("B_i interleaved", "t5", ONE, wrong_export(PER_TASK, mtl_lora, task_cores=interleaved),
          WHERE),
    Fault("softmax over tasks", "roberta", ALL,
          wrong_export(ROUTED, mtl_lora, task_cores=over_tasks), WHERE),
    Fault("mixing weights one task on", "roberta", ONE,
          cores(PER_TASK, mixing=lambda w: np.roll(w, 1, axis=0)), WHERE),
    Fault("DoRA: norm of another kind", "dora", HF,
          wrong_export(MERGED, dora, row_gain=l1_gain), WHERE),
    Fault("one layer unmerged", "roberta", HF, unmerged, "task topic.*error"),
    Fault("one layer merged twice", "llama", HF, merged_twice, "task reply.*error"),
    Fault("one layer's cores zero for a task", "llama", ALL,
          values("", **{f"{LLAMA}.self_attn.q_proj.core": only(1, np.zeros_like)}),
          "task reply.*error"),
    Fault("two tasks swapped, weights", "roberta", HF, swapped_folders,
          "task (ads_rel|spam).*error"),
    Fault("two tasks swapped, one stack", "t5", ALL,
          values("", **{f"{T5}.layer.2.DenseReluDense.wo.core": swap(0, 2)}),
          "task (summary|title).*error"),
    Fault("a bias dropped", "roberta", ONE,
          values("spam", **{f"{ROBERTA}.intermediate.dense.bias": np.zeros_like}),
          "task spam.*error"),
    Fault("head stale", "roberta", HF, stale_head, "task ads_rel.*error"),
    Fault("head truncated", "roberta", HF,
          weights("spam", **{f"classifier.out_proj.{k}": first_row for k in ("weight", "bias")}),
          "task spam.*mismatched 'classifier"),
    Fault("heads swapped", "roberta", ALL,
          values("", **dict.fromkeys(HEADS, swap(0, 2))),
          "task (ads_rel|spam).*error"),
    Fault("one row of one matrix wrong", "t5", ONE,
          values("reply", **{f"{T5}.layer.1.EncDecAttention.q.weight_t": row(7)}),
          "task reply.*error"),
    Fault("one row of one matrix wrong", "llama", HF,
          weights("title", **{f"{LLAMA}.self_attn.k_proj.weight": row(3)}), "task title.*error"),
    Fault("a square weight transposed", "roberta", HF,
          weights("spam", **{f"{ROBERTA}.attention.output.dense.weight": np.transpose}),
          "task spam.*error"),
    Fault("tied weights diverged", "llama", ONE, untied, "task reply.*error"),
    Fault("one number of one weight, by 0.01", "llama", ALL,
          values("", **{f"{LLAMA}.mlp.gate_proj.weight_t":
                        only(3, lambda v: v + np.float32(0.01) * (np.arange(len(v)) == 5))}),
          WHERE),
)  # fmt: skip
