"""``mtl-export bench``: what each exported form costs to serve, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.api.bench import BenchRequest, BenchResult, parse_shapes, run_bench
from mtl_export.api.settings import Settings
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings

if TYPE_CHECKING:
    from mtl_export.api.lineup import Lineup
    from mtl_export.bench.measure import Footprint

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
    request = BenchRequest(
        shapes=parse_shapes(shapes),
        onnx=onnx or settings.output_dir / "onnx",
        engines=engines or settings.output_dir / "engines",
        rounds=rounds,
        new_tokens=new_tokens,
        eager=not no_eager,
        threads=threads,
    )
    with render.Messages.from_settings(settings).steps() as steps:
        result = run_bench(settings, request, steps)
    if settings.json:
        render.print_json({"ok": True, "command": "bench", **result.as_dict()})
    else:
        _print(result)


def _print(result: BenchResult) -> None:
    found, measured, conditions = result.lineup, result.measured, result.conditions
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
            "" if (ratio := result.ratio(timing)) is None else f"{ratio:.3f}",
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
