"""Which exported forms there are to measure, and the machine they are measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_export.api.settings import Settings
from mtl_export.errors import BackendMissingError, IntegrityError, UsageError
from mtl_export.names import (
    ADAPTER_INPUT,
    ADAPTER_INPUT_ONNX,
    PER_TASK_ENGINE,
    PER_TASK_ONNX,
    SINGLE_ENGINE,
    SINGLE_GRAPH,
    SINGLE_ONNX,
)

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bench.measure import BatchShape, Candidate
    from mtl_export.checkpoint.checkpoint import Task

EAGER = "eager pytorch unmerged"
PACKAGES = ("mtl-export", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "torch",
            "transformers")  # fmt: skip


@dataclass(frozen=True)
class Lineup:
    """What is measured and what is not.

    Attributes:
        subjects: In the order of the table; the merged graph, if there, first.
        files: What each subject's weights take on disk, by its name.
        not_run: Form and reason.
        is_generating: Some of them generate tokens.
    """

    subjects: tuple[Candidate, ...]
    files: Mapping[str, int]
    not_run: tuple[tuple[str, str], ...]
    is_generating: bool


def lineup(
    settings: Settings,
    tasks: Sequence[Task],
    onnx: Path,
    engines: Path,
    *,
    threads: int,
    new_tokens: int,
    with_eager: bool,
) -> Lineup:
    """Return every form that can be measured.

    Args:
        settings: Where checkpoint and base are.
        tasks: The tasks that are asked for; the first with a merged graph stands for all.
        onnx: Holds ``model.onnx`` (or ``prefill.onnx``) and ``<task>/model.onnx``.
        engines: Holds ``model.engine`` and ``<task>/model.engine``.
        threads: For each model.
        new_tokens: Decoding steps, for language models.
        with_eager: Measure PyTorch as well.

    Raises:
        UsageError: Nothing was exported.
        BackendMissingError: What was exported cannot be run here.
    """
    from mtl_export.bench.candidates import EngineCandidate, OnnxCandidate

    subjects: list[Candidate] = []
    files: dict[str, int] = {}
    not_run: list[tuple[str, str]] = []
    is_generating = False
    for name, options, folder in _graphs(onnx, tasks):
        if folder is None:
            not_run.append((name, f"not exported; mtl-export onnx --all-tasks{options} makes it"))
            continue
        is_generating |= _graph(folder) != "model.onnx"
        task = tasks[0].name if name == ADAPTER_INPUT_ONNX else ""
        first = _graph(folder).removesuffix(".onnx")
        subjects.append(OnnxCandidate(name, folder, first, threads, new_tokens, task))
        files[name] = _size(folder, "*.onnx", "*.onnx.data", "*.onnx_adapter")
    for name, candidates in (
        (PER_TASK_ENGINE, [engines / task.name for task in tasks]),
        (SINGLE_ENGINE, [engines]),
    ):
        path = next((one / "model.engine" for one in candidates
                     if (one / "model.engine").is_file()), None)  # fmt: skip
        reason = _why_no_engine(path)
        if path is None or reason:
            not_run.append((name, reason))
            continue
        subjects.append(EngineCandidate(name, path))
        files[name] = path.stat().st_size
    _refuse_nothing(subjects, not_run, onnx, engines)
    if with_eager:
        subjects.append(_eager(settings, threads, new_tokens if is_generating else 0))
    return Lineup(tuple(subjects), files, tuple(not_run), is_generating)


def _graph(folder: Path) -> str:
    """Return the name of the graph to open in ``folder``, "" if there is none."""
    names = ("model.onnx", "prefill.onnx", "encoder.onnx")
    return next((name for name in names if (folder / name).is_file()), "")


def _graphs(onnx: Path, tasks: Sequence[Task]) -> list[tuple[str, str, Path | None]]:
    """Return name, options that export it and folder (None: not there) of each form."""
    adapted = [one for one in (onnx, onnx / ADAPTER_INPUT) if any(one.glob("*.onnx_adapter"))]
    single = [one for one in (onnx, onnx / SINGLE_GRAPH) if one not in adapted]
    forms = (
        (PER_TASK_ONNX, " --layout per-task", [onnx / task.name for task in tasks]),
        (SINGLE_ONNX, "", single),
        (ADAPTER_INPUT_ONNX, " --layout adapter-input", adapted),
    )
    return [
        (name, options, next((one for one in folders if _graph(one)), None))
        for name, options, folders in forms
    ]


def _why_no_engine(path: Path | None) -> str:
    """Return why the engine at ``path`` cannot run here, "" if it can."""
    from mtl_export.tensorrt import TensorRTBackend

    if path is None:
        return "not built; mtl-export trt --all-tasks makes it"
    try:
        return TensorRTBackend(path).why_not_runnable()
    except IntegrityError as error:
        return str(error).rstrip(".")


def _refuse_nothing(
    subjects: Sequence[Candidate], not_run: Sequence[tuple[str, str]], onnx: Path, engines: Path
) -> None:
    if subjects:
        return
    if any(engines.glob("**/model.engine")):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_run)
        raise BackendMissingError(
            f"bench: {reasons}",
            expected="at least one exported model that can run here",
            fix="See mtl-export doctor for what is missing",
        )
    raise UsageError(
        f"bench: nothing under {onnx} or {engines}",
        expected="at least one exported model",
        fix="Run mtl-export onnx --all-tasks, and once more with --layout per-task",
    )


def _eager(settings: Settings, threads: int, new_tokens: int) -> Candidate:
    from mtl_export.bench.candidates import EagerCandidate

    if settings.checkpoint is None or settings.base is None:
        raise RuntimeError("the checkpoint was opened from these settings")
    given = {
        "alpha": settings.alpha,
        "temperature": settings.temperature,
        "downsample": settings.downsample,
        "task_names": settings.tasks,
        "biases": settings.biases,
    }
    return EagerCandidate(EAGER, settings.checkpoint, settings.base, given, threads, new_tokens)


def _size(folder: Path, *patterns: str) -> int:
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def refuse_longer(shapes: Sequence[BatchShape], new_tokens: int, bound: BoundModel) -> None:
    """Refuse rows that have more tokens than the model has positions.

    Raises:
        UsageError: One of the shapes has.
    """
    from mtl_export.checkpoint.model_class import is_causal_lm
    from mtl_export.checkpoint.model_inputs import longest_sequence

    longest = longest_sequence(bound.base.config)
    more = new_tokens if is_causal_lm(bound.adapters.model_class) else 0
    for shape in shapes:
        if shape.sequence + more > longest:
            new = f" and {more} new ones" if more else ""
            raise UsageError(
                f"--shapes {shape}: {shape.sequence} tokens{new}",
                expected=f"at most {longest}, because the model has no more positions",
                fix="Shorten the shape" + (", or lower --new-tokens" if more else ""),
            )


def why_disturbed(conditions: Mapping[str, Any]) -> str:
    """Return what to tell of a machine that is at work already, "" if it is not."""
    loads, cores = conditions["load_average"], conditions["cores_usable"] or conditions["cores"]
    if not loads or loads[0] < cores / 2:
        return ""
    return (
        f"The machine is busy (load {loads[0]} on {cores} cores): times hold for nothing but now,"
        " ratios are rough."
    )


def vocabulary(config: Mapping[str, Any]) -> int:
    """Return below which number token ids lie; 2 where the config does not say."""
    text = config.get("text_config")
    own = text if isinstance(text, dict) else {}
    return int(own.get("vocab_size") or config.get("vocab_size") or 2)


def machine() -> dict[str, Any]:
    """Return what the figures hold for, as far as the system says."""
    loads = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "system": f"{platform.system()} {platform.release()}",
        "load_average": [round(load, 2) for load in loads],
    }


def conditions(
    before: Mapping[str, Any], threads: int, rounds: int, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Return what figures hold for: ``before`` is the machine as it was then."""
    return {
        **before,
        "load_average_after": machine()["load_average"],
        "threads": threads,
        "rounds": rounds,
        "tasks": [task.name for task in tasks],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what computes, without importing it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
