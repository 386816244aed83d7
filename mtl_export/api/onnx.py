"""``mtl_export.export_onnx``: one graph for all tasks, or one per task, from one trace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from mtl_export.api import dense, graphs, sources
from mtl_export.api.graph_form import Form, form_of
from mtl_export.api.progress import SILENT, Progress
from mtl_export.api.settings import Settings, SourceOptions, settings_of
from mtl_export.api.written import Written
from mtl_export.errors import UsageError
from mtl_export.graph.names import OPSET

if TYPE_CHECKING:
    from mtl_export.checkpoint.sentence_embedding import Pooling
    from mtl_export.graph.passes.routing import TaskInput


def export_onnx(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    output: str | Path,
    tasks: Sequence[str] = (),
    layout: str | None = None,
    dtype: str | None = None,
    task_input: TaskInput = "rows",
    pooling: Pooling | None = None,
    normalize: bool = False,
    inline: bool = False,
    postprocess: bool = False,
    opset: int = OPSET,
    link_data: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **source: Unpack[SourceOptions],
) -> tuple[Written, ...]:
    """Export one routed graph, or one per task; the base is traced once.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id; none belongs to an MTLoRA file.
        output: Folder of ``model.onnx``, or of a folder per task.
        tasks: Names; none: all tasks.
        layout: ``single-graph``, ``per-task`` or ``adapter-input``; None: ``single-graph`` for all
            tasks, ``per-task`` for those named.
        dtype: ``fp32``, ``fp16`` or ``bf16``: what graphs compute in; None: ``fp32``.
        task_input: ``rows``: ``task_ids`` int64 ``[batch]``; ``scalar``: ``[1]``.
        pooling: ``mean`` or ``cls``: a bare encoder answers with one vector a row.
        normalize: Bring these vectors to length 1.
        inline: Expand the functions of the single graph.
        postprocess: Of dense tasks: put argmax, sigmoid or normalisation into the graph.
        opset: What graphs are written in.
        link_data: Hard-link what per-task folders have in common.
        force: Replace old results that are different.
        progress: Hears which graph is written.
        **source: What the checkpoint does not carry.

    Returns:
        One record per folder.

    Raises:
        UsageError: An option would be ignored, or cannot be had.
        TaskNotFoundError: A task is unknown.
        GraphError: The model cannot be traced or lowered.
        CheckpointError: The checkpoint is broken or unsupported; likewise ``BaseModelError``
            and ``AdapterError``.
        OutputError: A folder exists and differs, or cannot be written.

    Example:
        >>> import mtl_export as mx
        >>> (graph,) = mx.export_onnx("adapter", base="base", output="graphs")
        >>> "model.onnx" in graph.files
        True
    """
    form = form_of(task_input, pooling, normalize=normalize, inline=inline, opset=opset)
    settings = replace(
        settings_of(checkpoint, base, source),
        task=tuple(tasks),
        all_tasks=not tasks,
        dtype=dtype,
        output=Path(output),
        force=force,
        typed=frozenset({"inline"} | ({"task_input"} if task_input != "rows" else set())),
    )
    return export_requested(
        settings, layout, form, progress, link_data=link_data, postprocess=postprocess
    )


def export_requested(
    settings: Settings,
    layout: str | None,
    form: Form,
    progress: Progress,
    *,
    link_data: bool = False,
    postprocess: bool = False,
) -> tuple[Written, ...]:
    """Export the graphs that ``settings`` and ``layout`` ask for; see ``export_onnx``."""
    swin = dense.opened(settings)
    if swin is not None:
        dense.refuse_form(form, settings, is_linked=link_data)
        exporter = dense.DenseExporter(
            swin, settings.folder("onnx"), form, force=settings.force,
            is_postprocessed=postprocess,
        )  # fmt: skip
        return exporter.write(dense.wanted_graphs(swin, settings, layout), progress)
    if postprocess:
        raise UsageError(
            "--postprocess: a model of texts beside it",
            expected="it beside an MTLoRA file, whose outputs are maps",
            fix="Leave out --postprocess",
        )
    # Weights are folded in small blocks, for which OpenBLAS's threads wait longer than they
    # compute; it reads this when numpy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    graphs.refuse_form(layout, form, settings.dtype)
    graphs.refuse_idle(settings, graphs.layout_or_default(settings, layout), form, linked=link_data)
    bound = sources.open_bound(settings, targets=[settings.folder("onnx")])
    wanted = graphs.wanted_graphs(settings, layout, bound.adapters.tasks)
    writer = graphs.Exporter(
        bound, settings.folder("onnx"), dtype=settings.dtype, is_linked=link_data, form=form
    )
    progress.expect(len(wanted))
    return tuple(writer.write(graph, progress, force=settings.force) for graph in wanted)
