"""``parity``'s exit codes 3, 4, 6 and 2 as a shell sees them, and its one JSON document."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from mtl_export.bundle.manifest import read_manifest, write_manifest
from mtl_export_cli.main import cli

ENTRY = "from mtl_export_cli.main import main; main()"
WITHOUT_RUNTIME = f"import sys; sys.modules['onnxruntime'] = None; {ENTRY}"
# The toy decides its topics between the second label and the fourth.
NUDGED, STEP = 1, 0.02
TASK = "topic"


def shell(words: str, folder: Path, entry: str = ENTRY) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of ``mtl-export`` with these words, in ``sh``."""
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(entry)} {words}"
    done = subprocess.run(
        ["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def nudged(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a project with the single graph, and a merged model whose head is a little off."""
    folder = tmp_path_factory.mktemp("nudged") / "project"
    shutil.copytree(graphs, folder, ignore=shutil.ignore_patterns("topic", "spam", "ads_rel"))
    words = ["merge", "--task", TASK, "--config", str(folder / "mtl-export.toml")]
    assert CliRunner().invoke(cli, words).exit_code == 0
    _nudge(folder / "out" / "merged" / TASK)
    _write_rows_near_the_boundary(folder)
    return folder


def _nudge(merged: Path) -> None:
    """Add to one bias of the head, and make the manifest agree."""
    path = merged / "model.safetensors"
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    start = 8 + length + header["classifier.bias"]["data_offsets"][0] + 4 * NUDGED
    (bias,) = struct.unpack("<f", content[start : start + 4])
    content[start : start + 4] = struct.pack("<f", bias + STEP)
    path.write_bytes(content)
    manifest = read_manifest(merged)
    assert manifest is not None
    write_manifest(merged, manifest.recipe)


def _write_rows_near_the_boundary(folder: Path) -> None:
    """Write labelled rows that the unchanged model answers right, by less than the nudge."""
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 50, (30000, 12))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids)}  # fmt: skip
    tasks = np.arange(len(ids)) % 3
    session = onnxruntime.InferenceSession(str(folder / "out" / "onnx" / "model.onnx"))
    (logits,) = session.run(["logits"], {**feed, "task_ids": tasks})
    labels = logits.argmax(axis=1)
    lead = logits.max(axis=1) - logits[:, NUDGED]
    close = (tasks == 1) & (lead > STEP / 10) & (lead < STEP * 0.9)
    kept = np.flatnonzero(close | ((tasks != 1) & (np.arange(len(ids)) < 30)))
    assert close.sum() >= 5
    arrays: dict[str, Any] = {name: value[kept] for name, value in feed.items()}
    np.savez(folder / "near.npz", **arrays, task_ids=tasks[kept], labels=labels[kept])


def test_a_task_that_loses_too_much_exits_4(nudged: Path, tmp_path: Path) -> None:
    """Every error is within the tolerance and no decision of the batches changes."""
    words = "parity --quick --atol 0.5 --rtol 0 --dataset near.npz --max-drop 5"
    code, stdout, stderr = shell(f"{words} --report {tmp_path / 'parity.json'}", nudged)
    assert code == 4, stdout + stderr
    assert "accuracy failed: the worst task may lose 5 points" in stdout
    assert f"FAILED merged pytorch, task {TASK}, accuracy: drops by 1.0000" in stdout
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["counts"]["failed"] == 0
    cells = {(cell["artefact"], cell["task"]): cell for cell in report["accuracy"]["cells"]}
    assert cells["merged pytorch", TASK]["drop"] == 1.0
    # It answers like the reference, on rows too few to show that it always does.
    single = cells["single-graph onnx", TASK]
    assert (single["drop"], single["verdict"]) == (0.0, "not-run")


def test_a_failed_comparison_exits_3_whatever_the_scores_are(nudged: Path) -> None:
    """Without the wide tolerance the nudge is an error; the document says so once."""
    words = "parity --quick --no-localise --dataset near.npz --json"
    code, stdout, _ = shell(words, nudged)
    document = json.loads(stdout)
    assert (code, document["exit_code"], document["ok"]) == (3, 3, False)
    assert document["verdict"] == document["accuracy"]["verdict"] == "failed"


def test_rows_that_cannot_tell_exit_2(nudged: Path, tmp_path: Path) -> None:
    """A drop that noise may be neither passes nor fails the build."""
    with np.load(nudged / "near.npz") as near:
        arrays: dict[str, Any] = dict(near)
    own = np.flatnonzero(arrays["task_ids"] == 1)
    others = np.flatnonzero(arrays["task_ids"] != 1)
    # The one row that flips among nine that the nudge only makes surer.
    session = onnxruntime.InferenceSession(str(nudged / "out" / "onnx" / "model.onnx"))
    feed = {name: arrays[name] for name in ("attention_mask", "token_type_ids")}
    feed |= {"input_ids": arrays["input_ids"], "task_ids": np.ones_like(arrays["task_ids"])}
    (logits,) = session.run(["logits"], feed)
    sure = np.flatnonzero(logits.argmax(axis=1) == NUDGED)
    assert sure.size
    rows = np.concatenate([others, own[:1], np.resize(sure, 9)])
    picked = {name: value[rows] for name, value in arrays.items()}
    picked["task_ids"][-9:], picked["labels"][-9:] = 1, NUDGED
    np.savez(tmp_path / "few.npz", **picked)
    words = f"parity --quick --atol 0.5 --rtol 0 --json --dataset {tmp_path / 'few.npz'}"
    code, stdout, stderr = shell(words, nudged)
    document = json.loads(stdout)
    assert (code, document["exit_code"]) == (2, 2), stdout + stderr
    assert document["verdict"] == "not-run"
    assert "give about" in document["error"]["problem"]


def test_nothing_that_could_run_exits_6(nudged: Path, tmp_path: Path) -> None:
    """One document, with the cells and the error."""
    folder = tmp_path / "project"
    shutil.copytree(nudged, folder, ignore=shutil.ignore_patterns("merged"))
    code, stdout, stderr = shell("parity --quick --json", folder, WITHOUT_RUNTIME)
    assert code == 6, stdout + stderr
    document = json.loads(stdout)
    assert document["error"]["error"] == "BackendMissingError"
    assert (document["ok"], document["exit_code"], document["verdict"]) == (False, 6, "not-run")
    assert all(cell["max_abs_error"] is None for cell in document["cells"])
    assert "onnxruntime: not installed" in str(document["cells"])


def test_both_presets_at_once_exit_2(nudged: Path) -> None:
    """They exclude each other."""
    code, stdout, _ = shell("parity --quick --full --json", nudged)
    assert (code, json.loads(stdout)["exit_code"]) == (2, 2)
