"""``mtl_export.bench``: latency, throughput and memory of what was exported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_export.api import dense, sources
from mtl_export.api.progress import SILENT, Progress
from mtl_export.api.settings import Settings, SourceOptions, settings_of
from mtl_export.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mtl_export.api.lineup import Lineup
    from mtl_export.bench.measure import BatchShape, Measurement, Timing
    from mtl_export.dense.model import DenseModel

NEW_TOKENS = 16
SHAPES = "1x32,8x128"


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What is to be measured, and how.

    Attributes:
        shapes: Batches, rows by tokens.
        onnx: Holds ONNX graphs.
        engines: Holds engines.
        rounds: Turns that each model has.
        new_tokens: Tokens that a language model generates in each call.
        eager: Measure the unmerged PyTorch model as well.
        threads: For each model; 0: all cores.
    """

    shapes: Sequence[BatchShape]
    onnx: Path
    engines: Path
    rounds: int = 5
    new_tokens: int = NEW_TOKENS
    eager: bool = True
    threads: int = 0


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured.

    Attributes:
        lineup: The models, their sizes on disk, and those that could not be run, with reasons.
        measured: Times in seconds and memory in bytes.
        conditions: The machine, versions, tasks and rounds that figures hold for.
    """

    lineup: Lineup
    measured: Measurement
    conditions: Mapping[str, Any]

    def ratio(self, timing: Timing) -> float | None:
        """Return how many times the merged graph's latency ``timing`` is; None without one."""
        from mtl_export.names import PER_TASK_ONNX

        merged = self.measured.timing(PER_TASK_ONNX, timing.shape, timing.phase)
        return timing.ratio_to(merged) if merged else None

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        return {
            "conditions": dict(self.conditions),
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
                    "ratio_to_merged": self.ratio(timing),
                }
                for timing in self.measured.timings
            ],
            "artefacts": [
                {**asdict(footprint), "file_bytes": self.lineup.files.get(footprint.subject)}
                for footprint in self.measured.footprints
            ],
            "not_run": [
                {"artefact": name, "reason": reason} for name, reason in self.lineup.not_run
            ],
        }


def bench(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    output: str | Path = "out",
    onnx: str | Path | None = None,
    engines: str | Path | None = None,
    tasks: Sequence[str] = (),
    shapes: str | None = None,
    rounds: int = 5,
    new_tokens: int | None = None,
    eager: bool = True,
    threads: int = 0,
    progress: Progress = SILENT,
    **source: Unpack[SourceOptions],
) -> BenchResult:
    """Measure what was exported, and the unmerged PyTorch model, in turns.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id; none belongs to an MTLoRA file.
        output: Holds ``onnx/`` and ``engines/``, where these are not given.
        onnx: ONNX graphs.
        engines: Engines.
        tasks: Those that rows take in turn; none: all.
        shapes: Batches, rows x tokens (images x pixels), with commas; None: ``1x32,8x128``, of
            images one.
        rounds: Turns that each model has.
        new_tokens: Tokens that a language model generates in each call; None: 16.
        eager: Measure the unmerged PyTorch model.
        threads: For each model; 0: each library's choice.
        progress: Hears what is loaded and measured.
        **source: What the checkpoint does not carry.

    Raises:
        UsageError: Nothing was exported, or a shape or ``new_tokens`` does not fit it.
        BackendMissingError: Nothing of it can be run here.

    Example:
        >>> import mtl_export as mx
        >>> result = mx.bench("adapter", base="base", shapes="1x8", rounds=1, eager=False)
        >>> [timing.subject for timing in result.measured.timings]
        ['per-task onnx', 'single-graph onnx']
    """
    if rounds < 1:
        raise UsageError(f"rounds: {rounds}", expected="1 or more", fix="Give each a turn")
    settings = settings_of(checkpoint, base, source)
    given = {"new_tokens": new_tokens, "shapes": shapes}
    typed = frozenset(name for name, value in given.items() if value is not None)
    settings = replace(settings, output_dir=Path(output), task=tuple(tasks), typed=typed)
    request = BenchRequest(
        shapes=parse_shapes(shapes or SHAPES),
        onnx=Path(onnx or settings.output_dir / "onnx"),
        engines=Path(engines or settings.output_dir / "engines"),
        rounds=rounds,
        new_tokens=NEW_TOKENS if new_tokens is None else new_tokens,
        eager=eager,
        threads=threads,
    )
    return run_bench(settings, request, progress)


def run_bench(settings: Settings, request: BenchRequest, progress: Progress) -> BenchResult:
    """Measure what ``request`` asks for; see ``bench``."""
    from mtl_export.api.lineup import (
        conditions,
        lineup,
        machine,
        refuse_longer,
        vocabulary,
        why_disturbed,
    )
    from mtl_export.bench.candidates import Batches
    from mtl_export.bench.measure import measure

    swin = dense.opened(settings)
    if swin is not None:
        return _bench_dense(swin, settings, request, progress)
    bound = sources.open_bound(settings, targets=())
    refuse_longer(request.shapes, request.new_tokens, bound)
    tasks = bound.adapters.tasks
    if settings.task:
        tasks = sources.selected_tasks(settings, tasks)
    found = lineup(
        settings,
        tasks,
        request.onnx,
        request.engines,
        threads=request.threads,
        new_tokens=request.new_tokens,
        with_eager=request.eager,
    )
    if "new_tokens" in settings.typed and not found.is_generating:
        raise UsageError(
            f"--new-tokens {request.new_tokens}: nothing that was exported generates",
            expected="the graphs of a language model",
            fix="Leave out --new-tokens",
        )
    before = machine()
    if disturbed := why_disturbed(before):
        progress.note(disturbed)
    batches = Batches(vocabulary(bound.base.config), tuple(task.index for task in tasks))
    progress.expect(len(found.subjects) + len(request.shapes))
    measured = measure(
        found.subjects, request.shapes, batches, rounds=request.rounds, progress=progress.begin
    )
    return BenchResult(found, measured, conditions(before, request.threads, request.rounds, tasks))


def _bench_dense(
    model: DenseModel, settings: Settings, request: BenchRequest, progress: Progress
) -> BenchResult:
    """Measure graphs and engines of dense tasks, and the unmerged model."""
    from mtl_export.api.lineup import EAGER, conditions, lineup, machine, why_disturbed
    from mtl_export.bench.candidates import Batches
    from mtl_export.bench.measure import BatchShape, measure
    from mtl_export.dense.eager import DenseEagerCandidate
    from mtl_export.names import ADAPTER_INPUT_ONNX

    size = model.described.image_size
    shapes = request.shapes if "shapes" in settings.typed else [BatchShape(1, size)]
    other = [shape for shape in shapes if shape.sequence != size]
    if other or "new_tokens" in settings.typed:
        raise UsageError(
            f"--shapes {other[0]}" if other else f"--new-tokens {request.new_tokens}",
            expected=f"images x {size} pixels, such as --shapes 4x{size}, and no new tokens",
            fix="Correct --shapes" if other else "Leave out --new-tokens",
        )
    tasks = sources.selected_tasks(settings, model.tasks) if settings.task else model.tasks
    found = lineup(
        settings,
        tasks,
        request.onnx,
        request.engines,
        threads=request.threads,
        new_tokens=0,
        with_eager=False,
    )
    lacking = tuple(one for one in found.not_run if one[0] != ADAPTER_INPUT_ONNX)
    found = replace(found, not_run=lacking)
    if request.eager:
        eager = DenseEagerCandidate(
            EAGER, model.checkpoint.path, size, settings.train_config, settings.tasks,
            request.threads,
        )  # fmt: skip
        found = replace(found, subjects=(*found.subjects, eager))
    before = machine()
    if disturbed := why_disturbed(before):
        progress.note(disturbed)
    progress.expect(len(found.subjects) + len(shapes))
    batches = Batches(2, tuple(task.index for task in tasks))
    measured = measure(
        found.subjects, shapes, batches, rounds=request.rounds, progress=progress.begin
    )
    return BenchResult(found, measured, conditions(before, request.threads, request.rounds, tasks))


def parse_shapes(text: str) -> list[BatchShape]:
    """Return the shapes in ``1x32,8x128``.

    Raises:
        UsageError: Something else stands there.
    """
    from mtl_export.bench.measure import BatchShape

    parsed = []
    for word in text.split(","):
        numbers = word.strip().lower().split("x")
        if len(numbers) != 2 or not all(re.fullmatch("0*[1-9][0-9]{0,17}", n) for n in numbers):
            raise UsageError(
                f"--shapes {text}: {word.strip()!r}",
                expected="rows x tokens, such as 8x128",
                fix="Correct --shapes",
            )
        parsed.append(BatchShape(int(numbers[0]), int(numbers[1])))
    return list(dict.fromkeys(parsed))
