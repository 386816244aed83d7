"""What parity judges: one record of each thing that ships, and of its quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.graph.origins import EditedGraph
from mtl_export.parity.report import RecordedTask
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
