"""What artefacts are asked beside the cases, and what the oracle says to it.

padding only      a row of each task in which nothing is a token: NaN where, and only where,
the oracle's answer is NaN. Its numbers mean nothing and are not compared
zeroed adapters   with every task's adapters set to zero the graph is the base, under the
heads of the tasks
left out          cases and checks that a preset does not have
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, TASK_IDS
from mtl_export.parity.presets import ZEROED
from mtl_export.parity.reference import Reference
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.language import NEW_TOKENS


@dataclass(frozen=True)
class Padding:
    """Rows of nothing but padding.

    Attributes:
        inputs: By name, one row of each task, with ``task_ids``.
        is_nan: By output, bool ``[T, L]``: where the oracle's answer is NaN.
    """

    inputs: Mapping[str, Array]
    is_nan: Mapping[str, Array]


@dataclass(frozen=True)
class ExtraChecks:
    """What is checked besides the cases.

    Attributes:
        left_out: Why cases and checks are not run, by name.
        padding: Rows of nothing but padding; None where that is not asked.
        zeroed: The oracle's answers without adapters, by output, in the batch of most tasks;
            empty where that is not asked.
    """

    left_out: Mapping[str, str] = field(default_factory=dict)
    padding: Padding | None = None
    zeroed: Mapping[str, Array] = field(default_factory=dict)


def padding_of(oracle: Runner, exact: Sequence[Reference]) -> Padding | None:
    """Return what the oracle says to padding; None where no answer is one of a whole row."""
    pooled = [
        one
        for one in exact
        if one.logits.ndim == 2
        and one.subject.embedding is None
        and not one.subject.is_across_rows
        and {INPUT_IDS, ATTENTION_MASK} <= one.case.inputs.keys()
        and NEW_TOKENS not in one.case.inputs
    ]
    if not pooled:
        return None
    case = _most_tasks(pooled).case
    _, first = np.unique(case.task_ids, return_index=True)
    inputs = {name: value[first].copy() for name, value in case.inputs.items()}
    inputs[ATTENTION_MASK][:] = 0
    outputs = oracle.infer(inputs)
    names = {one.subject.output for one in pooled if one.case is case}
    return Padding(inputs, {name: np.isnan(outputs[name]) for name in names})


def without_adapters(bound: BoundModel) -> BoundModel | str:
    """Return the base under the tasks' heads, or why there is no such model."""
    adapters = bound.adapters
    if bound.checkpoint.members:
        return "each task's adapter is a checkpoint of its own"
    if adapters.replaced or adapters.own_tensors:
        return "the checkpoint replaces tensors of the base"
    if any(getattr(layer, "gain", None) is not None for layer in adapters.layers.values()):
        return "gains are not zero where adapters are"
    if any(layer.bias is not None for layer in adapters.outlines.values()):
        return "tasks have biases of their own"
    return replace(bound, checkpoint=replace(bound.checkpoint, layers={}))


def zeroed_of(oracle: Callable[[str], Runner], exact: Sequence[Reference]) -> dict[str, Array]:
    """Return what the model without adapters says to the batch of most tasks, by output."""
    case = _most_tasks(exact).case
    with oracle("fp64") as runner:
        outputs = runner.infer(case.inputs)
    return {
        one.subject.output: one.subject.of(outputs, case)
        for one in exact
        if one.case is case and one.subject.embedding is None
    }


def asked(
    padding: Padding | None,
    exact: Sequence[Reference],
    left_out: Mapping[str, str],
    base: Callable[[str], Runner] | str | None,
) -> ExtraChecks:
    """Return what is asked.

    Args:
        padding: What the oracle says to rows of padding; None where that is not asked.
        exact: Its answers to the cases.
        left_out: As in ``ExtraChecks``.
        base: The oracle of the model without adapters, or why there is none; None: nobody asks.
    """
    if isinstance(base, str):
        return ExtraChecks({ZEROED: base, **left_out}, padding)
    zeroed = {} if base is None or ZEROED in left_out else zeroed_of(base, exact)
    return ExtraChecks(left_out, padding, zeroed)


def _most_tasks(exact: Sequence[Reference]) -> Reference:
    # As the contract's checks choose theirs.
    return max(exact, key=lambda one: len(set(one.case.task_ids.tolist())))


def rows_of_padding(padding: Padding, task_index: int | None) -> tuple[dict[str, Array], Array]:
    """Return the inputs for one artefact, and which rows [T] they are."""
    ids = padding.inputs[TASK_IDS]
    if task_index is None:
        return dict(padding.inputs), np.ones(len(ids), np.bool_)
    own = ids == task_index
    inputs = {name: value[own] for name, value in padding.inputs.items() if name != TASK_IDS}
    return inputs, own
