"""What the user asked for, as one record that every verb takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mtl_export.errors import UsageError, shortened

TASK_INPUTS = ("rows", "scalar")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for, wherever it was written.

    Attributes:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id.
        output: Write exactly here; None for the place under ``output_dir``.
        output_dir: Parent of ``merged/``, ``onnx/`` and ``engines/``.
        task: Tasks asked for by name.
        all_tasks: All of them were asked for.
        tasks: Task names in id order, where the checkpoint does not carry them.
        alpha: LoRA alpha, likewise.
        temperature: Softmax temperature, likewise.
        downsample: Whether a VL-BART was trained with ``--downsample``, likewise.
        biases: File of biases that the trainer added, likewise.
        train_config: YAML of the training run of an MTLoRA file, likewise.
        image_size: Side of the images that a dense model is exported for; None: as trained.
        dtype: ``fp32``, ``fp16`` or ``bf16``; None keeps the base's.
        force: Replace an old result.
        json: Print the result as JSON.
        verbosity: 0 as usual, 1 more, -1 plain lines, -2 only errors.
        typed: Names of the options that the user wrote in the command line.
        config_file: Name of the settings file that options may stand in; empty without one.
    """

    checkpoint: Path | None = None
    base: str | None = None
    output: Path | None = None
    output_dir: Path = Path("out")
    task: tuple[str, ...] = ()
    all_tasks: bool = False
    tasks: tuple[str, ...] | None = None
    alpha: float | None = None
    temperature: float | None = None
    downsample: bool | None = None
    biases: Path | None = None
    train_config: Path | None = None
    image_size: int | None = None
    dtype: str | None = None
    force: bool = False
    json: bool = False
    verbosity: int = 0
    typed: frozenset[str] = frozenset()
    config_file: str = ""

    def folder(self, kind: str) -> Path:
        """Return where a command writes: ``--output``, or ``kind`` under the output folder."""
        return self.output or self.output_dir / kind


class SourceOptions(TypedDict, total=False):
    """What a checkpoint may not carry, given by hand.

    Attributes:
        alpha: LoRA alpha.
        temperature: Softmax temperature.
        downsample: Whether a VL-BART was trained with ``--downsample``.
        biases: File of biases that the trainer added.
        task_names: Task names in id order.
        train_config: YAML of the training run of an MTLoRA file without one.
        image_size: Side of the images that a dense model is exported for.
    """

    alpha: float
    temperature: float
    downsample: bool
    biases: str | Path
    task_names: Sequence[str]
    train_config: str | Path
    image_size: int


def settings_of(checkpoint: str | Path, base: str | Path | None, source: SourceOptions) -> Settings:
    """Return the settings of a call from Python.

    Raises:
        TypeError: ``source`` has a key that is none of ``SourceOptions``.
    """
    unknown = source.keys() - SourceOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    names, biases = source.get("task_names"), source.get("biases")
    train_config = source.get("train_config")
    return Settings(
        checkpoint=Path(checkpoint),
        base=None if base is None else str(base),
        tasks=None if names is None else tuple(names),
        alpha=source.get("alpha"),
        temperature=source.get("temperature"),
        downsample=source.get("downsample"),
        biases=None if biases is None else Path(biases),
        train_config=None if train_config is None else Path(train_config),
        image_size=source.get("image_size"),
    )


def refuse_unknown_values(
    given: Mapping[str, object], known: Mapping[str, Sequence[object]]
) -> None:
    """Refuse what the command line's own types would, for calls from Python; None is no value.

    Args:
        given: Values by parameter.
        known: What each may be.

    Raises:
        UsageError: One is none of these.
    """
    for name, value in given.items():
        if value is not None and value not in known[name]:
            raise UsageError(
                f"{name}: {value!r}",
                expected=f"one of {shortened(map(str, known[name]), 12)}",
                fix=f"Correct {name}",
            )
