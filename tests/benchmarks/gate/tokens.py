"""Faults of tokens: masks, positions, caches, padding, and what turns text into ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from tests.benchmarks.gate.fault import ALL, HF, ONE, Fault
from tests.benchmarks.gate.project import Project, edit_graph, edit_graphs
from tests.benchmarks.gate.routing import constant, found, reread
from tests.benchmarks.gate.weights import WHERE, values

MASK = "attention_mask"


def all_ones(name: str) -> Callable[[ir.Model], None]:
    """Return a change: a mask is read as 1 everywhere."""

    def change(model: ir.Model) -> None:
        one = constant(model, "fault/one", np.array([1], np.int64))
        mask = found(model, name)
        readers = [use.node for use in mask.uses() if use.node.op_type != "Shape"]

        def make() -> list[ir.Node]:
            shape = ir.node("Shape", [mask])
            return [shape, ir.node("Expand", [one, shape.outputs[0]])]

        reread(model, mask, make, readers)

    return change


def no_mask(task: str, name: str = MASK, only: str = "") -> Callable[[Project], None]:
    """Return a fault: the graphs of ``task``, or the one called ``only``, ignore a mask."""

    def plant(project: Project) -> None:
        folder = project.out / "onnx" / task
        if only:
            edit_graph(folder / only, all_ones(name))
        else:
            edit_graphs(folder, all_ones(name))

    return plant


def positions_from_zero(model: ir.Model) -> None:
    """Count positions from the first column on, padding or not."""
    node = next(n for n in model.graph if n.op_type == "CumSum")
    mask, one = node.inputs[0], constant(model, "fault/one", np.array([1], np.int64))
    assert mask is not None
    shape = ir.node("Shape", [mask])
    ones = ir.node("Expand", [one, shape.outputs[0]])
    model.graph.insert_before(node, [shape, ones])
    node.replace_input_with(0, ones.outputs[0])


def left_padding(project: Project) -> None:
    """Prompts padded on the left get positions that count their padding."""
    edit_graph(project.out / "onnx" / "prefill.onnx", positions_from_zero)


def step_off_by_one(project: Project) -> None:
    """The step behind the cache has the position of the token before it."""

    def change(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.op_type == "CumSum")
        one = constant(model, "fault/one", np.array(1, np.int64))
        counted = node.outputs[0]
        readers = [use.node for use in counted.uses()]
        reread(model, counted, lambda: [ir.node("Sub", [counted, one])], readers)

    edit_graph(project.out / "onnx" / "decode.onnx", change)


def stale_cache(project: Project) -> None:
    """A layer hands on the keys of another."""

    def change(model: ir.Model) -> None:
        names = [value.name for value in model.graph.outputs]
        one, other = names.index("present.0.key"), names.index("present.1.key")
        values_ = list(model.graph.outputs)
        first, second = values_[one], values_[other]
        copies = [ir.node("Identity", [value]) for value in (second, first)]
        for copy, like in zip(copies, (first, second), strict=True):
            copy.outputs[0].type, copy.outputs[0].shape = like.type, like.shape
        model.graph.extend(copies)
        first.name, second.name = "fault/first", "fault/second"
        copies[0].outputs[0].name, copies[1].outputs[0].name = "present.0.key", "present.1.key"
        model.graph.outputs[one] = copies[0].outputs[0]
        model.graph.outputs[other] = copies[1].outputs[0]

    edit_graph(project.out / "onnx" / "reply" / "decode.onnx", change)


def config_of(folder: str, **changes: object) -> Callable[[Project], None]:
    """Return a fault: keys of a ``config.json`` below the output folder."""

    def plant(project: Project) -> None:
        path = project.out / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


def rope(project: Project) -> None:
    """The config's rotary base is another one."""
    path = project.out / "merged" / "summary" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {**config.get("rope_parameters", {}), "rope_theta": 9000.0}
    path.write_text(json.dumps(config))


def other_tokenizer(folder: str) -> Callable[[Project], None]:
    """Return a fault: two words of a tokenizer's vocabulary have each other's ids."""

    def plant(project: Project) -> None:
        path = Path(project.out / folder / "tokenizer.json")
        tokenizer = json.loads(path.read_text())
        words = tokenizer["model"]["vocab"]
        words["free"], words["money"] = words["money"], words["free"]
        path.write_text(json.dumps(tokenizer))

    return plant


def labels_swapped(project: Project) -> None:
    """The config of a merged model names its labels in another order."""
    path = project.out / "merged" / "spam" / "config.json"
    config = json.loads(path.read_text())
    names = config["id2label"]
    names["0"], names["1"] = names["1"], names["0"]
    path.write_text(json.dumps(config))


def shifted(value: Array) -> Array:
    """Return rows one place on."""
    return np.roll(value, 1, axis=0)


FAULTS = (
    Fault("attention mask ignored", "roberta", ONE, no_mask("topic"), "task topic.*error"),
    Fault("attention mask ignored", "llama", ALL, no_mask(""), WHERE),
    Fault("attention mask ignored, steps only", "llama", ONE,
          no_mask("title", only="decode.onnx"), "task title.*error"),
    Fault("cross attention reads padding", "t5", ALL, no_mask("", "encoder_attention_mask",
          "decoder.onnx"), WHERE),
    Fault("left padding broken", "llama", ALL, left_padding, WHERE),
    Fault("cache step off by one", "llama", ALL, step_off_by_one, "steps.*error"),
    Fault("caches of two layers swapped", "llama", ONE, stale_cache, "task reply.*steps.*error"),
    Fault("position ids off by one", "roberta", ALL,
          values("", **{"roberta.embeddings.position_embeddings.weight": shifted}), WHERE),
    Fault("relative positions of another side", "t5", ONE,
          values("title", **{"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight":
                             shifted}), "task title.*error"),
    Fault("rotary base of another model", "llama", HF, rope, "task summary.*error"),
    Fault("decoder begins with another token", "t5", ALL,
          config_of("onnx", decoder_start_token_id=7), "decoder_start_token_id|error"),
    Fault("tokenizer swapped", "roberta", HF, other_tokenizer("merged/topic"),
          "task topic.*tokenizer"),
    Fault("tokenizer swapped", "roberta", ALL, other_tokenizer("onnx"), "tokenizer"),
    Fault("label names swapped", "roberta", HF, labels_swapped, "task spam.*(label|ham)"),
)  # fmt: skip
