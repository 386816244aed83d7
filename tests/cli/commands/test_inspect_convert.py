from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.reader import FORMATS, open_checkpoint
from tests.checkpoint import official_toys
from tests.checkpoint.official_toys import Drawer
from tests.cli.conftest import Run, files_below
from tests.dense.checkpoints import checkpoint_file, configuration, state
from tests.factories import TASKS, edit_config, edit_numbers


def official(folder: Path) -> Path:
    """Write an official MTL-LoRA checkpoint, which carries no number and no name."""
    states = {
        module: official_toys.mtl_lora(Drawer(seed), *shape)
        for seed, (module, shape) in enumerate(official_toys.MODULES.items())
    }
    return official_toys.write(folder / "final_checkpoint.pt", official_toys.flat(states))


def empty(folder: Path) -> list[str]:
    """Return the options of a run without mtl-export.toml."""
    (folder / "empty.toml").write_text("")
    return ["--config", str(folder / "empty.toml")]


def test_the_ledger_lists_every_tensor(project: Path, run: Run) -> None:
    """With --ledger every key has a row, for programs and for people."""
    found = run("inspect", "--ledger", "--json").json
    checkpoint = open_checkpoint(project / "adapter")
    assert found["ledger"] == [
        {"tensor": entry.tensor, "fate": entry.fate, "reason": entry.reason}
        for entry in checkpoint.ledger
    ]
    assert sum(found["fates"].values()) == len(checkpoint.ledger)
    text = run("inspect", "--ledger").stdout
    assert all(entry.tensor in text for entry in checkpoint.ledger)
    assert "ledger" not in run("inspect", "--json").json


def test_a_converted_checkpoint_needs_no_flags(tmp_path: Path, run: Run) -> None:
    """Numbers and names given once are in the folder; the algebra is the same."""
    source = official(tmp_path / "run")
    names = "a,b,c,d"
    given = ["--alpha", "7", "--temperature", "0.3", "--tasks", names]
    out = tmp_path / "own"
    outcome = run("inspect", "-c", str(source), *given, "--convert", str(out), "--json",
                  *empty(tmp_path))  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert [output["status"] for output in outcome.json["outputs"]] == ["written"]
    found = run("inspect", "-c", str(out), "--json", *empty(tmp_path)).json
    assert [line.partition(":")[0] for line in found["missing"]] == ["base"]
    assert (found["alpha"], found["temperature"]) == (7.0, 0.3)
    assert ",".join(task["name"] for task in found["tasks"]) == names
    before = read_adapters(
        open_checkpoint(source, alpha=7.0, temperature=0.3, task_names=names.split(","))
    )
    after = read_adapters(open_checkpoint(out))
    for module, layer in before.layers.items():
        for task in range(layer.task_count):
            np.testing.assert_array_equal(after.layers[module].delta(task), layer.delta(task))


def test_converting_is_repeatable_and_careful(project: Path, run: Run) -> None:
    """The same again does nothing; another result is replaced only with --force."""
    words = ["inspect", "--convert", "own", "--json"]
    assert run(*words).json["outputs"][0]["status"] == "written"
    before = {name: (project / "own" / name).read_bytes() for name in files_below(project / "own")}
    assert run(*words).json["outputs"][0]["status"] == "up to date"
    edit_numbers(project / "adapter", alpha=9.0)
    refused = run(*words)
    assert refused.code == 2
    assert "--force" in refused.json["error"]["fix"]
    assert all((project / "own" / name).read_bytes() == data for name, data in before.items())
    assert run(*words, "--force").json["outputs"][0]["status"] == "written"
    assert run("inspect", "-c", "own", "--json").json["alpha"] == 9.0


@pytest.mark.parametrize("target", ["adapter", "adapter/own", "base/own"])
def test_a_source_is_not_converted_into(project: Path, run: Run, target: str) -> None:
    """Neither the checkpoint nor the base is written to, with --force either."""
    before = files_below(project)
    refused = run("inspect", "--convert", target, "--force", "--json")
    assert refused.code == 2
    error = refused.json["error"]
    assert error["problem"].startswith(f"--convert {target}: it lies in the")
    assert error["fix"] == "Pass another folder to --convert"
    assert files_below(project) == before


@pytest.mark.parametrize("target", ["theirs", "mtl-export.toml", "mtl-export.toml/x", "."])
def test_what_is_refused_names_the_option_there_is(project: Path, run: Run, target: str) -> None:
    """Inspect has --convert and no --output."""
    (project / "theirs").mkdir()
    (project / "theirs" / "thesis.tex").write_text("mine")
    refused = run("inspect", "--convert", target)
    assert refused.code == 2
    assert "--convert" in refused.stderr
    assert "--output" not in refused.stderr


@pytest.mark.parametrize("words", [["--force"], ["--convert-format", "peft"]])
def test_options_of_converting_need_it(project: Path, run: Run, words: list[str]) -> None:
    """Alone they would be ignored; of the environment they wait for a run that converts."""
    refused = run("inspect", *words)
    assert refused.code == 2
    assert f"{words[0]}: nothing is converted" in refused.stderr
    name = f"MTL_EXPORT_{words[0][2:].replace('-', '_').upper()}"
    assert run("inspect", env={name: words[-1] if words[1:] else "1"}).code == 0


def test_the_base_given_is_written_in(project: Path, run: Run) -> None:
    """A checkpoint that names no base learns its hash; a wrong base is refused."""
    edit_config(project / "adapter", base_sha256="", base_model_name_or_path="")
    assert run("inspect", "--convert", "own").code == 0
    found = run("inspect", "-c", "own", "--json").json["base"]
    assert (found["hash"], Path(found["trained_on"]).name) == ("match", "base")
    edit_config(project / "adapter", base_sha256="00" * 32)
    refused = run("inspect", "--convert", "other")
    assert refused.code == 7
    assert not (project / "other").exists()


def test_a_number_that_is_still_missing_is_asked_for(tmp_path: Path, run: Run) -> None:
    """The folder would need a flag again: exit 5, and the flag is named."""
    source = official(tmp_path / "run")
    out = tmp_path / "own"
    outcome = run("inspect", "-c", str(source), "--alpha", "7", "--convert", str(out),
                  *empty(tmp_path))  # fmt: skip
    assert outcome.code == 5
    assert "--temperature" in outcome.stderr
    assert not out.exists()


def test_peft_folders_one_per_task(project: Path, run: Run) -> None:
    """Each task is a folder that our own PEFT reader understands."""
    outcome = run("inspect", "--convert", "peft", "--convert-format", "peft")
    assert outcome.code == 0, outcome.stderr
    assert files_below(project / "peft") == sorted(
        ["mtl-export.json"]
        + [f"{t.name}/adapter_{n}" for t in TASKS for n in ("config.json", "model.safetensors")]
    )
    names = ",".join(task.name for task in TASKS)
    found = run("inspect", "-c", "peft", "--tasks", names, "--json").json
    assert (found["format"], found["base"]["shapes"]) == ("peft", "fit")


def test_what_official_checkpoints_lack_is_listed(tmp_path: Path, run: Run) -> None:
    """Numbers, task names and the base, each with the way to give it; the frozen noise is noted."""
    outcome = run("inspect", "-c", str(official(tmp_path / "run")), "--json", *empty(tmp_path))
    assert outcome.code == 0
    lines = outcome.json["missing"]
    assert [line.partition(":")[0] for line in lines] == [
        "alpha", "temperature", "task names", "base",
    ]  # fmt: skip
    for line, flag in zip(lines, ("--alpha", "--temperature", "--tasks", "--base"), strict=True):
        assert flag in line
    assert any("random" in note for note in outcome.json["notes"])


def test_mtlora_is_shown_layer_by_layer_and_exported(project: Path, run: Run) -> None:
    """Inspect says what folds and what stays; a base in the settings file is for other models."""
    file = str(checkpoint_file(project))
    shown = run("inspect", "-c", file, "--json")
    assert shown.code == 0
    assert not shown.json["unsupported"]
    assert shown.json["missing"] == []
    stays = {one["layer"]: one["stays"] for one in shown.json["folds"]}
    assert stays["backbone.layers.0.blocks.0.mlp.fc1"] == ""
    assert "second stream" in stays["backbone.layers.0.blocks.1.mlp.fc1"]
    assert "second stream" in run("inspect", "-c", file).stdout
    assert run("merge", "--task", "sal", "-c", file).code == 0
    refused = run("merge", "--task", "sal", "-c", file, "--base", "bert", "--force")
    assert (refused.code, "Leave out --base" in refused.stderr) == (2, True)
    converted = run("inspect", "-c", file, "--convert", "kept")
    assert (converted.code, "whole model" in converted.stderr) == (2, True)


def test_mtlora_without_configuration_takes_a_yaml(project: Path, run: Run) -> None:
    """The refusal says what to type, and that works."""
    torch.save(state(), project / "model.pth")
    (project / "run.yaml").write_text(json.dumps(configuration()))
    refused = run("inspect", "-c", str(project / "model.pth"))
    assert (refused.code, "--config run.yaml" in refused.stderr) == (5, True)
    words = ["-c", str(project / "model.pth"), "--config", str(project / "run.yaml")]
    assert run("merge", "--all-tasks", *words).code == 0
    refused = run("onnx", "--task", "sal", "--task-input", "ids", *words)
    assert (refused.code, "answered by every task" in refused.stderr) == (2, True)


@pytest.mark.parametrize("content", [{}, {"notes.txt": "x"}, {"adapter_config.json": "{}"}])
def test_a_folder_that_is_none_of_these(tmp_path: Path, run: Run, content: dict[str, str]) -> None:
    """Exit 5: every format's sign is named, and what was seen instead."""
    folder = tmp_path / "strange"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    outcome = run("inspect", "-c", str(folder), *empty(tmp_path))
    assert outcome.code == 5
    for entry in FORMATS:
        assert entry.looks_for in outcome.stderr
    for name in content or ["none"]:
        assert name in outcome.stderr
