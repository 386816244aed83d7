from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run, files_below
from tests.factories import TASKS, edit_tensors, toy_base, toy_checkpoint

GRAPH = "out/onnx"


def test_remove_and_rename_say_what_becomes_of_every_id(exported: Path, run: Run) -> None:
    """The table has ids as they are now; graphs of single tasks inside the folder stay."""
    own = (exported / GRAPH / "spam" / "model.onnx").read_bytes()
    renamed = run("tasks", "rename", GRAPH, "spam", "junk", "--json")
    assert renamed.code == 0
    assert [(t["index"], t["name"], t["status"]) for t in renamed.json["tasks"]] == [
        (0, "ads_rel", "as before"), (1, "topic", "as before"), (2, "junk", "was spam"),
    ]  # fmt: skip
    removed = run("tasks", "remove", f"{GRAPH}/model.onnx", "topic")
    assert removed.code == 0
    assert "id was 2" in removed.stdout
    assert (exported / GRAPH / "spam" / "model.onnx").read_bytes() == own
    manifest = json.loads((exported / GRAPH / "mtl-export.json").read_text())
    assert manifest["options"]["edits"] == ["rename spam junk", "remove topic"]


def test_an_edited_graph_is_never_written_over(exported: Path, run: Run) -> None:
    """Nor with --force: what would be lost is named; ``verify`` finds it whole."""
    toy_checkpoint(exported / "other", exported / "base")
    edit_tensors(exported / "other", heads__2__classifier__bias=None)
    assert run("tasks", "add", GRAPH, "toxic", "-c", "other", "--from", "spam").code == 0
    assert run("verify", GRAPH).code == 0
    before = (exported / GRAPH / "model.onnx").read_bytes()
    for words in (("onnx", "--all-tasks"), ("onnx", "--all-tasks", "--force")):
        again = run(*words)
        assert again.code == 2
        assert "its single graph was edited by mtl-export tasks add toxic." in again.stderr
        assert "drop toxic, of another checkpoint" in again.stderr
        assert "--force" not in again.stderr
    assert (exported / GRAPH / "model.onnx").read_bytes() == before
    rows = (json.dumps({"task": task.name, "text": "one two"}) for task in TASKS)
    (exported / "rows.jsonl").write_text("\n".join(rows))
    calibrated = run("calibrate", "--data", "rows.jsonl")
    assert calibrated.code == 2
    assert "its single graph was edited" in calibrated.stderr
    assert "Pass --layout per-task" in calibrated.stderr


def test_an_added_task_is_said_to_be_unverified(exported: Path, run: Run) -> None:
    """A task of the same checkpoint under another name; the settings file is not asked."""
    words = ("tasks", "add", GRAPH, "copy", "--checkpoint", "adapter", "--from", "spam")
    outcome = run(*words)
    assert outcome.code == 0
    assert "not compared with PyTorch yet: copy" in outcome.stdout
    assert run("tasks", "remove", GRAPH, "copy", "--json").json["tasks"] == [
        {"name": t.name, "index": t.index, "labels": list(t.labels), "kind": t.kind,
         "status": "as before", "verified": True}
        for t in TASKS
    ]  # fmt: skip


def test_a_checkpoint_that_does_not_fit_is_refused(exported: Path, run: Run) -> None:
    """Other projections, another base, no such task, no graph: said, and nothing written."""
    toy_checkpoint(exported / "other", seed=7)
    before = (exported / GRAPH / "model.onnx").read_bytes()
    outcome = run("tasks", "add", GRAPH, "new", "-c", "other", "--from", "spam")
    assert outcome.code == 5
    assert "down-projection" in outcome.stderr
    unknown = run("tasks", "add", GRAPH, "new", "-c", "other")
    assert unknown.code == 2
    assert "no task of that name" in unknown.stderr
    assert "Pass one of these to --from" in unknown.stderr
    assert run("tasks", "remove", "out/onnx/spam", "spam").code == 5
    assert run("tasks", "remove", "nowhere", "spam").code == 2
    assert (exported / GRAPH / "model.onnx").read_bytes() == before


def test_a_name_that_the_graph_does_not_have_is_said_to_be_the_graphs(
    exported: Path, run: Run
) -> None:
    """The message speaks of what was typed; a near name is offered, a far one is not."""
    for words in (("rename", GRAPH, "nope", "new"), ("remove", GRAPH, "nope")):
        outcome = run("tasks", *words)
        assert outcome.code == 2
        assert "task 'nope': the graph has no task of that name" in outcome.stderr
        assert "Name one of these." in outcome.stderr
        assert "--task" not in outcome.stderr
    assert "Did you mean spam?" in run("tasks", "remove", GRAPH, "spamm").stderr
    added = run("tasks", "add", GRAPH, "new", "-c", "adapter", "--from", "topik")
    assert "the checkpoint has no task of that name" in added.stderr
    assert "Did you mean --from topic?" in added.stderr


def test_a_file_that_is_not_there_is_not_taken_for_its_folder(exported: Path, run: Run) -> None:
    """Nor is one that mtl-export did not write; nothing is changed."""
    before = files_below(exported), (exported / GRAPH / "model.onnx").read_bytes()
    outcome = run("tasks", "remove", f"{GRAPH}/nofile.onnx", "spam")
    assert outcome.code == 2
    assert f"{GRAPH}/nofile.onnx: no such file. Expected one of model.onnx" in outcome.stderr
    assert (files_below(exported), (exported / GRAPH / "model.onnx").read_bytes()) == before
    (exported / GRAPH / "own.onnx").write_bytes(b"")
    outcome = run("tasks", "add", f"{GRAPH}/own.onnx", "copy", "-c", "adapter", "--from", "spam")
    assert outcome.code == 2
    assert "own.onnx: not written by mtl-export" in outcome.stderr


def test_another_base_beside_a_checkpoint_that_names_none_is_refused(
    exported: Path, run: Run
) -> None:
    """The graph knows its base: --base is held against that too."""
    toy_checkpoint(exported / "nameless")
    toy_base(exported / "base2", seed=99)
    words = ("tasks", "add", GRAPH, "new", "-c", "nameless", "--from", "spam", "--base")
    outcome = run(*words, "base2")
    assert outcome.code == 7
    assert "the base of the graph" in outcome.stderr
    assert run(*words, "base").code == 0


def test_an_edit_that_was_done_is_up_to_date(exported: Path, run: Run) -> None:
    """Whoever killed a command after its end types it again, and it is no other edit by then."""
    toy_checkpoint(exported / "other", exported / "base")
    edit_tensors(exported / "other", heads__2__classifier__bias=None)
    add = ("tasks", "add", GRAPH, "toxic", "-c", "other", "--from", "spam")
    rename = ("tasks", "rename", GRAPH, "spam", "junk")
    remove = ("tasks", "remove", GRAPH, "topic")
    for words in (add, rename, remove):
        assert run(*words, "--json").json["status"] == "written"
        before = (exported / GRAPH / "mtl-export.json").read_bytes()
        again = run(*words)
        assert (again.code, "out/onnx: up to date" in again.stdout) == (0, True)
        assert (exported / GRAPH / "mtl-export.json").read_bytes() == before
    # A script typed again as a whole: no later edit was about the same names.
    for words in (add, rename, remove):
        document = run(*words, "--json").json
        assert document["status"] == "up to date"
        assert [(t["name"], t["verified"]) for t in document["tasks"]] == [
            ("ads_rel", True), ("junk", True), ("toxic", False),
        ]  # fmt: skip


def test_what_only_looks_like_an_edit_done_before_is_refused(exported: Path, run: Run) -> None:
    """Other numbers under the name, a name that never was, one that became another since."""
    toy_checkpoint(exported / "other", exported / "base")
    edit_tensors(exported / "other", heads__2__classifier__bias=None)
    assert run("tasks", "add", GRAPH, "spam", "-c", "adapter").code == 0  # it is what lies there
    for words in (("spam", "-c", "other"), ("topic", "-c", "adapter", "--from", "spam")):
        outcome = run("tasks", "add", GRAPH, *words)
        assert (outcome.code, "has another task of that name" in outcome.stderr) == (2, True)
    assert run("tasks", "remove", GRAPH, "never").code == 2
    assert run("tasks", "rename", GRAPH, "never", "spam").code == 2
    assert run("tasks", "rename", GRAPH, "spam", "junk").code == 0
    assert run("tasks", "rename", GRAPH, "junk", "mail").code == 0
    assert run("tasks", "rename", GRAPH, "spam", "junk").code == 2
    assert run("tasks", "remove", GRAPH, "junk").code == 2
