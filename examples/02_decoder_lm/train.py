"""Train the three-task adapter of this example and write ``adapter/``.

    python base.py          first: the base
    python train.py         what the committed adapter is

The base stays frozen; trained are MTL-LoRA adapters of the query and value projections of
all 30 layers. A batch holds rows of one task; the loss is that of the answer's tokens alone.
The same arguments on the same machine give the same adapter.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import CACHE, TASKS, Row, load_splits
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mtl_export.adapters.modules.model import MultiTaskModel
from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
from mtl_export.adapters.modules.save import save_checkpoint
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference

HERE = Path(__file__).parent
RANK, UP_PROJECTIONS, ALPHA, TEMPERATURE = 4, 2, 8.0, 0.5
SEED = 17
BATCH = 8
MAX_TOKENS = 24  # longer texts are left out
IGNORED = -100  # what transformers' loss leaves out
WARM_UP = 0.1


class OneTaskLinear(MTLLoRALinear):
    """The same layer for batches of one task: the B_i are mixed before, not after, they act.

    sum_i p_ti B_i Lambda_t A x = (sum_i p_ti B_i Lambda_t) A x: less time for a step, and
    activations stay in the base's dtype.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``, all under the first row's task."""
        task = self.routing.rows(x.shape[0])[0]
        p = torch.softmax(self.mixing[task] / self.temperature, dim=-1)
        up = self.scaling * torch.einsum("i,ior,rd->od", p, self.up, self.lambdas[task])
        low = functional.linear(x, self.down.to(x.dtype))
        h: torch.Tensor = self.base(x) + functional.linear(low, up.to(x.dtype))
        return h


def build_model(base: Path, dtype: torch.dtype) -> MultiTaskModel:
    """Return the base with fresh adapters, fp32, on query and value projections."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    modules = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    adapt = partial(
        OneTaskLinear,
        tasks=len(TASKS),
        rank=RANK,
        up_projections=UP_PROJECTIONS,
        alpha=ALPHA,
        temperature=TEMPERATURE,
    )
    return MultiTaskModel(model, adapters=dict.fromkeys(modules, adapt), heads={})


def batches(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], rng: random.Random
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield shuffled batches for ever: prompt, answer, end; labels on the latter two."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = [*tokenizer(row.answer)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= MAX_TOKENS:
            encoded.append((prompt, answer))
    while True:
        rng.shuffle(encoded)
        for start in range(0, len(encoded) - BATCH + 1, BATCH):
            yield _batch(encoded[start : start + BATCH])


def _batch(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(prompt) + len(answer) for prompt, answer in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(p + a, 0) for p, a in rows]),
        "attention_mask": torch.tensor([padded([1] * len(p + a), 0) for p, a in rows]),
        "labels": torch.tensor([padded([IGNORED] * len(p) + a, IGNORED) for p, a in rows]),
    }


def train(
    model: MultiTaskModel,
    streams: Sequence[Iterator[dict[str, torch.Tensor]]],
    steps: int,
    rate: float,
) -> None:
    """Optimise ``model`` in place, the tasks taking turns, reporting on stderr."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm_up = max(1, round(WARM_UP * steps))

    def pace(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    recent: dict[str, float] = {}
    started = time.monotonic()
    for step in range(steps):
        task = TASKS[step % len(TASKS)]
        batch = next(streams[task.index])
        task_ids = torch.full((BATCH,), task.index)
        loss = _loss(model, task_ids, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        recent[task.name] = 0.8 * recent.get(task.name, loss.item()) + 0.2 * loss.item()
        if (step + 1) % 15 == 0:
            losses = "  ".join(f"{name} {value:.3f}" for name, value in recent.items())
            spent = time.monotonic() - started
            print(f"step {step + 1}/{steps}  {spent:.0f} s  {losses}", file=sys.stderr, flush=True)


def _loss(model: MultiTaskModel, task_ids: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.model.get_submodule("model")
    model.routing.set(task_ids)
    states = hidden(**inputs).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    # A logit for each of 49,152 words is made where there is a label only.
    logits = model.model.get_submodule("lm_head")(states[counts]).float()
    return functional.cross_entropy(logits, labels[counts])


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Train the adapter of this example.")
    flag = parser.add_argument
    flag("--base", type=Path, default=HERE / "base")
    flag("--steps", type=int, default=90)
    flag("--lr", type=float, default=5e-3)
    flag("--out", type=Path, default=HERE / "adapter")
    flag("--cache", type=Path, default=CACHE, help="where the wheels are kept")
    flag("--threads", type=int, default=1)
    flag(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the frozen base in bf16 while training",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    splits = load_splits(arguments.cache)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = build_model(arguments.base, torch.bfloat16 if arguments.bf16 else torch.float32)
    streams = [batches(tokenizer, splits[task.name].train, rng) for task in TASKS]
    train(model, streams, arguments.steps, arguments.lr)
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    reference = BaseReference(arguments.base.name, open_base(str(arguments.base)).sha256)
    save_checkpoint(model, arguments.out, tasks=TASKS, base=reference)
    print(arguments.out)


if __name__ == "__main__":
    main()
