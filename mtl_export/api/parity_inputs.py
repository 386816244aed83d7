"""What ``parity`` compares on, and with: batches of the user's rows or seeded ones; the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.errors import BaseModelError, UsageError

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.tensors import Array
    from mtl_export.parity.cases import Case
    from mtl_export.parity.model_rows import ModelRows
    from mtl_export.runtime.runners.base import Runner

# The largest array of a language model's logits that is compared.
LARGEST_LOGITS_BYTES = 1 << 28


def oracle_of(bound: BoundModel) -> Callable[[str], Runner]:
    """Return what makes the oracle in a dtype."""
    if is_causal_lm(bound.adapters.model_class):
        from mtl_export.runtime.runners.torch_language import OracleLanguageRunner

        return lambda dtype: OracleLanguageRunner(bound, dtype)
    if is_seq2seq(bound.adapters.model_class, bound.base.config):
        from mtl_export.runtime.runners.torch_seq2seq import OracleSeq2SeqRunner

        return lambda dtype: OracleSeq2SeqRunner(bound, dtype)
    from mtl_export.runtime.runners.pytorch import OracleRunner

    return lambda dtype: OracleRunner(bound, dtype)


def base_of(bound: BoundModel) -> Callable[[str], Runner] | str:
    """Return what makes the oracle of the model without adapters, or why there is none."""
    from mtl_export.parity.reference import without_adapters

    found = without_adapters(bound)
    return found if isinstance(found, str) else oracle_of(found)


def cases_of(bound: BoundModel, inputs: Path | None) -> list[Case]:
    """Return the batches of every preset: of the user's rows, or of seeded ones.

    Raises:
        UsageError: The user's rows are not what the model takes.
        CalibrationError: They are beyond its limits.
        ParityError: There are none, and the model takes what parity does not make.
    """
    from mtl_export.checkpoint.model_inputs import longest_sequence
    from mtl_export.parity import cases as batches
    from mtl_export.parity.model_rows import model_rows

    config, model_class = bound.base.config, bound.adapters.model_class
    kind = model_rows(model_class, config)
    longest = longest_sequence(kind.text or config, unlimited=512)
    token_types = int(kind.text.get("type_vocab_size") or 1)
    if min(kind.vocabulary, token_types, longest) < 1:
        raise BaseModelError(
            f"base {bound.base.reference}, config.json: vocabulary {kind.vocabulary}, {token_types}"
            f" token types, {longest} positions",
            expected="one or more of each, because rows are made of them",
            fix="Pass the base that the adapter was trained on to --base",
        )
    task_count = len(bound.adapters.tasks)
    is_lm = is_causal_lm(model_class)
    if is_lm:
        # A logit for each word of the vocabulary at each token, in float64, for every task.
        room = LARGEST_LOGITS_BYTES // (8 * kind.vocabulary * task_count)
        longest = min(longest, max(room, batches.LONG_SEQUENCE + batches.STEPS))
    limits = batches.RowLimits(task_count, kind.vocabulary, longest, token_types)
    if inputs is None:
        kind.refuse_unknown(model_class)
        rows = batches.seeded_rows(limits, kind.text_names, features=kind.features)
        rows = kind.completed(rows)
    elif inputs.suffix == ".npz":
        rows = _arrays(bound, inputs, kind)
    elif kind.features:
        raise _no_text(bound, inputs, kind)
    else:
        rows = _tokenised(bound, inputs, longest)
    # Tokens around an image, and what a user's other arrays mean, are not made up.
    others = rows.keys() - {*kind.text_names, "task_ids"}
    are_given = bool(kind.image_tokens or (inputs is not None and others))
    cases = batches.build_cases(rows, limits, are_given=are_given)
    if is_lm:
        cases += batches.step_cases(cases, limits)
    cases += batches.more_cases(rows, limits, are_given=are_given)
    if is_seq2seq(model_class, config):
        cases = batches.decoder_cases(cases, model_class, config, kind.vocabulary)
    return cases


def _arrays(bound: BoundModel, inputs: Path, kind: ModelRows) -> dict[str, Array]:
    """Return the rows of an npz file: numbers in float32 or int64, switches as they are.

    Raises:
        UsageError: They are not what the model takes.
        CalibrationError: They are beyond its limits.
    """
    import numpy as np

    from mtl_export.data.model_arrays import model_arrays
    from mtl_export.data.samples import LABELS, QUERIES, load_data, owners_of

    data = load_data(str(inputs))
    assert isinstance(data, dict)
    owners_of(data, bound.adapters.tasks, str(inputs), kind.arguments)
    needed, shape = ("input_ids", ()) if kind.text else next(iter(kind.features.items()))
    found = data.get(needed)
    fits = found is not None and (
        found.ndim == 2 if kind.text else found.shape[1:] == shape or not kind.is_fixed
    )
    if found is None or not fits:
        given = f"no {needed}" if found is None else f"{needed} {list(found.shape)}"
        raise UsageError(
            f"--inputs {inputs}: {given}",
            expected=(
                f"{needed} [N, {', '.join(map(str, shape or 'S'))}], because "
                f"{bound.adapters.model_class} takes it"
            ),
            fix="Save what the model takes, and task_ids",
        )
    inputs_alone = {n: value for n, value in data.items() if n not in {LABELS, QUERIES}}
    rows = model_arrays(inputs_alone, kind.text or bound.base.config, f"--inputs {inputs}")
    known = {*kind.text_names, "task_ids"}
    return {
        name: value.astype(np.float32 if value.dtype.kind == "f" else np.int64)
        if value.dtype.kind != "b" or name in known
        else value
        for name, value in rows.items()
    }


def _no_text(bound: BoundModel, inputs: Path, kind: ModelRows) -> UsageError:
    needed = ", ".join(
        f"{name} [N, {', '.join(map(str, shape)) or '...'}]"
        for name, shape in kind.features.items()
    )
    return UsageError(
        f"--inputs {inputs}: rows of text for a {bound.adapters.model_class}",
        expected=f"arrays.npz with {needed} and task_ids [N], because this model takes them",
        fix="Save them with numpy.savez, or leave out --inputs",
    )


def _tokenised(bound: BoundModel, inputs: Path, longest: int) -> dict[str, Array]:
    from mtl_export.data.model_arrays import model_arrays
    from mtl_export.data.rows import load_rows, tokenize

    tasks, folder = bound.adapters.tasks, bound.base.folder
    rows = tokenize(load_rows(inputs), folder, tasks, max_length=longest)
    return model_arrays(rows, bound.base.config, f"--inputs {inputs}")
