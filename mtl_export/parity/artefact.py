"""What parity judges: one record of each thing that ships, and of its quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.origins import EditedGraph
from mtl_export.names import SINGLE_GRAPH, TASK_IDS
from mtl_export.parity.report import WHOLE, Cell, RecordedTask
from mtl_export.runtime.runners.base import Runner


@dataclass(frozen=True)
class Quantised:
    """What is known of a quantised artefact.

    Attributes:
        number: ``int8``, ``fp8`` or ``int4``.
        float_path: The float graph it was made from; None where it is not there.
        recorded: What calibrate counted, by task; empty where its report is not there.
    """

    number: str
    float_path: Path | None = None
    recorded: Mapping[str, RecordedTask] = field(default_factory=dict)


@dataclass(frozen=True)
class Artefact:
    """One thing that ships.

    Attributes:
        name: As reports print it.
        kind: ``per-task`` serves one task and takes no ``task_ids``; ``single-graph`` serves all.
        runner: Runs it.
        task: Its task, if it serves one; None for a single graph.
        dtype: ``fp32``, ``fp16`` or ``bf16``: what it computes in; sets its noise floor.
        checkpoint_sha256: What it says it was made from.
        base_sha256: Likewise.
        defect: What is known to be wrong with its files; it fails then without being run.
        path: Its file or folder; None for one that lies nowhere.
        embedding: How it pools hidden states to one vector a row; None if it does not.
        quantised: What is known of an artefact with Q/DQ; None for others.
        edited: What a single graph says of the edits of its tasks; None without any.
    """

    name: str
    kind: str
    runner: Runner
    task: Task | None
    dtype: str
    checkpoint_sha256: str
    base_sha256: str
    defect: str = ""
    path: Path | None = None
    embedding: SentenceEmbedding | None = None
    quantised: Quantised | None = None
    edited: EditedGraph | None = None

    @property
    def serves_all(self) -> bool:
        """Return whether it takes ``task_ids``."""
        return self.kind == SINGLE_GRAPH

    @property
    def graph(self) -> Path | None:
        """Return its file if it is an ONNX graph, of several the first; else None."""
        return self.path if self.path is not None and self.path.suffix == ".onnx" else None

    def cell(self, task: str = "", case: str = WHOLE) -> Cell:
        """Return a passed cell, of its only task or of all of them where none is named."""
        name = task or (self.task.name if self.task else "*")
        return Cell(self.name, self.runner.name, name, case, "passed")

    def given(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs it takes: no ``task_ids`` where it serves one task."""
        return {n: v for n, v in inputs.items() if self.task is None or n != TASK_IDS}

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch on the open runner."""
        return self.runner.infer(self.given(inputs))

    def wrong_files(self, bound: BoundModel) -> str:
        """Return why its files need not be run to fail; empty if nothing is known."""
        if self.defect:
            return self.defect
        expected = {"base": (self.base_sha256, bound.base.sha256)}
        if self.edited is None:
            now = bound.adapters.checkpoint_sha256
            expected = {"checkpoint": (self.checkpoint_sha256, now), **expected}
        elif foreign := no_task_of(self.edited, bound.adapters):
            return foreign
        for name, (found, now) in expected.items():
            if found != now:
                was = f"{found[:12]}..." if found else "an unknown one"
                fix = "export it again" if self.edited is None else self.edited.text
                return f"made from {was}, not from this {name} ({now[:12]}...): {fix}"
        return ""


def no_task_of(edited: EditedGraph, adapters: AdapterSet) -> str:
    """Return that an edited graph has no task of a checkpoint; empty if it has one."""
    own, known = adapters.checkpoint_sha256, {task.index for task in adapters.tasks}
    if any(one.checkpoint_sha256 == own and one.index in known for one in edited.origins):
        return ""
    if not edited.origins:
        return (
            f"{edited.text}, by a version that did not write down where its tasks came from: only"
            " mtl-export verify holds the untouched ones, by its golden vectors"
        )
    sources = dict.fromkeys(f"{one.checkpoint_sha256[:12]}..." for one in edited.origins)
    return (
        f"no task of it is of this checkpoint ({own[:12]}...), they are of"
        f" {', '.join(sources)}: pass one of these to --checkpoint; {edited.text}"
    )
