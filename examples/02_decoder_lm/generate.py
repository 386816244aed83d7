"""Say something about texts, every one under a task of its own, from the exported graphs.

    python generate.py                       nine prompts, three tasks, one batch
    python generate.py --oracle              and compare with unmerged PyTorch, token by token
    python generate.py --test 60             share of right answers on test rows of each task

Needs onnxruntime and numpy; PyTorch only for ``--oracle``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_export.runtime import TaskSession

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 12
TEXTS = (
    "Night Shift Nurse",
    "A warm and very funny film that I will watch again.",
    "Who wrote the first English dictionary?",
)
Asked = list[tuple[str, str]]


def answers(session: TaskSession, asked: Asked) -> list[list[int]]:
    """Return the new tokens for each (task, prompt), all in one call."""
    tokens = session.encode([prompt for _, prompt in asked])["input_ids"]
    tasks = [task for task, _ in asked]
    return session.generate(tokens, tasks, max_new_tokens=MAX_NEW_TOKENS, max_batch=32)


def oracle_answers(session: TaskSession, asked: Asked) -> list[list[int]]:
    """Return what transformers' ``generate`` says on the unmerged PyTorch model."""
    import torch

    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.checkpoint.base_model import open_base
    from mtl_export.checkpoint.reader import open_checkpoint
    from mtl_export.runtime.runners.pytorch import oracle_model

    checkpoint, base = open_checkpoint(HERE / "adapter"), open_base(str(HERE / "base"))
    bound = bind(checkpoint, read_adapters(checkpoint, base), base)
    model = oracle_model(bound, torch.float32)
    ids = {task.name: task.index for task in session.tasks}
    rows = session.encode([prompt for _, prompt in asked])["input_ids"]
    length = max(map(len, rows))
    # Padding on the left, as generate wants it.
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    model.routing.set(torch.tensor([ids[task] for task, _ in asked]))
    language_model: Any = model.model
    with torch.inference_mode():
        found = language_model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS
        )
    end = language_model.generation_config.eos_token_id
    return [_ended(row, end) for row in found[:, length:].tolist()]


def _ended(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def accuracy(session: TaskSession, rows: int) -> None:
    """Print how often each task's answer is the right one, word for word."""
    from data import load_splits

    splits = load_splits()
    asked = []
    for task in session.tasks:
        test = splits[task.name].test
        asked += [(task.name, row) for row in test[:: max(1, len(test) // rows)][:rows]]
    started = time.perf_counter()
    tokens = answers(session, [(name, row.prompt) for name, row in asked])
    seconds = time.perf_counter() - started
    said = session.decode(tokens)
    for task in session.tasks:
        own = [text == row.answer for (name, row), text in zip(asked, said, strict=True)
               if name == task.name]  # fmt: skip
        print(f"{task.name:<12} {sum(own) / len(own):.3f} of {len(own)}")
    count = sum(map(len, tokens))
    print(f"{count} tokens in {seconds:.1f} s", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 3 where PyTorch says something else."""
    parser = argparse.ArgumentParser(description="Generate from the exported graphs.")
    parser.add_argument("--onnx", type=Path, default=HERE / "out" / "onnx")
    parser.add_argument("--oracle", action="store_true", help="compare with unmerged PyTorch")
    parser.add_argument("--test", type=int, default=0, metavar="ROWS", help="of each task")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    session = TaskSession(options.onnx, threads=options.threads)
    if options.test:
        accuracy(session, options.test)
        return 0
    asked = [(task.name, f"{text}\n") for text in TEXTS for task in session.tasks]
    tokens = answers(session, asked)
    for (task, prompt), said in zip(asked, session.decode(tokens), strict=True):
        print(f"{task:<12} {prompt.strip():<52} {said}")
    if options.oracle:
        same = tokens == oracle_answers(session, asked)
        print(f"unmerged PyTorch says {'the same' if same else 'something else'}")
        return 0 if same else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
