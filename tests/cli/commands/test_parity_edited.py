"""``parity`` on a single graph that ``tasks`` changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtl_export.checkpoint.checkpoint import Task
from tests.cli.conftest import Run
from tests.factories import edit_tensors, toy_checkpoint

GRAPH = "out/onnx"
SINGLE = "single-graph onnx"
QUICK = ("parity", "--quick", "--json", "--threads", "1")
# As many as the graph was exported with: then the seed draws the same projections.
OTHERS = (
    Task("rude", 0, ("no", "yes"), "single_label_classification"),
    Task("toxic", 1, ("a", "b", "c", "d", "e"), "single_label_classification"),
    Task("calm", 2, ("score",), "regression"),
)


def verdicts(document: dict[str, Any], artefact: str = SINGLE) -> dict[str, set[str]]:
    """Return the verdicts on an artefact, by task, without what --quick leaves out."""
    found: dict[str, set[str]] = {}
    for cell in document["cells"]:
        is_asked = "left out" not in cell["reason"] and "not asked" not in cell["reason"]
        if cell["artefact"] == artefact and is_asked:
            found.setdefault(cell["task"], set()).add(cell["verdict"])
    return found


def reasons(document: dict[str, Any], task: str) -> str:
    """Return why a task of the single graph failed or was not run."""
    cells = (c for c in document["cells"] if c["artefact"] == SINGLE and c["task"] == task)
    return "; ".join(cell["reason"] for cell in cells)


@pytest.fixture
def edited(exported: Path, run: Run) -> Path:
    """Give a graph with a task renamed, one removed, one of another checkpoint and a copy."""
    toy_checkpoint(exported / "other", exported / "base", tasks=OTHERS)
    assert run("tasks", "rename", GRAPH, "topic", "theme").code == 0
    assert run("tasks", "add", GRAPH, "toxic", "-c", "other").code == 0
    assert run("tasks", "remove", GRAPH, "ads_rel").code == 0
    assert run("tasks", "add", GRAPH, "copy", "-c", "adapter", "--from", "spam").code == 0
    return exported


def test_each_checkpoint_judges_its_own_tasks(edited: Path, run: Run) -> None:
    """Ids moved, the logits grew: what is of the checkpoint passes, the rest is named."""
    outcome = run(*QUICK)
    assert outcome.code == 0, outcome.stdout
    assert verdicts(outcome.json) == {
        "topic": {"passed"}, "spam": {"passed"}, "copy": {"passed"}, "*": {"passed"},
        "toxic": {"not-run"}, "ads_rel": {"not-run"},
    }  # fmt: skip
    assert "it is toxic of another checkpoint" in reasons(outcome.json, "toxic")
    assert "edited by mtl-export tasks rename topic theme, add toxic" in outcome.stdout
    assert "export it again" not in outcome.stdout
    assert run(*QUICK, "--require-run").code == 6
    other = run(*QUICK, "-c", "other")
    assert other.code == 0, other.stdout
    found = verdicts(other.json)
    assert found.pop("toxic") == {"passed"}
    assert found.pop("*") == {"passed"}
    assert set(found) == {"rude", "calm", "theme", "spam", "copy"}
    assert all(verdict == {"not-run"} for verdict in found.values())
    of_own_graphs = verdicts(other.json, "per-task onnx")
    assert of_own_graphs["spam"] == {"not-run"}


def test_what_is_wrong_in_an_edited_graph_fails(
    edited: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of other tasks, and a checkpoint that was trained on since."""
    from mtl_export.graph import origins

    true = origins.origins_of
    monkeypatch.setattr(origins, "origins_of", lambda metadata: (true(metadata) or [])[::-1])
    outcome = run(*QUICK)
    assert outcome.code == 3
    assert "failed" in verdicts(outcome.json)["spam"]
    assert "labels of" in reasons(outcome.json, "*")
    assert "spam" in reasons(outcome.json, "*").partition("not the checkpoint's")[2]
    monkeypatch.undo()
    monkeypatch.chdir(edited)
    edit_tensors(edited / "other", heads__1__classifier__bias=None)
    retrained = run(*QUICK, "-c", "other")
    assert retrained.code == 3
    assert "no task of it is of this checkpoint" in reasons(retrained.json, "*")
