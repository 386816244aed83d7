"""``mtl_export.inspect``: what a checkpoint is, holds, and lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from mtl_export.api import dense, sources
from mtl_export.api.conversion import OWN, convert
from mtl_export.api.settings import Settings, SourceOptions, settings_of
from mtl_export.api.written import Written
from mtl_export.errors import UsageError

if TYPE_CHECKING:
    from mtl_export.checkpoint.base_model import BaseModel
    from mtl_export.checkpoint.checkpoint import Checkpoint
    from mtl_export.checkpoint.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Attributes:
        report: What ``mtl-export inspect --json`` prints: format, family, tasks, sizes, base,
            ``missing`` (what must still be given, and how), ``unsupported``, notes.
        outputs: The converted folder, if one was asked for.
    """

    report: Mapping[str, Any]
    outputs: tuple[Written, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Return what must still be given before an export, and how."""
        return tuple(self.report["missing"])


@dataclass(frozen=True)
class Trial:
    """What came of reading a checkpoint as an export would.

    Attributes:
        missing: What must still be given, and how.
        shapes: How the base's shapes compare: "fit", what does not, or nothing without a base.
        unsupported: Why it cannot be exported; empty if it can.
        pipeline: What the base's sentence-transformers pipeline does; empty if exports have none.
    """

    missing: tuple[str, ...]
    shapes: str
    unsupported: str = ""
    pipeline: str = ""


def inspect(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    ledger: bool = False,
    convert_to: str | Path | None = None,
    convert_format: str = OWN,
    force: bool = False,
    **source: Unpack[SourceOptions],
) -> Inspection:
    """Say what a checkpoint is and holds, and what it does not carry.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id; None: nothing is compared with it.
        ledger: List every stored tensor and what becomes of it.
        convert_to: Write the checkpoint to this folder, so that the next call needs no more.
        convert_format: mtl-export's own folder, or one PEFT LoRA folder per task (``peft``).
        force: Replace an old folder that is different.
        **source: What the checkpoint does not carry.

    Raises:
        CheckpointError: The checkpoint is broken or of an unknown kind.
        UnusableBaseError: No export can be made from this base.
        IntegrityError: A file asks to run code.

    Example:
        >>> import mtl_export as mx
        >>> found = mx.inspect("adapter", base="base")
        >>> found.report["family"]["name"], found.missing
        ('mtl_lora', ())
    """
    settings = replace(settings_of(checkpoint, base, source), force=force)
    target = None if convert_to is None else Path(convert_to)
    return inspect_requested(settings, ledger=ledger, target=target, target_format=convert_format)


def inspect_requested(
    settings: Settings, *, ledger: bool, target: Path | None, target_format: str
) -> Inspection:
    """Look at the checkpoint that ``settings`` name; see ``inspect``."""
    from mtl_export.checkpoint.base_model import open_base

    checkpoint = sources.open_settings_checkpoint(settings)
    base = open_base(settings.base) if settings.base else None
    report = _report(settings, checkpoint, base)
    if ledger:
        report["ledger"] = [
            {"tensor": entry.tensor, "fate": entry.fate, "reason": entry.reason}
            for entry in checkpoint.ledger
        ]
    if target is None:
        return Inspection(report)
    if checkpoint.swin is not None:
        raise UsageError(
            f"--convert: {checkpoint.path} is a whole model",
            expected="an adapter on a base; this file is all that an export needs",
            fix="Leave out --convert, and export it: mtl-export onnx --all-tasks",
        )
    output = convert(settings, checkpoint, base, target=target, form=target_format)
    report["outputs"] = [output.as_dict()]
    return Inspection(report, (output,))


def _report(settings: Settings, checkpoint: Checkpoint, base: BaseModel | None) -> dict[str, Any]:
    from mtl_export.adapters.family import family_named
    from mtl_export.checkpoint.reader import FORMATS as KNOWN

    family = family_named(checkpoint.family)
    swin = dense.opened(settings) if checkpoint.swin else None
    trial = Trial((), "") if swin else _trial(checkpoint, base)
    missing = list(trial.missing)
    if settings.tasks is None and _has_placeholder_names(checkpoint):
        missing.append(
            f"task names: Pass --tasks A,B,... (or set tasks in mtl-export.toml),"
            f" {len(checkpoint.tasks)} in id order; until then they are numbered"
        )
    if base is None and swin is None and not trial.unsupported:
        missing.append("base: Pass --base DIR_OR_HUB_ID, or set base in mtl-export.toml")
    return {
        "checkpoint": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "format": checkpoint.format,
        "format_description": next(
            entry.description for entry in KNOWN if entry.name == checkpoint.format
        ),
        "family": {"name": family.name, "title": family.title, "paper": family.paper},
        "model_class": checkpoint.model_class,
        "tasks": [
            {"id": task.index, "name": task.name, "kind": task.kind, "labels": list(task.labels)}
            | ({"output": task.output} if task.output else {})
            for task in checkpoint.tasks
        ],
        **_sizes(checkpoint),
        **sources.hyper_parameters(checkpoint),
        "fates": dict(sorted(Counter(entry.fate for entry in checkpoint.ledger).items())),
        "base": _base_facts(checkpoint, base, trial.shapes),
        "pipeline": trial.pipeline,
        "missing": missing,
        "unsupported": trial.unsupported,
        "notes": list(checkpoint.notes),
    } | ({"folds": dense.folds(swin)} if swin else {})


def _has_placeholder_names(checkpoint: Checkpoint) -> bool:
    """Return whether the format does not carry task names; our own folder always does."""
    from mtl_export.checkpoint.formats.own_folder import FORMAT

    names = [f"task{index}" for index in range(len(checkpoint.tasks))]
    return checkpoint.format != FORMAT and [task.name for task in checkpoint.tasks] == names


def _trial(checkpoint: Checkpoint, base: BaseModel | None) -> Trial:
    """Read the checkpoint as an export would, and go on where a number is missing.

    Raises:
        CheckpointError: The checkpoint is broken, whatever is given.
        UnusableBaseError: No export can be made from this base.
    """
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.checkpoint.reader import with_hyper
    from mtl_export.errors import (
        AdapterError,
        BaseModelError,
        HyperparameterError,
        IntegrityError,
        UnusableBaseError,
    )

    missing: list[str] = []
    while True:
        try:
            adapters = read_adapters(checkpoint, base)
            bound = None if base is None else bind(checkpoint, adapters, base)
        except HyperparameterError as error:
            name = error.name
            parts = checkpoint.members or (checkpoint,)
            carried = any(name in la.hyper for part in parts for la in part.layers.values())
            if carried or name not in sources.hyper_parameters(checkpoint):
                raise
            missing.append(f"{name}: {error.fix}")
            # Any number will do to see what else is missing, and whether the shapes fit.
            checkpoint = with_hyper(checkpoint, {name: 1.0})
        except UnusableBaseError:
            raise
        except BaseModelError as error:
            return Trial(tuple(missing), error.problem if base is not None else "")
        except AdapterError as error:
            return Trial(tuple(missing), "", error.problem)
        except IntegrityError:
            return Trial(tuple(missing), "fit")  # bind compares hashes once all shapes fit
        else:
            pipeline = bound.pipeline if bound else None
            shapes = "fit" if bound else ""
            return Trial(tuple(missing), shapes, pipeline=str(pipeline) if pipeline else "")


def _base_facts(
    checkpoint: Checkpoint, base: BaseModel | None, shapes: str
) -> dict[str, str | None]:
    trained_on = checkpoint.base.sha256
    if base is None:
        match = "not given"
    elif not trained_on:
        match = "unknown"
    else:
        match = "match" if base.sha256 == trained_on else "mismatch"
    return {
        "trained_on": checkpoint.base.id,
        "trained_on_sha256": trained_on,
        "given": base.reference if base else None,
        "given_sha256": base.sha256 if base else None,
        "hash": match,
        "shapes": shapes,
    }


def _sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    parts = checkpoint.members or (checkpoint,)
    layers = [layer for part in parts for layer in part.layers.values()]
    adapter = [tensor for layer in layers for tensor in layer.tensors.values()]
    heads = [
        tensor
        for part in parts
        for module in part.heads.values()
        for head in filter(None, module)
        for tensor in (head.weight, head.bias)
        if tensor is not None
    ]
    pairs = {
        layer.module: (layer.tensors["up"], layer.tensors["down"])
        for layer in layers
        if {"up", "down"} <= layer.tensors.keys()
    }
    shapes = Counter(f"[{up.shape[-2]}, {down.shape[-1]}]" for up, down in pairs.values())
    downs = [layer.tensors["down"] for layer in layers if "down" in layer.tensors]
    ups = [layer.tensors["up"] for layer in layers if "up" in layer.tensors]
    return {
        "rank": sorted({down.shape[-2] for down in downs}),
        "up_projections": sorted({up.shape[0] for up in ups if len(up.shape) == 3}),
        "lambda": sorted(
            {
                "full" if len(layer.tensors["lambda"].shape) == 3 else "diagonal"
                for layer in layers
                if "lambda" in layer.tensors
            }
        ),
        "adapted_modules": len({layer.module for layer in layers}),
        "adapted_shapes": dict(sorted(shapes.items())),
        "head_modules": sorted({module for part in parts for module in part.heads}),
        "replaced_tensors": len({name for part in parts for name in (*part.replaced, *part.rows)}),
        "parameters": {"adapter": _count(adapter), "heads": _count(heads)},
        "size_bytes": sum(tensor.size_bytes for tensor in (*adapter, *heads)),
        "dtypes": sorted({tensor.dtype for tensor in (*adapter, *heads)}),
    }


def _count(tensors: list[Tensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)
