"""Every reader of the product: the files that it is given, and what is done with them.

A reader goes as deep as the commands do: what is accepted is bound to its base, every value is
read, graphs are run.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from mtl_export.errors import MtlExportError
from tests.adapters import toys
from tests.factories import TASKS
from tests.robustness import seeds
from tests.robustness.seeds import CACHE_KEY, Good, Make

Read = Callable[[Good, Path], object]
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: For people and for ``--target``.
        make: Writes one folder for each form that its files come in.
        read: Reads such a folder.
        endings: How the names of the files end that are changed.
        share: How often it is tried, against others: less where an input takes long.
        is_resealed: Half of the time the folder's manifest is made to fit the changed file.
    """

    name: str
    make: Make
    read: Read
    endings: tuple[str, ...]
    share: int = 4
    is_resealed: bool = False


def _checkpoint(base: str | None = None, **given: Any) -> Read:
    """Return a reader of checkpoints: ``inspect --ledger``, then what a merge makes of them.

    Args:
        base: The part of ``Good`` that is the base; "" for the folder ``base`` inside.
        given: Options of the command line.
    """

    def read(good: Good, folder: Path) -> None:
        from mtl_export.checkpoint.reader import open_checkpoint
        from mtl_export_cli.commands.inspect import command

        numbers = {
            key: value for key, value in given.items() if key not in {"task_names", "biases"}
        }
        own = dict(given)
        if "biases" in given:
            own["biases"] = folder / given["biases"]
        if (folder / "second").exists():
            own["task_names"] = ["second", "first"]
        words = ["-c", str(folder), "--ledger", "--json"]
        for key, value in numbers.items():
            words += ["--no-downsample"] if key == "downsample" else [f"--{key}", str(value)]
        if "task_names" in own:
            words += ["--tasks", ",".join(own["task_names"])]
        reference = None if base is None else str(getattr(good, base) if base else folder / "base")
        with redirect_stdout(io.StringIO()):
            _ran(command, [*words, *(["-b", reference] if reference else [])])
        checkpoint = open_checkpoint(folder, **own)
        for part in checkpoint.members or (checkpoint,):
            for tensor in (
                *part.replaced.values(),
                *(t for la in part.layers.values() for t in la.tensors.values()),
            ):
                tensor.widened()
        if reference:
            _merged(good, checkpoint, reference)

    return read


def _ran(command: click.Command, words: list[str]) -> None:
    """Run a command as ``main`` does, up to its error boundary."""
    with suppress(click.ClickException):  # ``main`` turns these into usage errors
        command.main(words, standalone_mode=False)


def _merged(good: Good, checkpoint: Any, reference: str) -> None:
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.checkpoint.base_model import open_base
    from mtl_export.merge.layout import merge_layout
    from mtl_export.merge.writer import task_config

    opened = open_base(reference)
    bound = bind(checkpoint, read_adapters(checkpoint, opened), opened)
    task = bound.adapters.tasks[0]
    layout = merge_layout(bound, [task])
    task_config(bound, task, None)
    for file in layout.own[task.name]:
        file.header()
        for piece in file.pieces:
            if piece.values is not None:
                piece.values()


def _base(good: Good, folder: Path) -> None:
    from mtl_export.api.artefacts import first_graph
    from mtl_export.api.parity_inputs import cases_of
    from mtl_export.checkpoint.base_model import companion_files, open_base
    from mtl_export.checkpoint.reader import open_checkpoint

    opened = open_base(str(folder))
    for tensor in opened.tensors.values():
        tensor.widened()
    companion_files(opened)
    checkpoint = dataclasses.replace(
        open_checkpoint(good.adapter), base=type(good.bound.checkpoint.base)()
    )
    _merged(good, checkpoint, str(folder))
    bound = dataclasses.replace(good.bound, base=opened)
    first_graph(bound)
    cases_of(bound, None)


def _texts(good: Good, folder: Path) -> None:
    from mtl_export.runtime.texts import TextFiles

    files = TextFiles(folder)
    rows = files.encode(["a nurse", ("who", "night shift")], truncate=True)
    files.encode(["free"])
    files.decode(rows["input_ids"])
    assert isinstance(files.pad_token_id, int)
    assert files.longest is None or files.longest > 0
    assert files.placed_by in {"", "input_ids", "attention_mask"}
    assert files.most_tokens is None or files.most_tokens == files.positions


def _transformers_texts(good: Good, folder: Path) -> None:
    from mtl_export.data.rows import load_rows, tokenize

    tokenize(load_rows(good.rows)[:2], folder, TASKS, max_length=9)


def _generation(good: Good, folder: Path) -> None:
    from mtl_export.runtime.token_rules import TokenRules

    rules = TokenRules.from_folder(folder)
    logits, tokens = np.zeros((2, 12), np.float32), np.array([[1, 3, 4], [1, 4, 4]])
    for length in (1, 3):
        rules.applied(logits, tokens[:, :length], begin=1, last=length == 3)


def _settings(good: Good, folder: Path) -> None:
    from mtl_export_cli.commands import bench, calibrate, inspect, merge, onnx, parity, plan, trt

    for one in (inspect, plan, merge, onnx, calibrate, trt, parity, bench):
        # Every option is read and converted; nothing is run.
        words = ["--config", str(folder / "mtl-export.toml")]
        with suppress(click.ClickException), one.command.make_context(one.command.name, words):
            pass


def _data(good: Good, reference: Path) -> None:
    from mtl_export.api.parity_inputs import cases_of
    from mtl_export.data.samples import open_samples
    from mtl_export.parity.accuracy.labelled_files import open_labelled

    def read(reader: Callable[[], Any]) -> None:
        try:
            reader()
        except MtlExportError as error:
            refusals.append(error)

    refusals: list[MtlExportError] = []
    options: dict[str, Any] = {"max_length": 9}
    read(
        lambda: open_samples(str(reference), TASKS, good.base, per_task=2, seed=0, **options)[
            0
        ].sha256()
    )
    read(lambda: open_labelled(str(reference), TASKS, good.base, scores={}, **options))
    read(lambda: cases_of(good.bound, reference))
    if refusals:
        raise refusals[0]


def _cache(good: Good, folder: Path) -> None:
    from mtl_export.api.quantised import read_quantised
    from mtl_export.bundle.merged import _Journal
    from mtl_export_calibration.cache import read_arrays, read_cache

    read_cache(folder / "kept.json", CACHE_KEY, {"latency_ms": {str: float}})
    read_arrays(folder / "kept.npz", CACHE_KEY)
    read_quantised(folder / "model.onnx", "int8", None, artefact="x", times=folder / "latency.json")
    _Journal(lambda: folder, "k").read()


def _golden(good: Good, folder: Path) -> None:
    from mtl_export.bundle.edited import _followed
    from mtl_export.runtime.golden import golden_bytes, read_golden

    vectors = read_golden(folder / "golden.npz")
    for vector in vectors:
        assert isinstance(vector.widest, float)
        vector.difference(vector.outputs)
        vector.difference({name: np.zeros((3, 4)) for name in vector.outputs})
    golden_bytes(
        _followed(vectors, TASKS, TASKS[:2], "spam", {task.name: task.name for task in TASKS})
    )


def _verify(good: Good, folder: Path) -> None:
    from mtl_export.bundle.verify import verify_folder

    verify_folder(folder.parent, threads=1)


def _session(good: Good, folder: Path) -> None:
    from mtl_export.runtime.session import TaskSession

    session = TaskSession(folder, threads=1)
    rows = {name: value for name, value in toys.token_rows(3, 6).items()}
    session.run(
        rows, [task.index for task in session.tasks[:3]] * (3 // min(3, len(session.tasks)))
    )


def _edit(verb: str, name: str, new: str = "") -> Read:
    """Return a reader of graphs that edits their tasks."""

    def read(good: Good, folder: Path) -> None:
        from mtl_export.bundle.edited import edit_folder
        from mtl_export.graph import task_edit

        adapters = good.bound.adapters
        if verb == "rename":
            edit_folder(
                folder,
                lambda models: task_edit.rename_task(models, name, new),
                f"rename {name} {new}",
                renamed=(name, new),
            )
        elif verb == "remove":
            edit_folder(
                folder,
                lambda models: task_edit.remove_task(models, name),
                f"remove {name}",
                removed=name,
            )
        else:
            edit_folder(
                folder,
                lambda models: task_edit.add_task(models, adapters, adapters.tasks[0], name),
                f"add {name} of {adapters.tasks[0].name} from {adapters.checkpoint_sha256}",
                added=name,
            )

    return read


def _parity(good: Good, folder: Path) -> None:
    """Read graphs as parity does, up to where they are compared."""
    from mtl_export.api.artefacts import Places, find_artefacts
    from mtl_export.parity.cases import Case
    from mtl_export.parity.checks.metadata import beside_cells
    from mtl_export.parity.checks.stored_tensors import stored_cell, table_cell
    from mtl_export.parity.judged import Judged
    from mtl_export.parity.outputs import Subject
    from mtl_export.parity.reference import Reference
    from mtl_export.parity.report import Cell
    from mtl_export.parity.tolerance import Tolerance

    bound = good.bound
    places = Places(folder / "merged", folder, folder / "engines", folder)
    artefacts, _ = find_artefacts(bound, places, threads=1)
    cell = Cell("single", "-", "*", "*", "passed")
    for artefact in artefacts:
        if artefact.path is not None and artefact.path.suffix == ".onnx" and not artefact.defect:
            exact = [Reference(Case("all", {}), Subject("logits"), np.empty(0), "all")]
            beside_cells(Judged(bound, artefact, exact, {}, Tolerance()))
            table_cell(cell, artefact.path, bound.adapters.tasks)
            stored_cell(cell, artefact.path, bound.adapters)


def _builder(good: Good, folder: Path) -> None:
    """Read a graph as ``trt`` does, up to where a builder takes it."""
    from mtl_export.api.edited_graph import edited_graph
    from mtl_export.tensorrt.differences import read_weights, refit_key
    from mtl_export.tensorrt.shapes import check_profiles, default_profile
    from mtl_export.tensorrt.source import read_source

    path = folder / "model.onnx"
    edited_graph(folder)
    source = read_source(path)
    assert source.sha256
    source.structured("tasks", [{"name": str}])
    check_profiles(source, [default_profile(path)])
    refit_key(path)
    read_weights(path)


def _engine(good: Good, folder: Path) -> None:
    from mtl_export.api.artefacts import Places, find_artefacts
    from mtl_export.bundle.verify import verify_folder
    from mtl_export.tensorrt import EngineManifest, manifest_path
    from mtl_export.tensorrt.header import read_header, sha256_of_graph

    engine = folder / "model.engine"
    if engine.is_file():
        sha256_of_graph(engine, read_header(engine))
    find_artefacts(good.bound, Places(folder / "m", folder / "o", folder), threads=1)
    verify_folder(folder.parent, threads=1)
    manifest = EngineManifest.read(manifest_path(engine))
    json.dumps(manifest.as_dict())


PICKLED = {"alpha": 7.0, "temperature": 0.3}
TARGETS = (
    Target("official", seeds.official, _checkpoint("llama", **PICKLED), WEIGHTS),
    Target("vlbart", seeds.vlbart, _checkpoint("", alpha=7.0, temperature=0.8, downsample=False,
                                               task_names=list("abcd")), (*WEIGHTS, ".json"), 2),
    Target("mtlora", seeds.mtlora, _checkpoint(), (*WEIGHTS, ".json")),
    Target("peft", seeds.peft, _checkpoint("base"), (*WEIGHTS, ".json")),
    Target("adapterhub", seeds.adapterhub, _checkpoint("base"), (*WEIGHTS, ".json")),
    Target("own folder", seeds.own_folder, _checkpoint("base"), (*WEIGHTS, ".json")),
    Target("biases", seeds.biases, _checkpoint("llama", biases="biases.pt", **PICKLED),
           ("biases.pt",), 2),
    Target("base", seeds.base, _base, (*WEIGHTS, "config.json", "index.json"), 2),
    Target("tokenizer", seeds.tokenizer, _texts, (".json",)),
    Target("tokenizer of transformers", seeds.tokenizer, _transformers_texts, (".json",), 1),
    Target("generation settings", seeds.generation, _generation, (".json",)),
    Target("settings file", seeds.settings, _settings, (".toml",)),
    Target("rows of text", seeds.data_rows, lambda good, folder: _data(good,
                                                                       folder / "rows.jsonl"),
                                                                       (".jsonl",), 2),
    Target("rows of arrays", seeds.data_arrays, lambda good, folder: _data(good,
                                                                           folder / "rows.npz"),
                                                                           (".npz",), 2),
    Target("calibration cache", seeds.cache, _cache, (".json", ".npz")),
    Target("golden vectors", seeds.golden, _golden, (".npz",)),
    Target("verify", seeds.outputs, _verify, (".json", ".npz", ".onnx", ".data"), 1,
           is_resealed=True),
    Target("session", seeds.graphs, _session, (".onnx", ".data", ".onnx_adapter", ".json"), 1),
    Target("tasks add", seeds.outputs, _edit("add", "again"), (".onnx", ".json", ".npz"), 1,
           is_resealed=True),
    Target("tasks remove", seeds.outputs, _edit("remove", "topic"), (".onnx", ".json", ".npz"), 1,
           is_resealed=True),
    Target("tasks rename", seeds.outputs, _edit("rename", "topic", "x"), (".onnx", ".json",
                                                                          ".npz"), 1,
                                                                          is_resealed=True),
    Target("parity's readers", seeds.graphs, _parity, (".onnx", ".data", ".json"), 1,
           is_resealed=True),
    Target("trt's readers", seeds.graphs, _builder, (".onnx", ".data", "config.json"), 2),
    Target("engines", seeds.engines, _engine, (".engine", ".json"), is_resealed=True),
)  # fmt: skip
