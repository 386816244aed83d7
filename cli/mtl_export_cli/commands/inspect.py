"""``mtl-export inspect``: what a checkpoint is, holds, and lacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mtl_export.api.conversion import FORMATS, OWN
from mtl_export.api.inspect import inspect_requested
from mtl_export.api.settings import Settings
from mtl_export.errors import UsageError
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings
from mtl_export_cli.written import print_written

EPILOG = """\b
Example:
  mtl-export inspect
  mtl-export inspect -c adapter -b ./base --json
  mtl-export inspect -c final_checkpoint.pt --alpha 16 --temperature 0.1 --convert adapter
"""


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
    if target is None:
        _refuse_idle()
    found = inspect_requested(settings, ledger=ledger, target=target, target_format=target_format)
    report, outputs = found.report, found.outputs
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
                f"{flag}: nothing is converted",
                expected="--convert beside it",
                fix=f"Add --convert OUT, or leave out {flag}",
            )


def _print(report: Mapping[str, Any]) -> None:
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
    if "folds" in report:
        render.print_table(
            ("adapted layer", "folds", "stays"),
            [(one["layer"], one["folds"], one["stays"] or "nothing") for one in report["folds"]],
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
