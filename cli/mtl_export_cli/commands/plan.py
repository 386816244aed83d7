"""``mtl-export plan``: what each way to deploy costs, before any of it is done."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mtl_export.api.plan import plan_of
from mtl_export.api.settings import Settings
from mtl_export_cli import options, render
from mtl_export_cli.options import with_settings

if TYPE_CHECKING:
    from mtl_export.merge.plan import Plan, Strategy

EPILOG = """\b
Example:
  mtl-export plan
  mtl-export plan --task ads_rel --dtype fp16 -o /mnt/models --json
"""


@click.command(short_help="Say what each way to deploy costs.", epilog=EPILOG)
@with_settings(options.SOURCE, options.SELECTION, options.OUTPUT[:2], options.TALK)
def command(settings: Settings) -> None:
    """Say what each way to deploy costs.

    Bytes, memory and time of merged models, graphs and engines, from shapes and from a
    second's measurement of this machine's disks; no weight is read and nothing is kept. Where
    mtl-export onnx would refuse the model, it says so and leaves graphs and engines out.
    Without --task, for all tasks.
    """
    plan = plan_of(settings)
    if settings.json:
        render.print_json(_document(plan))
        return
    _print(plan)


def _document(plan: Plan) -> dict[str, object]:
    return {
        "ok": True,
        "command": "plan",
        "tasks": plan.tasks,
        "adapted_layers": plan.adapted,
        "touched_bytes": plan.touched_bytes,
        "strategies": [
            {**asdict(strategy), "switch_s": strategy.switch_s(plan.speeds)}
            for strategy in plan.strategies
        ],
        "recommended": plan.recommended,
        "reason": plan.reason,
        "refused": plan.refused,
        "speeds": asdict(plan.speeds),
    }


def _print(plan: Plan) -> None:
    size = render.size_text
    columns = ("strategy", "read", "write", "peak memory", "time", "disk", "serve all", "switch")
    rows = [_row(strategy, plan) for strategy in plan.strategies]
    render.print_table(columns, rows, right=columns[1:])
    speeds = plan.speeds
    render.print_facts(
        [
            ("tasks", f"{plan.tasks}, each changing {size(plan.touched_bytes)} in"
                      f" {plan.adapted} layers"),
            ("measured", f"read {size(int(speeds.read_bytes_per_s))}/s,"
                         f" write {size(int(speeds.write_bytes_per_s))}/s,"
                         f" fold {speeds.fold_per_s / 1e6:.0f} M/s a core, {speeds.cores} cores,"
                         f" {size(speeds.free_bytes)} free"),
            *([("no graphs", plan.refused)] if plan.refused else []),
            ("recommended", f"{plan.recommended}: {plan.reason}."),
            ("type", next(s.command for s in plan.strategies if s.name == plan.recommended)),
        ]
    )  # fmt: skip


def _row(strategy: Strategy, plan: Plan) -> tuple[str, ...]:
    size = render.size_text
    switch = "an input" if not strategy.switch_bytes else (
        f"{size(strategy.switch_bytes)}, {strategy.switch_s(plan.speeds):.1f} s"
    )  # fmt: skip
    return (
        strategy.name,
        size(strategy.read_bytes),
        size(strategy.write_bytes),
        size(strategy.peak_bytes),
        "not told" if strategy.seconds is None else f"{strategy.seconds:.1f} s",
        size(strategy.disk_bytes) + ("" if strategy.fits else " (too large)"),
        size(strategy.serving_bytes),
        switch,
    )
