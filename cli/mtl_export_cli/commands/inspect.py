"""``mtl-export inspect``: what a checkpoint is, holds, and lacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtl_export.api import sources
from mtl_export.api.conversion import FORMATS, OWN, convert
from mtl_export.api.settings import Settings
from mtl_export.errors import UsageError
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings
from mtl_export_cli.written import print_written

if TYPE_CHECKING:
    from mtl_export.checkpoint.base_model import BaseModel
    from mtl_export.checkpoint.checkpoint import Checkpoint
    from mtl_export.checkpoint.tensors import Tensor

EPILOG = """\b
Example:
  mtl-export inspect
  mtl-export inspect -c adapter -b ./base --json
  mtl-export inspect -c final_checkpoint.pt --alpha 16 --temperature 0.1 --convert adapter
"""


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


@click.command(short_help="Say what a checkpoint is and holds.", epilog=EPILOG)
@with_settings(options.SOURCE, options.OUTPUT[-1:], options.TALK)
@option("--ledger", is_flag=True, help="List every stored tensor and what becomes of it.")
@option(
    "--convert",
    "target",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Write the checkpoint to the folder OUT, so that the next run needs no other flags.",
)
@option(
    "--convert-format", "target_format", type=click.Choice(FORMATS), default=OWN,
    show_default=True, help="mtl-export's own folder, or one PEFT LoRA folder per task.",
)  # fmt: skip
def command(settings: Settings, *, ledger: bool, target: Path | None, target_format: str) -> None:
    """Say what a checkpoint is and holds.

    Format, family, tasks, sizes, the base it was trained on and whether the base given
    is that one, and what the checkpoint does not carry and must be told.
    """
    from mtl_export.checkpoint.base_model import open_base

    if target is None:
        _refuse_idle()
    checkpoint = sources.open_settings_checkpoint(settings)
    base = open_base(settings.base) if settings.base else None
    report = _report(settings, checkpoint, base)
    if ledger:
        report["ledger"] = [
            {"tensor": entry.tensor, "fate": entry.fate, "reason": entry.reason}
            for entry in checkpoint.ledger
        ]
    outputs = []
    if target is not None:
        outputs = [convert(settings, checkpoint, base, target=target, form=target_format)]
        report["outputs"] = [output.as_dict() for output in outputs]
    if settings.json:
        render.print_json({"ok": True, "command": "inspect", **report})
        return
    _print(report)
    if outputs:
        print_written("inspect", outputs, as_json=False)


def _refuse_idle() -> None:
    """Refuse options of ``--convert`` that are typed without it."""
    for name, flag in (("force", "--force"), ("target_format", "--convert-format")):
        if options.is_typed(name):
            raise UsageError(
                where=flag,
                found="nothing is converted",
                expected="--convert beside it",
                fix=f"Add --convert OUT, or leave out {flag}",
            )


def _report(settings: Settings, checkpoint: Checkpoint, base: BaseModel | None) -> dict[str, Any]:
    from mtl_export.adapters.family import family_named
    from mtl_export.checkpoint.reader import FORMATS as KNOWN

    family = family_named(checkpoint.family)
    trial = _trial(checkpoint, base)
    missing = list(trial.missing)
    if settings.tasks is None and _has_placeholder_names(checkpoint):
        missing.append(
            f"task names: Pass --tasks A,B,... (or set tasks in mtl-export.toml),"
            f" {len(checkpoint.tasks)} in id order; until then they are numbered"
        )
    if base is None and not trial.unsupported:
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
    }


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
            name = error.where.rpartition(": ")[2]
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
            return Trial(tuple(missing), error.found if base is not None else "")
        except AdapterError as error:
            return Trial(tuple(missing), "", f"{error.found}: {error.why}")
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


def _print(report: dict[str, Any]) -> None:
    family, base = report["family"], report["base"]
    numbers = [("r", report["rank"]), ("n", report["up_projections"]), ("Lambda", report["lambda"])]
    numbers += [("alpha", report["alpha"]), ("temperature", report["temperature"])]
    if "downsample" in report:
        state = {None: "?", 0.0: "no", 1.0: "yes"}[report["downsample"]]
        numbers.append(("downsample", state))
    shapes = ", ".join(f"{count} x {shape}" for shape, count in report["adapted_shapes"].items())
    parameters = report["parameters"]
    render.print_facts(
        [
            ("checkpoint", report["checkpoint"]),
            ("format", f"{report['format']} ({report['format_description']})"),
            ("family", f"{family['title']}, {family['paper']}"),
            ("numbers", ", ".join(f"{name} {_value(value)}" for name, value in numbers)),
            ("adapted modules", f"{report['adapted_modules']}: {shapes}".removesuffix(": ")),
            ("heads", ", ".join(report["head_modules"]) or "none"),
            (
                "parameters",
                f"{parameters['adapter']:,} in the adapter, {parameters['heads']:,} in heads,"
                f" {render.size_text(report['size_bytes'])} as {', '.join(report['dtypes'])}",
            ),
            (
                "tensors",
                ", ".join(f"{count} {fate}" for fate, count in report["fates"].items()) or "none",
            ),
            ("model class", report["model_class"] or "unknown"),
            ("trained on", base["trained_on"] or "unknown"),
            ("base given", _base_sentence(base)),
            *(("pipeline", text) for text in [report["pipeline"]] if text),
            *(("missing", line) for line in report["missing"]),
            *(("exports", text) for text in [report["unsupported"]] if text),
            *(("note", line) for line in report["notes"]),
        ]
    )
    render.print_table(
        ("id", "task", "kind", "labels"),
        [
            (str(task["id"]), task["name"], task["kind"], ", ".join(task["labels"]))
            for task in report["tasks"]
        ],
        right=("id",),
    )
    if "ledger" in report:
        render.print_table(
            ("tensor", "fate", "reason"),
            [(entry["tensor"], entry["fate"], entry["reason"]) for entry in report["ledger"]],
        )


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else "?" if value is None else f"{value:g}"


def _base_sentence(base: dict[str, str | None]) -> str:
    if base["given"] is None:
        return "none"
    hashes = {
        "match": "the SHA-256 matches",
        "mismatch": f"SHA-256 MISMATCH: {base['given_sha256']}, trained on"
        f" {base['trained_on_sha256']}",
        "unknown": "the checkpoint names no SHA-256 to compare",
    }
    shapes = {"fit": "; all shapes fit", "": ""}.get(base["shapes"] or "", f"; {base['shapes']}")
    return f"{base['given']}: {hashes[base['hash'] or '']}{shapes}"
