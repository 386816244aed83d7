"""``TaskSession.generate``: the tokens of transformers' ``generate`` on the unmerged model."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.errors import TaskNotFoundError, UsageError
from mtl_export.runtime import TaskSession
from mtl_export.runtime.runners.pytorch import oracle_model
from tests.adapters import toys
from tests.graph.language import POSITIONS

PROMPTS = [[5, 9, 30], [7], [11, 12, 13, 14, 15, 16], [40, 41], [8, 3, 3, 50]]
TASKS = ["reply", "summary", "title", "reply", "title"]
IDS = [1, 0, 2, 1, 2]
NEW = 9


@pytest.fixture(scope="module")
def bound(language: Path) -> BoundModel:
    """Return the tiny LLaMA with its three tasks."""
    return toys.bound_model(language / "base", language / "adapter")


@pytest.fixture(scope="module")
def onnx(language: Path) -> Path:
    """Return the single graph's folder."""
    return language / "onnx"


@pytest.fixture(scope="module")
def session(onnx: Path) -> TaskSession:
    """Return the single graph's session."""
    return TaskSession(onnx, threads=1)


def expected(bound: BoundModel, new: int = NEW, **settings: Any) -> list[list[int]]:
    """Return what transformers generates for the prompts under their tasks."""
    from transformers import GenerationConfig

    model = oracle_model(bound, torch.float32)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
    model.routing.set(torch.tensor(IDS))
    own: Any = model.model
    config = GenerationConfig(eos_token_id=2, pad_token_id=2, do_sample=False, **settings)
    own.generation_config = config
    with torch.inference_mode(), quiet_transformers():
        tokens = own.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new)
    rows = tokens[:, longest:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeats": {"no_repeat_ngram_size": 2},
    "at least": {"min_new_tokens": 6, "suppress_tokens": [9, 30]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_transformers(
    bound: BoundModel, onnx: Path, tmp_path: Path, name: str
) -> None:
    """Mixed tasks and lengths in one batch, with the folder's own generation settings."""
    folder = tmp_path / "onnx"
    shutil.copytree(onnx, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SETTINGS[name]))
    tokens = TaskSession(folder, threads=1).generate(PROMPTS, TASKS, max_new_tokens=NEW)
    assert tokens == expected(bound, **SETTINGS[name])


def test_positions_that_are_computed_do_not_end(bound: BoundModel, session: TaskSession) -> None:
    """A model that rotates goes on beyond those of its config, as transformers does."""
    new = POSITIONS + 3
    with quiet_transformers():
        wanted = expected(bound, new, min_new_tokens=0)
    assert session.generate(PROMPTS, TASKS, max_new_tokens=new) == wanted
    assert len(max(wanted, key=len)) == new


def test_a_table_of_positions_does(onnx: Path, tmp_path: Path) -> None:
    """What has no row for a position is refused."""
    folder = tmp_path / "onnx"
    shutil.copytree(onnx, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"at most {POSITIONS} together"):
        TaskSession(folder, threads=1).generate(PROMPTS, TASKS, max_new_tokens=POSITIONS)


def test_beams_are_not_searched(onnx: Path, session: TaskSession, tmp_path: Path) -> None:
    """The documentation says so: the same tokens with and without."""
    folder = tmp_path / "onnx"
    shutil.copytree(onnx, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 4}))
    tokens = TaskSession(folder, threads=1).generate(PROMPTS, TASKS, max_new_tokens=NEW)
    assert tokens == session.generate(PROMPTS, TASKS, max_new_tokens=NEW)
    assert "num_beams=1" in str(TaskSession.generate.__doc__)


def test_batches_and_tasks_do_not_matter(session: TaskSession, onnx: Path) -> None:
    """Split, by name as inputs, alone, or by the merged graph: the same tokens."""
    whole = session.generate(PROMPTS, TASKS, max_new_tokens=NEW)
    assert len({tuple(row) for row in whole}) == len(PROMPTS)
    assert session.generate(PROMPTS, IDS, max_new_tokens=NEW, max_batch=2) == whole
    assert session.generate({"input_ids": PROMPTS}, IDS, max_new_tokens=NEW) == whole
    for prompt, task, tokens in zip(PROMPTS, TASKS, whole, strict=True):
        assert session.generate([prompt], task, max_new_tokens=NEW) == [tokens]
    merged = TaskSession(onnx / "reply" / "decode.onnx", threads=1)
    assert merged.layout == "per-task"
    own = [row for row, task in zip(PROMPTS, TASKS, strict=True) if task == "reply"]
    answers = [row for row, task in zip(whole, TASKS, strict=True) if task == "reply"]
    assert merged.generate(own, max_new_tokens=NEW) == answers


def test_threads_share_the_session(session: TaskSession) -> None:
    """Every call has its own cache."""
    whole = session.generate(PROMPTS, TASKS, max_new_tokens=NEW)

    def call(row: int) -> list[int]:
        return session.generate([PROMPTS[row]], TASKS[row], max_new_tokens=NEW)[0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, [0, 1, 2, 3, 4] * 3)) == whole * 3


def test_run_gives_the_prompts_logits(session: TaskSession) -> None:
    """One row of logits for each token of the row, no cache among the outputs."""
    results = session.run({"input_ids": PROMPTS}, TASKS)
    assert list(results.outputs) == ["logits"]
    first = session.generate(PROMPTS, TASKS, max_new_tokens=1)
    for prompt, answer, tokens in zip(PROMPTS, results.answers, first, strict=True):
        assert answer.logits is not None
        assert len(answer.logits) == len(prompt)
        assert int(np.argmax(answer.logits[-1])) == tokens[0]
        assert answer.decision is None


def test_what_cannot_be_generated_is_refused(session: TaskSession) -> None:
    """An unknown task, no new tokens, an id below 0, rows that are none."""
    with pytest.raises(TaskNotFoundError, match="one of summary"):
        session.generate(PROMPTS, "title2", max_new_tokens=3)
    with pytest.raises(UsageError, match="1 or more"):
        session.generate(PROMPTS, TASKS, max_new_tokens=0)
    with pytest.raises(UsageError, match="row 1 of input_ids holds -1"):
        session.generate([[5, 9], [-1, 7]], "title", max_new_tokens=2)
    with pytest.raises(UsageError, match="input_ids is int"):
        session.generate(5, "title", max_new_tokens=2)  # type: ignore[arg-type]
