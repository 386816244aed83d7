"""``mtl-export bench``: what each exported form costs to serve, on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtl_export.api import sources
from mtl_export.api.settings import Settings
from mtl_export.errors import UsageError
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.api.lineup import Lineup
    from mtl_export.bench.measure import Footprint, Measured, Shape, Timing
    from mtl_export.checkpoint.checkpoint import Task

DEFAULT_SHAPES = "1x32,8x128"
EPILOG = """\b
Example:
  mtl-export bench
  mtl-export bench --shapes 1x32,8x128,32x64 --rounds 10 --threads 2
  mtl-export bench --task ads_rel --no-eager --json
"""


@click.command(short_help="Measure latency, throughput and memory.", epilog=EPILOG)
@with_settings(options.SOURCE, options.SELECTION, options.TALK)
@option("--shapes", default=DEFAULT_SHAPES, show_default=True, metavar="BxS,...",
        help="Batches to measure: rows x tokens (images: rows alone), with commas.")  # fmt: skip
@option("--rounds", type=click.IntRange(min=1), default=5, show_default=True,
        help="Turns that each model has; blocks of calls alternate between models.")  # fmt: skip
@option("--new-tokens", type=click.IntRange(min=1), default=16, show_default=True,
        help="Tokens that a language model generates in each call.")  # fmt: skip
@option("--no-eager", is_flag=True, help="Leave the unmerged PyTorch model out.")
@option("--onnx", type=click.Path(path_type=Path), metavar="DIR", help="ONNX graphs.")
@option("--engines", type=click.Path(path_type=Path), metavar="DIR", help="Engines.")
@options.THREADS
def command(
    settings: Settings,
    shapes: str,
    rounds: int,
    new_tokens: int,
    onnx: Path | None,
    engines: Path | None,
    threads: int,
    *,
    no_eager: bool,
) -> None:
    """Measure latency, throughput and memory.

    Times what was exported under the output folder, and the unmerged PyTorch model, on
    batches whose rows take the tasks in turn (all of them, or those given with --task). The
    merged graph serves one task, the first of them, on batches of the same shape. Every model
    runs in a process of its own; blocks of calls alternate, and ratios compare blocks of the same
    round. Exit code 2 when nothing was exported, 6 when nothing of it can be run here.
    """
    from mtl_export.api.lineup import conditions, lineup, machine, refuse_longer

    wanted = parse_shapes(shapes)
    bound = sources.open_bound(settings, targets=())
    refuse_longer(wanted, new_tokens, bound)
    tasks = bound.adapters.tasks
    if settings.task:
        tasks = sources.selected_tasks(settings, tasks)
    found = lineup(
        settings,
        tasks,
        onnx or settings.output_dir / "onnx",
        engines or settings.output_dir / "engines",
        threads=threads,
        new_tokens=new_tokens,
        with_eager=not no_eager,
    )
    if options.is_typed("new_tokens") and not found.is_generating:
        raise UsageError(
            where=f"--new-tokens {new_tokens}",
            found="nothing that was exported generates",
            expected="the graphs of a language model",
            fix="Leave out --new-tokens",
        )
    before = machine()
    measured = _measured(settings, bound, found, wanted, tasks, rounds=rounds)
    facts = conditions(before, threads, rounds, tasks)
    if settings.json:
        render.print_json(_document(found, measured, facts))
    else:
        _print(found, measured, facts)


def _measured(
    settings: Settings,
    bound: BoundModel,
    found: Lineup,
    shapes: list[Shape],
    tasks: Sequence[Task],
    *,
    rounds: int,
) -> Measured:
    from mtl_export.api.lineup import machine, vocabulary, why_disturbed
    from mtl_export.bench.candidates import Batches
    from mtl_export.bench.measure import measure

    talk = render.Talk.from_settings(settings)
    if disturbed := why_disturbed(machine()):
        talk.note(disturbed)
    batches = Batches(vocabulary(bound.base.config), tuple(task.index for task in tasks))
    with talk.steps(len(found.subjects) + len(shapes)) as steps:
        return measure(found.subjects, shapes, batches, rounds=rounds, progress=steps.begin)


def parse_shapes(text: str) -> list[Shape]:
    """Return the shapes in ``1x32,8x128``.

    Raises:
        UsageError: Something else stands there.
    """
    from mtl_export.bench.measure import Shape

    parsed = []
    for word in text.split(","):
        numbers = word.strip().lower().split("x")
        if len(numbers) != 2 or not all(re.fullmatch("0*[1-9][0-9]{0,17}", n) for n in numbers):
            raise UsageError(
                where=f"--shapes {text}",
                found=repr(word.strip()),
                expected="rows x tokens, such as 8x128",
                fix="Correct --shapes",
            )
        parsed.append(Shape(int(numbers[0]), int(numbers[1])))
    return list(dict.fromkeys(parsed))


def _document(found: Lineup, measured: Measured, conditions: dict[str, Any]) -> dict[str, object]:
    return {
        "ok": True,
        "command": "bench",
        "conditions": conditions,
        "results": [
            {
                "artefact": timing.subject,
                "shape": str(timing.shape),
                "phase": timing.phase,
                "calls": len(timing.calls),
                "p50_ms": timing.percentile_ms(50),
                "p95_ms": timing.percentile_ms(95),
                "rows_per_s": timing.rows_per_s,
                "tokens_per_s": timing.tokens_per_s,
                "ratio_to_merged": _ratio(measured, timing),
            }
            for timing in measured.timings
        ],
        "artefacts": [
            {**asdict(footprint), "file_bytes": found.files.get(footprint.subject)}
            for footprint in measured.footprints
        ],
        "not_run": [{"artefact": name, "reason": reason} for name, reason in found.not_run],
    }


def _ratio(measured: Measured, timing: Timing) -> float | None:
    """Return how many times the merged graph's latency this is; None without one."""
    from mtl_export.api.lineup import MERGED

    merged = measured.timing(MERGED, timing.shape, timing.phase)
    return timing.ratio_to(merged) if merged else None


def _print(found: Lineup, measured: Measured, conditions: dict[str, Any]) -> None:
    for name, reason in found.not_run:
        render.print_line(f"not run: {name}: {reason}")
    columns = ("shape", "phase", "artefact", "p50 ms", "p95 ms", "rows/s", "tokens/s", "/ merged")
    rows = [
        (
            str(timing.shape),
            timing.phase,
            timing.subject,
            f"{timing.percentile_ms(50):.2f}",
            f"{timing.percentile_ms(95):.2f}",
            f"{timing.rows_per_s:.1f}",
            "" if (tokens := timing.tokens_per_s) is None else f"{tokens:.0f}",
            "" if (ratio := _ratio(measured, timing)) is None else f"{ratio:.3f}",
        )
        for timing in measured.timings
    ]
    render.print_table(columns, rows, right=columns[3:])
    costs = ("artefact", "files", "load", "peak memory", "of it libraries", "PSS")
    render.print_table(
        costs, [_footprint_row(one, found) for one in measured.footprints], right=costs[1:]
    )
    loads = [conditions["load_average"], conditions["load_average_after"]]
    before, after = (str(load[0]) if load else "unknown" for load in loads)
    usable, threads = conditions["cores_usable"], conditions["threads"]
    versions = (f"{name} {number}" for name, number in conditions["versions"].items())
    render.print_facts(
        [
            ("machine", f"{conditions['processor']}, {usable} cores, {conditions['system']}"),
            ("load average", f"{before} before, {after} after"),
            ("threads", str(threads) if threads else "each library's choice"),
            ("tasks", f"{', '.join(conditions['tasks'])}, in turn"),
            ("rounds", str(conditions["rounds"])),
            ("versions", ", ".join(versions)),
        ]
    )


def _footprint_row(one: Footprint, found: Lineup) -> tuple[str, ...]:
    size = render.size_text
    files = found.files.get(one.subject)
    return (
        one.subject,
        "" if files is None else size(files),
        f"{one.load_s:.2f} s",
        size(one.peak_bytes),
        size(one.before_bytes),
        "" if one.pss_bytes is None else size(one.pss_bytes),
    )
