"""Shapes on the command line or in a model -> optimization profiles.

A profile gives, for each input, the smallest shape, the one to be fast at, and the
largest. Builders miss some mistakes, so they are looked for here: a name that is no
input, two inputs whose dimensions share a name but not a maximum (a request that fits
one and not the other would fail only when served), a dimension such as ``past + 1``
whose sizes are not one more than those of ``past``, and more tokens than the model has
positions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.checkpoint.model_inputs import CONFIG, has_position_table, longest_sequence
from mtl_export.errors import UsageError, shortened
from mtl_export.tensorrt.source import OnnxSource, TensorInfo, read_source

Shape: TypeAlias = tuple[int, ...]

OPTIONS = "--min-shapes, --opt-shapes and --max-shapes"
LIMITS = ("min", "opt", "max")
BATCH_NAMES = ("batch", "batch_size")
SEQUENCE_NAMES = ("sequence", "sequence_length", "decoder_sequence")
# Tokens whose keys and values are kept. Exported graphs read at least one.
PAST_NAMES = ("past", "past_sequence_length")
OPT_BATCH = 8
OPT_SEQUENCE = 64
OPT_PAST = 128
MAX_SEQUENCE = 512
MAX_PAST = 2048
# What is wrong with a shape, by whether it has the rank.
FAULTS = {False: "has not the rank", True: "changes a fixed size"}
_SUM = re.compile(r"(\w+)\s*\+\s*(\d+)|(\d+)\s*\+\s*(\w+)")
# tokenizers without a limit store 1e30 here
_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class Profile:
    """The range of shapes an engine accepts.

    Attributes:
        shapes: Input name -> (min, opt, max).
    """

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def admits(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether every given shape lies within this profile."""
        return all(
            len(shape) == len(low)
            and all(
                least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
            )
            for name, shape in shapes.items()
            for low, _, high in [self.shapes.get(name, (shape, shape, shape))]
        )


def parse_shapes(text: str) -> dict[str, Shape]:
    """Return shapes by input name, from trtexec's grammar.

    ``input_ids:1x16,task_ids:1``; a scalar is ``name:scalar`` or the name alone.

    >>> parse_shapes("input_ids:1x16,task_ids:1")
    {'input_ids': (1, 16), 'task_ids': (1,)}

    Raises:
        UsageError: An item is not of that form, or a name comes twice.
    """
    shapes: dict[str, Shape] = {}
    for item in text.split(","):
        # Names may hold colons ("x:0"), shapes may not.
        name, colon, sizes = item.strip().rpartition(":")
        if not colon:
            name, sizes = sizes, "scalar"
        numbers = [] if sizes == "scalar" else sizes.split("x")
        # No input has a billion of anything, and builders count in 32 bits.
        if not name or not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
            raise UsageError(
                f"shapes {text!r}: {item.strip()!r} is not a name and a shape",
                expected="name:1x16, several separated by commas",
                fix="Write for example input_ids:1x16,task_ids:1",
            )
        if name in shapes:
            raise UsageError(f"shapes {text!r}: {name} is given twice", fix="Give it once")
        shapes[name] = tuple(int(number) for number in numbers)
    return shapes


def base_and_offset(dimension: str) -> tuple[str, int]:
    """Return the dimension that this one is counted from, and how much it adds.

    >>> base_and_offset("past + 1"), base_and_offset("batch")
    (('past', 1), ('batch', 0))
    """
    match = _SUM.fullmatch(dimension)
    if match is None:
        return dimension, 0
    return match[1] or match[4], int(match[2] or match[3])


def default_profile(
    onnx_path: Path,
    *,
    max_batch: int = 32,
    max_sequence: int | None = None,
    max_past: int | None = None,
    given: Collection[str] = (),
) -> Profile:
    """Return a profile for the model's named dimensions.

    Every dimension called ``batch`` goes from 1 over 8 to ``max_batch``, every one
    called ``sequence`` or ``decoder_sequence`` from 1 over 64 to ``max_sequence``,
    ``past`` from 1 over 128 to ``max_past``, and ``past + 1`` is one more than that.

    Args:
        onnx_path: The model.
        max_batch: Largest number of rows.
        max_sequence: Largest number of tokens; by default what ``config.json`` and
            ``tokenizer_config.json`` in its folder allow, at most 512.
        max_past: Largest number of tokens in the cache; by default one less than
            ``config.json`` allows, at most 2047.
        given: Inputs whose shapes the caller has; those with other dimensions are left out.

    Raises:
        UsageError: A dynamic dimension has another name, or a maximum is below 1.
        EngineBuildError: The model cannot be read.
    """
    source = read_source(onnx_path)
    limit = _token_limit(onnx_path.parent)
    sequence = min(limit, MAX_SEQUENCE) if max_sequence is None else max_sequence
    past = max(min(limit, MAX_PAST) - 1, 1) if max_past is None else max_past
    for name, value in (("max_batch", max_batch), ("max_sequence", sequence), ("max_past", past)):
        if value < 1:
            raise UsageError(f"{name}: it is {value}", expected="at least 1", fix="Give more")
    ranges = dict.fromkeys(BATCH_NAMES, (1, min(OPT_BATCH, max_batch), max_batch))
    ranges |= dict.fromkeys(SEQUENCE_NAMES, (1, min(OPT_SEQUENCE, sequence), sequence))
    ranges |= dict.fromkeys(PAST_NAMES, (1, min(OPT_PAST, past), past))
    unknown = {
        tensor.name: f"{size or 'without a name'} in {tensor}"
        for tensor in source.inputs
        for size in tensor.shape
        if isinstance(size, str) and base_and_offset(size)[0] not in ranges
    }
    nowhere = [text for name, text in unknown.items() if name not in given]
    if nowhere:
        raise UsageError(
            f"{onnx_path}: dynamic dimensions with no default: {shortened(nowhere)}",
            expected="only batch, sequence, decoder_sequence and past",
            fix=f"Give {OPTIONS}",
        )
    return Profile(
        {
            tensor.name: _limits(tensor, ranges)
            for tensor in source.inputs
            if tensor.is_dynamic and tensor.name not in unknown
        }
    )


def check_profiles(source: OnnxSource, profiles: Sequence[Profile]) -> None:
    """Refuse profiles that do not fit the model, naming every mistake at once.

    Raises:
        UsageError: A name is no input, a dynamic input is missing, a rank or fixed size
            differs, 1 <= min <= opt <= max does not hold, equal names got unequal sizes, or
            there are more tokens than the ``config.json`` in its folder has positions.
    """
    dynamic = [tensor.name for tensor in source.inputs if tensor.is_dynamic]
    if dynamic and not profiles:
        raise UsageError(
            f"{source.path}: no profile for its dynamic inputs {shortened(dynamic)}",
            expected="at least one, because engines are built for a range of shapes",
            fix=f"Give {OPTIONS}",
        )
    for number, profile in enumerate(profiles, start=1):
        if problems := _problems(source, profile):
            raise UsageError(
                f"profile {number} for {source.path}: {'; '.join(problems)}",
                expected=f"shapes for {'; '.join(str(tensor) for tensor in source.inputs)}",
                fix=f"Correct {OPTIONS}",
            )


def _problems(source: OnnxSource, profile: Profile) -> list[str]:
    inputs = {tensor.name: tensor for tensor in source.inputs}
    positions = _positions(source.path.parent)
    problems = [f"{name} is not an input" for name in profile.shapes if name not in inputs]
    named: dict[str, list[tuple[str, Shape]]] = {}
    for name, tensor in inputs.items():
        if name not in profile.shapes:
            problems += [f"{name} is missing"] if tensor.is_dynamic else []
            continue
        wrong = _tensor_problems(tensor, profile.shapes[name])
        problems += wrong
        for axis, size in enumerate([] if wrong else tensor.shape):
            if not isinstance(size, str) or not size:
                continue
            limits = tuple(shape[axis] for shape in profile.shapes[name])
            named.setdefault(size, []).append((name, limits))
            is_of_tokens = base_and_offset(size)[0] in {*SEQUENCE_NAMES, *PAST_NAMES}
            if positions and is_of_tokens and limits[-1] > positions:
                problems.append(
                    f"max of {name} has {limits[-1]} tokens, the model {positions} positions"
                )
    return problems + _unequal(named)


def _tensor_problems(tensor: TensorInfo, shapes: tuple[Shape, Shape, Shape]) -> list[str]:
    texts = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
    problems = [
        f"{tensor.name} {limit} {text} {fault} of {tensor}"
        for limit, text, shape in zip(LIMITS, texts, shapes, strict=True)
        for fault in [FAULTS[len(shape) == len(tensor.shape)]]
        if not tensor.admits(shape)
    ]
    if not problems and not all(
        1 <= low <= middle <= high for low, middle, high in zip(*shapes, strict=True)
    ):
        problems.append(f"{tensor.name} is not 1 <= min <= opt <= max ({', '.join(texts)})")
    return problems


def _unequal(named: Mapping[str, list[tuple[str, Shape]]]) -> list[str]:
    problems = []
    for dimension, uses in named.items():
        for position, limit in enumerate(LIMITS):
            if len({limits[position] for _, limits in uses}) > 1:
                listed = ", ".join(f"{limits[position]} in {name}" for name, limits in uses)
                problems.append(f"{limit} of dimension {dimension} differs: {listed}")
        base, offset = base_and_offset(dimension)
        if offset and base in named:
            counted = zip(LIMITS, uses[0][1], named[base][0][1], strict=True)
            problems.extend(
                f"{limit} of dimension {dimension} is {size}, of {base} {base_size}"
                for limit, size, base_size in counted
                if size != base_size + offset
            )
    return problems


def _limits(
    tensor: TensorInfo, ranges: Mapping[str, tuple[int, int, int]]
) -> tuple[Shape, Shape, Shape]:
    """Return the tensor's smallest, best and largest shape."""
    rows = []
    for size in tensor.shape:
        base, offset = base_and_offset(size) if isinstance(size, str) else ("", size)
        rows.append([limit + offset for limit in ranges.get(base, (0, 0, 0))])
    low, middle, high = zip(*rows, strict=True)
    return low, middle, high


def _positions(folder: Path) -> int | None:
    """Return how many positions the model in ``folder`` ends at; None if it has no such end."""
    config = _json_object(folder / "config.json", CONFIG)
    return longest_sequence(config) if has_position_table(config) else None


def _token_limit(folder: Path) -> int:
    """Return how many tokens the model in ``folder`` takes; ``_NO_LIMIT`` where nothing says."""
    model = _json_object(folder / "config.json", CONFIG)
    tokenizer = _json_object(folder / "tokenizer_config.json", {"model_max_length?": float})
    values = (
        model.get("max_position_embeddings"),
        model.get("n_positions"),
        tokenizer.get("model_max_length"),
        _positions(folder),
    )
    known = (value for value in values if isinstance(value, int | float) and value > 0)
    return int(min((_NO_LIMIT, *known)))


def _json_object(file: Path, shape: Any) -> dict[str, Any]:
    """Return the content of a file in the model's folder; empty if there is none."""
    if not file.is_file():
        return {}
    fix = "Give max_sequence, or export the graph again"
    found: dict[str, Any] = read_json(file, shape, error=UsageError, fix=fix)
    return found
