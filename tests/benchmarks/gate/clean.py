"""Correct exports, again and again: how often each gate cries wolf, and how near ours comes.

Every run trains a new adapter, exports one artefact and calls ``mtl-export parity``; models,
layouts, dtypes, weights, rows and their lengths change from run to run. Merged folders get a
new base each time, too; graphs share one trace, and so one base, by model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

from mtl_export.parity import cases
from tests.benchmarks.gate.judges import MISSED, allclose, judge, polygraphy
from tests.benchmarks.gate.models import MODELS, Model, write_adapter, write_model
from tests.benchmarks.gate.project import Project

# ONNX Runtime's CPU has hardly any kernel for bfloat16, so that graphs in it are not run.
DTYPES = {"merge": ("fp32", "fp32", "fp16", "bf16"), "onnx": ("fp32", "fp32", "fp32", "fp16")}
LAYOUTS = ("merge", "onnx --task", "onnx --all-tasks")


@dataclass(frozen=True)
class CleanRun:
    """What came of one run.

    Attributes:
        model: Its name.
        layout: One of ``LAYOUTS``.
        dtype: What the artefact computes in.
        floors: The largest error, in noise floors; what is allowed is ``FLOOR_FACTOR``.
        alarm: The first line of an alarm of ours, empty if there is none.
        peers: By gate, whether it raised an alarm; None where it did not run.
    """

    model: str
    layout: str
    dtype: str
    floors: float
    alarm: str
    peers: dict[str, bool | None]


def clean_runs(
    count: int, folder: Path, *, first: int = 0, peers: bool = True
) -> Iterator[CleanRun]:
    """Yield ``count`` runs.

    Args:
        count: How many.
        folder: For the projects, one for each model.
        first: The number of the first: runs of one number are the same.
        peers: Ask the other gates, too.
    """
    projects: dict[str, Project] = {}
    for index in range(first, first + count):
        model = MODELS[index % len(MODELS)]
        if model.name not in projects:
            projects[model.name] = Project(write_model(model, folder / model.name), model.name)
        yield _run(projects[model.name], model, index // len(MODELS), peers=peers)


def _run(project: Project, model: Model, seed: int, *, peers: bool) -> CleanRun:
    layout = LAYOUTS[seed % len(LAYOUTS)]
    verb, _, which = layout.partition(" ")
    dtypes = DTYPES[verb]
    dtype = dtypes[seed // len(LAYOUTS) % len(dtypes)]
    task = model.tasks[seed // 2 % len(model.tasks)].name
    shutil.rmtree(project.out, ignore_errors=True)
    shutil.rmtree(project.folder / "adapter", ignore_errors=True)
    if verb == "merge":
        project = Project(project.folder / "own", project.name)
        shutil.rmtree(project.folder, ignore_errors=True)
        write_model(model, project.folder, seed=seed + 1)
    else:
        write_adapter(model, project.folder, seed=seed + 1)
    chosen = ("--all-tasks",) if which == "--all-tasks" else ("--task", task)
    result = project.run(verb, *chosen, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    rows = partial(cases.seeded_rows, seed=seed, per_task=1 + seed % 4)
    with patch.object(cases, "seeded_rows", rows):
        outcome = judge(project)
    names = {"np.allclose": allclose, "polygraphy": polygraphy} if peers else {}
    answers = {name: gate(outcome, "") for name, gate in names.items()}
    return CleanRun(
        model=model.name,
        layout=layout,
        dtype=dtype,
        floors=outcome.floors,
        alarm="" if outcome.code == 0 else (outcome.lines or (f"exit code {outcome.code}",))[0],
        peers={
            name: None if said == "not-run" else said != MISSED for name, said in answers.items()
        },
    )
