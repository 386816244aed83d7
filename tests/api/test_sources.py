from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, files_below


@pytest.mark.parametrize("folder", ["base", "adapter", "base/deep", "link"])
@pytest.mark.parametrize("command", ["merge", "onnx", "trt", "plan"])
def test_the_file_does_not_send_outputs_into_a_source(
    project: Path, run: Run, command: str, folder: str
) -> None:
    """[output] dir is refused as --output is."""
    (project / "link").symlink_to("base")
    toml = project / "mtl-export.toml"
    toml.write_text(f'{toml.read_text()}[output]\ndir = "{folder}"\n')
    before = files_below(project)
    words = [] if command == "plan" else ["--task", "spam"]
    outcome = run(command, *words)
    assert outcome.code == 2, outcome.stderr
    assert "it lies in the" in outcome.stderr
    assert "[output]" in outcome.stderr
    assert files_below(project) == before


def test_the_folder_that_is_written_is_what_counts(project: Path, run: Run) -> None:
    """--output elsewhere is fine where the output folder is not used, and parity only reads."""
    toml = project / "mtl-export.toml"
    toml.write_text(f'{toml.read_text()}[output]\ndir = "base"\n')
    assert run("merge", "--task", "spam", "-o", "elsewhere").code == 0
    outcome = run("merge", "--task", "spam", "-o", "adapter/x")
    assert outcome.code == 2
    assert "--output adapter/x: it lies in the checkpoint" in outcome.stderr
    assert run("parity", "--quick", "--merged", "elsewhere").code == 0


def test_the_checkpoint_is_asked_for_where_it_can_be_given(project: Path, run: Run) -> None:
    """``tasks add`` reads no settings file, and does not send anybody there."""
    (project / "mtl-export.toml").write_text("")
    assert "or set checkpoint in mtl-export.toml" in run("inspect").stderr
    outcome = run("tasks", "add", "out/onnx", "toxic")
    assert outcome.code == 2
    assert "Pass --checkpoint PATH.\n" in outcome.stderr
