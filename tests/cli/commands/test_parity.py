"""``mtl-export parity``: the exit code is the gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export_cli.main import cli
from tests.cli.conftest import Run

TASK = "topic"


@pytest.fixture(scope="module")
def exported_once(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project with merged folders and graphs, made once and not changed."""
    folder = tmp_path_factory.mktemp("merged") / "project"
    shutil.copytree(graphs, folder)
    words = ["merge", "--all-tasks", "--config", str(folder / "mtl-export.toml")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy to work in."""
    folder = tmp_path / "project"
    shutil.copytree(exported_once, folder)
    monkeypatch.chdir(folder)
    return folder


def test_right_exports_pass(exported: Path, run: Run) -> None:
    """Exit 0, a table task by artefact, and what did not run is said, not passed."""
    outcome = run("parity", "--report", "parity.json")
    assert outcome.code == 0, outcome.stdout
    assert "parity passed" in outcome.stdout
    assert "not run: single-graph engine: not exported" in outcome.stdout
    report = json.loads((exported / "parity.json").read_text())
    assert report["counts"]["failed"] == 0
    artefacts = {cell["artefact"] for cell in report["cells"] if cell["verdict"] == "passed"}
    assert artefacts == {"merged pytorch", "per-task onnx", "single-graph onnx"}
    assert run("parity", "--json").json["ok"] is True


def test_nothing_exported_is_no_pass(exported: Path, run: Run) -> None:
    """Without anything to compare the command is refused."""
    shutil.rmtree(exported / "out")
    outcome = run("parity")
    assert outcome.code == 2
    assert "mtl-export merge --all-tasks" in outcome.stderr


def test_a_folder_that_does_not_exist_is_no_pass(exported: Path, run: Run) -> None:
    """A misspelt place to look would otherwise shrink the check."""
    outcome = run("parity", "--merged", "typo")
    assert outcome.code == 2
    assert "typo" in outcome.stderr


def nudge_head(project: Path) -> None:
    """Add to one head bias in place."""
    path = project / "out" / "merged" / TASK / "model.safetensors"
    file = open_safetensors(path)
    content = bytearray(path.read_bytes())
    content[file.offsets_bytes["classifier.bias"] + 2] ^= 0x40
    path.write_bytes(bytes(content))


def swap_labels(project: Path) -> None:
    """Exchange two label names."""
    path = project / "out" / "merged" / TASK / "config.json"
    config = json.loads(path.read_text())
    names = config["id2label"]
    names["0"], names["1"] = names["1"], names["0"]
    path.write_text(json.dumps(config))


def swap_merged(project: Path) -> None:
    """Exchange two tasks' weights."""
    merged = project / "out" / "merged"
    one, other = merged / TASK / "model.safetensors", merged / "spam" / "model.safetensors"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def cut(path: str) -> Callable[[Path], None]:
    """Return a fault: a file that ends halfway."""

    def apply(project: Path) -> None:
        content = (project / path).read_bytes()
        (project / path).write_bytes(content[: len(content) // 2])

    return apply


def delete(path: str) -> Callable[[Path], None]:
    """Return a fault: a file that is gone."""
    return lambda project: (project / path).unlink()


def break_json(path: str) -> Callable[[Path], None]:
    """Return a fault: a file that is no JSON."""

    def apply(project: Path) -> None:
        (project / path).write_text("{")

    return apply


FAULTS: dict[str, Callable[[Path], None]] = {
    "head bias": nudge_head,
    "label names": swap_labels,
    "weights of two tasks": swap_merged,
    "weights cut": cut(f"out/merged/{TASK}/model.safetensors"),
    "config gone": delete(f"out/merged/{TASK}/config.json"),
    "config broken": break_json(f"out/merged/{TASK}/config.json"),
    "tokenizer gone": delete(f"out/merged/{TASK}/tokenizer.json"),
    "manifest broken": break_json(f"out/merged/{TASK}/mtl-export.json"),
    "graph gone": delete("out/onnx/model.onnx"),
    "graph cut": cut("out/onnx/model.onnx"),
    "data cut": cut("out/onnx/model.onnx.data"),
    "merged graph's data gone": delete(f"out/onnx/{TASK}/model.onnx.data"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_what_was_written_fails(exported: Path, run: Run, fault: str) -> None:
    """Exit 3 with the reason; the other artefacts are still judged."""
    FAULTS[fault](exported)
    outcome = run("parity", "--json")
    assert outcome.code == 3, outcome.stderr
    cells = outcome.json["cells"]
    failed = [cell for cell in cells if cell["verdict"] == "failed"]
    assert failed
    assert all(cell["reason"] for cell in failed)
    assert any(cell["verdict"] == "passed" for cell in cells)


@pytest.mark.parametrize("fault", ["head bias", "weights of two tasks"])
def test_wrong_weights_fail_by_their_numbers_too(exported: Path, run: Run, fault: str) -> None:
    """Whoever also rewrites the manifest is caught by the comparison."""
    from mtl_export.bundle.manifest import read_manifest, write_manifest

    FAULTS[fault](exported)
    for folder in (exported / "out" / "merged").iterdir():
        manifest = read_manifest(folder)
        assert manifest is not None
        write_manifest(folder, manifest.recipe)
    outcome = run("parity", "--json")
    assert outcome.code == 3, outcome.stderr
    failed = [cell for cell in outcome.json["cells"] if cell["verdict"] == "failed"]
    assert {cell["artefact"] for cell in failed} == {"merged pytorch"}
    assert {cell["task"] for cell in failed} >= {TASK}


def test_an_old_artefact_does_not_pass_for_a_new_checkpoint(exported: Path, run: Run) -> None:
    """After the adapter changed, everything exported before fails as stale."""
    path = exported / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x01
    path.write_bytes(bytes(content))
    outcome = run("parity", "--json")
    assert outcome.code == 3, outcome.stderr
    reasons = {c["reason"] for c in outcome.json["cells"] if c["verdict"] == "failed"}
    assert all("export it again" in reason for reason in reasons)
    assert outcome.json["counts"]["passed"] == 0


WORDS = ("night", "shift", "nurse", "free", "money", "who", "what", "good", "bad", "film")


def write_labelled(project: Path, rows: int = 12) -> Path:
    """Write rows whose labels are arbitrary: both sides answer them alike."""
    tasks = {"ads_rel": "yes", "topic": 3, "spam": "junk"}
    lines = [
        json.dumps({"task": task, "text": f"{WORDS[n % 10]} {WORDS[n // 3]}",
                    "label": label if n % 2 else 0})
        for n in range(rows)
        for task, label in tasks.items()
    ]  # fmt: skip
    path = project / "labelled.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_scores_on_labelled_rows(exported: Path, run: Run) -> None:
    """Each artefact and task has a row: score of both, change, interval, verdict."""
    write_labelled(exported)
    words = ("--dataset", "labelled.jsonl", "--max-drop", "25", "--score", "topic:f1")
    outcome = run("parity", *words, "--report", "parity.json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert "accuracy passed: the worst task may lose 25 points" in outcome.stdout
    # Twelve rows that all agree: less than 1 - 0.05^(1/12) may be lost.
    assert "-22.09 to +22.09" in outcome.stdout
    report = json.loads((exported / "parity.json").read_text())
    cells = report["accuracy"]["cells"]
    assert {(cell["artefact"], cell["task"]) for cell in cells} == {
        (artefact, task)
        for artefact in ("merged pytorch", "per-task onnx", "single-graph onnx")
        for task in ("ads_rel", "topic", "spam")
    }
    assert {(cell["task"], cell["score"]) for cell in cells} == {
        ("ads_rel", "accuracy"), ("topic", "f1"), ("spam", "accuracy"),
    }  # fmt: skip
    assert {(cell["verdict"], cell["drop"], cell["rows"]) for cell in cells} == {("passed", 0, 12)}
    assert len(report["sources"]["dataset_sha256"]) == 64
    assert report["least_tolerances"]["logits"]["atol"] > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--dataset", "gone.jsonl"), "gone.jsonl"),
        (("--dataset", "labelled.jsonl", "--score", "bleu"), "'bleu': a score is one of"),
        (("--dataset", "labelled.jsonl", "--score", "tpoic:f1"), "tpoic"),
        (("--max-drop", "0.5"), "without --dataset"),
        (("--score", "auc"), "without --dataset"),
        (("--dataset", "labelled.jsonl", "--max-drop", "nan"), "max-drop"),
        (("--atol", "1e-5"), "only one of them"),
        (("--atol", "logit:1e-5", "--rtol", "logit:0"), "not compared: logit"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    exported: Path, run: Run, words: tuple[str, ...], reason: str
) -> None:
    """Exit 2 and one document, before or instead of a comparison."""
    write_labelled(exported)
    outcome = run("parity", *words, "--json")
    assert outcome.code == 2
    assert reason in str(outcome.json["error"])


def test_a_folder_that_no_task_claims_fails_by_its_name(exported: Path, run: Run) -> None:
    """One that was renamed, or left behind: else it would be compared by nobody."""
    onnx = exported / "out" / "onnx"
    shutil.rmtree(exported / "out" / "merged")
    (onnx / "spam").rename(onnx / "spam_renamed")
    (onnx / "notes").mkdir()
    outcome = run("parity", "--quick", "--report", "parity.xml", "--report", "parity.html")
    assert outcome.code == 3, outcome.stdout
    told = "".join(outcome.stdout.split())
    assert "FAILEDper-taskonnx,taskspam_renamed" in told
    assert "notaskiscalled'spam_renamed'" in told
    assert "notes" not in told
    for report in ("parity.xml", "parity.html"):
        assert "spam_renamed" in (exported / report).read_text()
    for name in ("ads_rel", TASK):
        shutil.rmtree(onnx / name)
    (onnx / "model.onnx").unlink()
    (onnx / "mtl-export.json").unlink()
    outcome = run("parity", "--quick", "--json")
    assert outcome.code == 2
    assert "spam_renamed" in outcome.json["error"]["problem"]


def test_require_run_asks_for_every_task(exported: Path, run: Run) -> None:
    """What a preset leaves out does not count, nor a layout or engines that nobody made."""
    onnx = exported / "out" / "onnx"
    words = ("parity", "--quick", "--require-run")
    shutil.rmtree(exported / "out" / "merged")
    shutil.rmtree(onnx / "spam")
    assert run(*words).code == 0  # the single graph serves it
    (onnx / "model.onnx").unlink()
    (onnx / "mtl-export.json").unlink()
    (exported / "empty").mkdir()
    outcome = run(*words, "--merged", "empty", "--json", "--report", "parity.json")
    assert outcome.code == outcome.json["exit_code"] == 6
    assert "onnx has nothing for task spam" in outcome.json["error"]["problem"]
    assert "empty has nothing for task ads_rel" in outcome.json["error"]["problem"]
    assert not outcome.json["counts"]["failed"]
    report = json.loads((exported / "parity.json").read_text())
    assert report["error"]["problem"].startswith("--require-run: ")


def test_a_wider_dtype_than_the_weights_have_is_no_tolerance(exported: Path, run: Run) -> None:
    """Metadata that claim bf16 would hide a weight that is 2 % off; junk is no dtype at all."""
    import onnx

    from mtl_export.bundle.manifest import read_manifest, write_manifest

    shutil.rmtree(exported / "out" / "merged")
    for name, dtype in (("spam", "bf16"), (TASK, "junk")):
        folder = exported / "out" / "onnx" / name
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        model.metadata_props.add(key="mtl_export.dtype", value=dtype)
        onnx.save(model, str(folder / "model.onnx"))
        manifest = read_manifest(folder)
        assert manifest is not None
        write_manifest(folder, manifest.recipe)
    outcome = run("parity", "--quick", "--no-localise", "--json")
    assert outcome.code == 3, outcome.stderr
    failed = {c["task"]: c["reason"] for c in outcome.json["cells"] if c["verdict"] == "failed"}
    assert "declares bfloat16, but 100% of the numbers in matrices are float32" in failed["spam"]
    assert "the dtype 'junk', not one of fp32, fp16, bf16" in failed[TASK]
    assert set(failed) == {"spam", TASK}


@pytest.mark.parametrize(
    "words", [("--max-drop", "-1"), ("--bogus",), ("--config", "gone.toml"), ("--report", "r.txt")]
)
def test_refused_options_end_an_old_report(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """CI would show the pass of an earlier run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text('{"verdict": "passed"}')
    assert run("parity", *words, "--report", "r.json").code == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["verdict"] != "passed"
    assert report["error"]["problem"]


def test_inputs_may_be_arrays(exported: Path, run: Run) -> None:
    """An npz file with the model's inputs and task_ids; mask and types may be left out."""
    import numpy as np

    shutil.rmtree(exported / "out" / "merged")
    for task in ("ads_rel", "spam", TASK):
        shutil.rmtree(exported / "out" / "onnx" / task)
    ids = np.random.default_rng(0).integers(5, 50, (6, 9))
    arrays = {"input_ids": ids, "task_ids": np.arange(6) % 3}
    np.savez(str(exported / "rows.npz"), **arrays)  # type: ignore[arg-type]
    outcome = run("parity", "--quick", "--inputs", "rows.npz", "--json")
    assert outcome.code == 0, outcome.stdout
    document = outcome.json
    assert len(document["sources"]["inputs_sha256"]) == 64
    left_out = {cell["reason"] for cell in document["cells"] if cell["verdict"] == "not-run"}
    assert {"left out by --quick", "left out without --full"} <= left_out
    for option in ("--inputs", "--dataset"):
        labels = {"labels": np.zeros(6, int)} if option == "--dataset" else {}
        np.savez(str(exported / "rows.npz"), **{**arrays, **labels, "input_ids": ids + 1000})  # type: ignore[arg-type]
        outcome = run("parity", "--quick", option, "rows.npz")
        assert outcome.code == 2
        assert f"{option} rows.npz: input_ids 10" in outcome.stderr
    kept = {"token_type_ids": ids * 0, "task_ids": arrays["task_ids"]}
    np.savez(str(exported / "rows.npz"), **kept)  # type: ignore[arg-type]
    outcome = run("parity", "--inputs", "rows.npz")
    assert outcome.code == 2
    assert "no input_ids" in outcome.stderr
