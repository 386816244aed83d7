"""``mtl-export inspect``: what a checkpoint is, holds, and lacks."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

import click

from mtl_export_cli import options, render, sources
from mtl_export_cli.options import Settings, with_settings

if TYPE_CHECKING:
    from mtl_export.checkpoint.base_model import BaseModel
    from mtl_export.checkpoint.checkpoint import Checkpoint
    from mtl_export.checkpoint.tensors import Tensor

EPILOG = """\b
Example:
  mtl-export inspect
  mtl-export inspect -c adapter -b ./base --json
"""


@click.command(short_help="Say what a checkpoint is and holds.", epilog=EPILOG)
@with_settings(options.SOURCE, options.TALK)
def command(settings: Settings) -> None:
    """Say what a checkpoint is and holds.

    Format, family, tasks, sizes, the base it was trained on and whether the base given
    is that one, and what the checkpoint does not carry and must be told.
    """
    from mtl_export.checkpoint.base_model import open_base

    checkpoint = sources.open_settings_checkpoint(settings)
    base = open_base(settings.base) if settings.base else None
    report = _report(checkpoint, base)
    if settings.json:
        render.print_json({"ok": True, "command": "inspect", **report})
    else:
        _print(report)


def _report(checkpoint: Checkpoint, base: BaseModel | None) -> dict[str, Any]:
    from mtl_export.adapters.family import family_named
    from mtl_export.checkpoint.reader import FORMATS

    family = family_named(checkpoint.family)
    missing, shapes_fit = _trial(checkpoint, base)
    if base is None:
        missing.append("base: Pass --base DIR_OR_HUB_ID, or set base in mtl-export.toml")
    return {
        "checkpoint": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "format": checkpoint.format,
        "format_description": next(
            entry.description for entry in FORMATS if entry.name == checkpoint.format
        ),
        "family": {"name": family.name, "title": family.title, "paper": family.paper},
        "model_class": checkpoint.model_class,
        "tasks": [
            {"id": task.index, "name": task.name, "kind": task.kind, "labels": list(task.labels)}
            for task in checkpoint.tasks
        ],
        **_sizes(checkpoint),
        **sources.hyper_parameters(checkpoint),
        "base": _base_facts(checkpoint, base, shapes_fit),
        "missing": missing,
        "notes": list(checkpoint.notes),
    }


def _trial(checkpoint: Checkpoint, base: BaseModel | None) -> tuple[list[str], str]:
    """Return what must still be given, and how the base's shapes compare.

    Raises:
        CheckpointError: The checkpoint is broken, whatever is given.
    """
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.errors import BaseModelError, HyperparameterError, IntegrityError

    try:
        adapters = read_adapters(checkpoint, base)
    except BaseModelError as error:
        return ([error.fix] if base is None else []), (error.found if base else "")
    except HyperparameterError:
        names = [name for name, value in sources.hyper_parameters(checkpoint).items() if not value]
        return [
            f"{name}: Pass --{name} (or set {name} in mtl-export.toml) with the value used in"
            " training"
            for name in names
        ], ""
    if base is None:
        return [], ""
    try:
        bind(checkpoint, adapters, base)
    except BaseModelError as error:
        return [], error.found
    except IntegrityError:
        return [], "fit"  # bind compares hashes only once all shapes fit
    return [], "fit"


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
    layers = checkpoint.layers.values()
    adapter = [tensor for layer in layers for tensor in layer.tensors.values()]
    heads = [
        tensor
        for module in checkpoint.heads.values()
        for head in module
        for tensor in (head.weight, head.bias)
        if tensor is not None
    ]
    shapes = Counter(
        f"[{layer.tensors['up'].shape[-2]}, {layer.tensors['down'].shape[-1]}]"
        for layer in layers
        if {"up", "down"} <= layer.tensors.keys()
    )
    ups = [layer.tensors["up"] for layer in layers if "up" in layer.tensors]
    return {
        "rank": sorted({layer.tensors["down"].shape[0] for layer in layers}),
        "up_projections": sorted({up.shape[0] for up in ups if len(up.shape) == 3}),
        "lambda": sorted(
            {
                "full" if len(layer.tensors["lambda"].shape) == 3 else "diagonal"
                for layer in layers
                if "lambda" in layer.tensors
            }
        ),
        "adapted_modules": len(checkpoint.layers),
        "adapted_shapes": dict(sorted(shapes.items())),
        "head_modules": sorted(checkpoint.heads),
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
    shapes = ", ".join(f"{count} x {shape}" for shape, count in report["adapted_shapes"].items())
    parameters = report["parameters"]
    render.print_facts(
        [
            ("checkpoint", report["checkpoint"]),
            ("format", f"{report['format']} ({report['format_description']})"),
            ("family", f"{family['title']}, {family['paper']}"),
            ("numbers", ", ".join(f"{name} {_value(value)}" for name, value in numbers)),
            ("adapted modules", f"{report['adapted_modules']}: {shapes}"),
            ("heads", ", ".join(report["head_modules"]) or "none"),
            (
                "parameters",
                f"{parameters['adapter']:,} in the adapter, {parameters['heads']:,} in heads,"
                f" {render.size_text(report['size_bytes'])} as {', '.join(report['dtypes'])}",
            ),
            ("model class", report["model_class"] or "unknown"),
            ("trained on", base["trained_on"] or "unknown"),
            ("base given", _base_sentence(base)),
            *(("missing", line) for line in report["missing"]),
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


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "?" if value is None else f"{value:g}"


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
