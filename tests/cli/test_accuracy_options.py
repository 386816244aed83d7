"""``--max-drop`` and ``--score`` without ``--dataset``: refused where they were typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mtl_export.api.accuracy import refuse_alone
from mtl_export.errors import UsageError
from mtl_export.parity.artefact import Artefact, Quantised
from mtl_export_cli.commands.parity import command
from mtl_export_cli.options import is_typed
from tests.parity.fakes import FakeRunner, right

PLAIN = Artefact("per-task onnx", "per-task", FakeRunner(right), None, "fp32", "", "")
INT8 = replace(PLAIN, quantised=Quantised("int8"))


def judge(words: list[str], *artefacts: Artefact) -> None:
    """Ask with the options of a command line."""
    with command.make_context("parity", words) as context:
        typed = {name for name in context.params if is_typed(name)}
        refuse_alone(context.params["dataset"], typed, artefacts)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where there is no settings file but the test's own."""
    monkeypatch.chdir(tmp_path)


def test_what_judges_nothing_is_refused() -> None:
    """A score has no other use; --max-drop has one, for quantised graphs."""
    for words in (["--max-drop", "0.5"], ["--score", "auc"]):
        with pytest.raises(UsageError, match="without --dataset"):
            judge(words, PLAIN)
        judge([*words, "--dataset", "rows.jsonl"], PLAIN)
    judge(["--max-drop", "0.5"], PLAIN, INT8)
    with pytest.raises(UsageError, match="--score"):
        judge(["--score", "auc"], INT8)
    judge([], PLAIN)


def test_settings_may_be_meant_for_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the file and of the environment are no words of this command line."""
    (tmp_path / "mtl-export.toml").write_text('[parity]\nmax_drop = 0.5\nscore = "auc"\n')
    judge([], PLAIN)
    monkeypatch.setenv("MTL_EXPORT_MAX_DROP", "1")
    judge([], PLAIN)
