from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli.conftest import Run, files_below


def statuses(document: dict[str, object]) -> list[str]:
    """Return the status of every output."""
    outputs = document["outputs"]
    assert isinstance(outputs, list)
    return [output["status"] for output in outputs]


def test_one_task_is_merged_into_its_folder(project: Path, run: Run) -> None:
    """``merge --task NAME`` writes a model folder with a manifest, and nothing else."""
    outcome = run("merge", "--task", "spam")
    assert outcome.code == 0
    assert outcome.stderr == "[1/1] merge: spam\n"
    assert "out/merged/spam" in outcome.stdout
    written = files_below(project / "out")
    assert all(name.startswith("merged/spam/") for name in written)
    assert {
        f"merged/spam/{name}"
        for name in (
            "config.json", "model.safetensors", "mtl-export.json", "tokenizer.json",
            "tokenizer_config.json",
        )
    } <= {*written}  # fmt: skip


def test_tasks_are_merged_in_id_order(project: Path, run: Run) -> None:
    """Whatever the order of --task, ids decide; --all-tasks takes every one."""
    named = run("merge", "--task", "spam", "--task", "ads_rel", "--json").json
    assert [output["tasks"] for output in named["outputs"]] == [["ads_rel"], ["spam"]]
    everything = run("merge", "--all-tasks", "--json").json
    assert statuses(everything) == ["up to date", "written", "up to date"]


def test_json_says_what_lies_where(project: Path, run: Run) -> None:
    """Path, size and hash of every file, as the manifest has them."""
    (output,) = run("merge", "--task", "spam", "--json").json["outputs"]
    manifest = json.loads((project / output["path"] / "mtl-export.json").read_text())
    assert output["files"] == manifest["files"]
    assert output["path"] == "out/merged/spam"
    assert manifest["command"] == "merge"
    assert manifest["options"]["task"] == "spam"
    assert manifest["options"]["alpha"] == 5.0


def test_the_same_command_again_does_nothing(project: Path, run: Run) -> None:
    """A second run is up to date and touches no file."""
    run("merge", "--all-tasks")
    before = {path: path.stat().st_mtime_ns for path in (project / "out").rglob("*")}
    outcome = run("merge", "--all-tasks")
    assert outcome.code == 0
    assert outcome.stdout.count("up to date") == 3
    assert {path: path.stat().st_mtime_ns for path in (project / "out").rglob("*")} == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_another_config_or_tokenizer_of_the_base_is_another_result(
    project: Path, run: Run, name: str
) -> None:
    """A base that was mended gives a new folder, not the old one as up to date."""
    run("merge", "--task", "spam")
    file = project / "base" / name
    is_config = name == "config.json"
    config = (project / "base" / "config.json").read_text().replace("1e-12", "0.5")
    file.write_text(config if is_config else '{"model": {"type": "x"}}')
    refused = run("merge", "--task", "spam")
    assert refused.code == 2
    assert "base_settings_sha256 was" in refused.stderr
    assert statuses(run("merge", "--task", "spam", "--force", "--json").json) == ["written"]
    written = project / "out" / "merged" / "spam" / name
    assert ("0.5" if is_config else '"x"') in written.read_text()


def test_numbers_the_checkpoint_carries_may_be_repeated(project: Path, run: Run) -> None:
    """--alpha equal to the checkpoint's own is the same recipe."""
    run("merge", "--task", "spam")
    again = run("merge", "--task", "spam", "--alpha", "5", "--json")
    assert statuses(again.json) == ["up to date"]


def test_another_dtype_needs_force(project: Path, run: Run) -> None:
    """A different result is refused until --force, and then replaced."""
    run("merge", "--task", "spam")
    refused = run("merge", "--task", "spam", "--dtype", "fp16")
    assert refused.code == 2
    assert "dtype was None, is 'fp16'" in refused.stderr
    assert "--force" in refused.stderr
    assert run("merge", "--task", "spam", "--dtype", "fp16", "--force").code == 0
    tensors = load_file(project / "out" / "merged" / "spam" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}


def test_output_is_the_exact_place(project: Path, run: Run) -> None:
    """--output replaces the usual parent, the task's folder stays."""
    run("merge", "--task", "spam", "-o", "models")
    assert (project / "models" / "spam" / "model.safetensors").is_file()
    assert not (project / "out").exists()


def test_the_same_input_gives_the_same_bytes(project: Path, run: Run) -> None:
    """Two runs to two places differ in no byte."""
    run("merge", "--all-tasks", "-o", "first")
    run("merge", "--all-tasks", "-o", "second")
    assert files_below(project / "first") == files_below(project / "second")
    for name in files_below(project / "first"):
        assert (project / "first" / name).read_bytes() == (project / "second" / name).read_bytes()


def test_no_task_given_lists_them(project: Path, run: Run) -> None:
    """With several tasks, which one is a question the user must answer."""
    outcome = run("merge")
    assert outcome.code == 2
    assert "ads_rel, topic, spam" in outcome.stderr
    assert "--all-tasks" in outcome.stderr


def test_an_only_task_needs_no_naming(project: Path, run: Run) -> None:
    """With one task there is no question."""
    from tests.factories import TASKS, toy_checkpoint

    toy_checkpoint(project / "single", project / "base", tasks=TASKS[:1])
    outcome = run("merge", "-c", "single", "--json")
    assert outcome.code == 0
    assert [output["tasks"] for output in outcome.json["outputs"]] == [["ads_rel"]]


def test_transformers_loads_the_folder(project: Path, run: Run) -> None:
    """from_pretrained finds every weight and the task's labels."""
    run("merge", "--task", "topic")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        project / "out" / "merged" / "topic", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert list(model.config.id2label.values()) == ["who", "what", "where", "when"]


def test_the_report_names_task_and_layer(project: Path, run: Run) -> None:
    """--report adds a table; --json always has the figures."""
    outcome = run("merge", "--task", "spam", "--report", "--verify")
    assert outcome.code == 0
    assert "drift ||D||/||W||" in outcome.stdout
    assert "bert.encoder.layer.0.attention.self.query" in outcome.stdout
    assert "elements verified" in outcome.stdout
    (drift,) = run("merge", "--task", "topic", "--json").json["drift"]
    assert drift["task"] == "topic"
    assert drift["drift"] > 0
    assert drift["lost"] < 1e-4
    stored = json.loads((project / "out/merged/topic/merge-report.json").read_text())
    assert stored == drift


def test_an_up_to_date_folder_is_reported_and_verified(project: Path, run: Run) -> None:
    """--report and --verify say the same of what is there as of what is written."""
    written = run("merge", "--all-tasks", "--report", "--verify").stdout
    again = run("merge", "--all-tasks", "--report", "--verify").stdout
    assert again.count("up to date") == 3
    assert "bert.encoder.layer.0.attention.self.query" in again
    assert again.count("elements verified") == 3
    assert again.partition("drift ||D||")[2] == written.partition("drift ||D||")[2]
    document = run("merge", "--all-tasks", "--verify", "--json").json
    assert [drift["task"] for drift in document["drift"]] == ["ads_rel", "topic", "spam"]
    assert len(document["verified"]) == 3


def test_lost_shared_tensors_are_told_and_written_again(project: Path, run: Run) -> None:
    """A folder that refers to them is whole again after the same command."""
    words = ("merge", "--all-tasks", "--layout", "shared", "--shared-by", "reference", "-o", "m")
    assert run(*words).code == 0
    assert run("verify", "m").code == 0
    before = files_below(project / "m")
    shutil.rmtree(project / "m" / "_shared")
    damaged = run("verify", "m")
    assert damaged.code == 7
    assert "model-00001-of-" in damaged.stdout
    outcome = run(*words, "--json")
    assert statuses(outcome.json) == ["written"] * 3
    assert "lost or changed in _shared/" in outcome.stderr
    assert files_below(project / "m") == before
    assert run("verify", "m").code == 0
    assert statuses(run(*words, "--json").json) == ["up to date"] * 3


def test_a_dtype_that_loses_much_is_warned_of(project: Path, run: Run) -> None:
    """A small change drowns in bfloat16: said on stderr with what to do."""
    from tests.factories import toy_checkpoint

    toy_checkpoint(project / "faint", project / "base", alpha=0.003)
    outcome = run("merge", "-c", "faint", "--task", "spam", "--dtype", "bf16", "-o", "faint-out")
    assert outcome.code == 0
    assert "spam: BF16 loses" in outcome.stderr
    assert "--dtype fp32" in outcome.stderr
    kept = run("merge", "-c", "faint", "--task", "spam", "-o", "kept-out")
    assert "loses" not in kept.stderr


def test_shared_folders_cost_less(project: Path, run: Run) -> None:
    """--layout shared links what no task changes; --max-shard-size cuts the files."""
    run("merge", "--all-tasks", "-o", "alone")
    outcome = run("merge", "--all-tasks", "--layout", "shared", "-o", "shared")
    assert outcome.code == 0

    def size(folder: str) -> int:
        files = (project / folder).rglob("*.safetensors")
        return sum({file.stat().st_ino: file.stat().st_size for file in files}.values())

    assert size("shared") < 0.8 * size("alone")
    assert run("merge", "--task", "spam", "--max-shard-size", "4kB", "-o", "cut").code == 0
    assert len(list((project / "cut" / "spam").glob("model-*.safetensors"))) > 3
    refused = run("merge", "--task", "spam", "--max-shard-size", "much", "-o", "no")
    assert refused.code == 2
    assert "such as 500MB or 5GB" in refused.stderr


def test_what_is_shared_must_be_asked_for(project: Path, run: Run) -> None:
    """--shared-by reference alone would write standalone folders; a settings file may say it."""
    outcome = run("merge", "--all-tasks", "--shared-by", "reference")
    assert outcome.code == 2
    assert "Add --layout shared" in outcome.stderr
    with (project / "mtl-export.toml").open("a") as file:
        file.write('\n[merge]\nshared_by = "reference"\n')
    assert run("merge", "--task", "spam").code == 0
