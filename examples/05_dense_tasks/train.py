"""Train a small Swin on drawn scenes, then MTLoRA on top: four tasks from one image.

    python train.py                    # writes ckpt_epoch_1.pth, some minutes on two cores

First the whole network learns to tell classes. Then its attention and MLP weights are frozen, as
the paper does, and adapters, heads, norms and patch merging learn four tasks at once. The file has
the names and the layout of https://github.com/scale-lab/MTLoRA.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scenes
import torch
from torch.nn import functional

from mtl_export.adapters.modules.mtlora_layers import SwinModel
from mtl_export.adapters.modules.mtlora_swin import MTLoRASwin
from mtl_export.adapters.modules.swin_windows import attention_mask, relative_position_index
from mtl_export.runtime.images import encode_images

FILE = Path(__file__).parent / "ckpt_epoch_1.pth"
CHANNELS = {"semseg": len(scenes.CLASSES), "depth": 1, "normals": 3, "edge": 1}
TASKS = tuple(CHANNELS)
DEPTHS, HEADS, EMBED, WINDOW = (2, 2, 2, 2), (1, 2, 4, 8), 16, 4
SHARED_RANK, TASK_RANK, SCALE = 8, 4, 2.0
MAP_WIDTHS = (8, 12, 16, 16)
STEPS, BATCH = (300, 1000), 8
LAYERS = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}


def start() -> dict[str, torch.Tensor]:
    """Return the tensors that training starts from: adapters add nothing yet."""
    tensors: dict[str, torch.Tensor] = {}

    def weight(name: str, *shape: int, gain: float = 1.0) -> None:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        tensors[name] = torch.randn(shape) * gain / fan_in**0.5

    def norm(name: str, width: int, *, is_batch: bool = False) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(width), torch.zeros(width)
        if is_batch:
            tensors[f"{name}.running_mean"] = torch.zeros(width)
            tensors[f"{name}.running_var"] = torch.ones(width)
            tensors[f"{name}.num_batches_tracked"] = torch.tensor(0)

    weight("backbone.patch_embed.proj.weight", EMBED, 3, 4, 4)
    tensors["backbone.patch_embed.proj.bias"] = torch.zeros(EMBED)
    norm("backbone.patch_embed.norm", EMBED)
    side = scenes.SIZE // 4
    for stage, depth in enumerate(DEPTHS):
        width, window = EMBED * 2**stage, min(WINDOW, side)
        for block in range(depth):
            name = f"backbone.layers.{stage}.blocks.{block}"
            norm(f"{name}.norm1", width)
            norm(f"{name}.norm2", width)
            table = torch.zeros((2 * window - 1) ** 2, HEADS[stage])
            tensors[f"{name}.attn.relative_position_bias_table"] = table
            tensors[f"{name}.attn.relative_position_index"] = relative_position_index(window)
            if block % 2 and side > window:
                tensors[f"{name}.attn_mask"] = attention_mask(side, window, window // 2)
            for layer, (outputs, inputs) in LAYERS.items():
                at, shape = f"{name}.{layer}", (outputs * width, inputs * width)
                weight(f"{at}.linear.weight", *shape, gain=0.5)
                tensors[f"{at}.linear.bias"] = torch.zeros(shape[0])
                weight(f"{at}.lora_shared_A", SHARED_RANK, shape[1])
                tensors[f"{at}.lora_shared_B"] = torch.zeros(shape[0], SHARED_RANK)
                for task in TASKS if block == depth - 1 and layer != "attn.qkv" else ():
                    weight(f"{at}.lora_tasks_A.{task}", TASK_RANK, shape[1])
                    tensors[f"{at}.lora_tasks_B.{task}"] = torch.zeros(shape[0], TASK_RANK)
        features = width
        if stage < len(DEPTHS) - 1:
            features, side = 2 * width, side // 2
            norm(f"backbone.layers.{stage}.downsample.norm", 4 * width)
            weight(f"backbone.layers.{stage}.downsample.reduction.weight", features, 4 * width)
        for task in TASKS:
            weight(
                f"downsampler.{task}.downsample_{stage}.weight", MAP_WIDTHS[stage], features, 1, 1
            )
    total = sum(MAP_WIDTHS)
    for task, channels in CHANNELS.items():
        name = f"decoders.decoders.{task}.last_layer"
        weight(f"{name}.0.weight", 2 * total, total, 1, 1, gain=2**0.5)
        tensors[f"{name}.0.bias"] = torch.zeros(2 * total)
        norm(f"{name}.1", 2 * total, is_batch=True)
        weight(f"{name}.3.weight", channels, 2 * total, 1, 1)
        tensors[f"{name}.3.bias"] = torch.zeros(channels)
    return tensors


def losses(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of the tasks' losses."""
    normals = functional.normalize(found["normals"], dim=1)
    cosine = (normals * wanted["normals"].permute(0, 3, 1, 2)).sum(1)
    weights = torch.where(wanted["edge"] > 0, 4.0, 1.0)
    edge = functional.binary_cross_entropy_with_logits(
        found["edge"][:, 0], wanted["edge"].float(), weights
    )
    classes = functional.cross_entropy(found["semseg"], wanted["semseg"])
    depth = functional.smooth_l1_loss(found["depth"][:, 0], wanted["depth"], beta=0.1)
    return classes + 2 * depth + 2 * (1 - cosine).mean() + edge


def is_frozen(name: str) -> bool:
    """Return whether the second phase keeps a parameter: attention's and the MLPs' own."""
    return ".linear." in name


def train(model: MTLoRASwin, data: Mapping[str, torch.Tensor], phase: int) -> None:
    """Train one phase."""
    kept = [v for name, v in model.named_parameters() if not (phase and is_frozen(name))]
    rate, count = (2e-3, 4e-3)[phase], STEPS[phase]
    optimiser = torch.optim.AdamW(kept, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=count)
    model.train()
    for step in range(count):
        rows = torch.randint(len(data["images"]), (BATCH,))
        found = model(data["images"][rows])
        wanted = {name: value[rows] for name, value in data.items()}
        classes = functional.cross_entropy(found["semseg"], wanted["semseg"])
        loss = losses(found, wanted) if phase else classes
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == count - 1:
            print(f"phase {phase + 1}, step {step}: loss {loss.item():.3f}", flush=True)


def configuration() -> dict[str, object]:
    """Return what the trainer's configuration says of such a run."""
    scales = {task: SCALE for task in TASKS}
    return {
        "TASKS": list(TASKS),
        "DATA": {"IMG_SIZE": scenes.SIZE},
        "MODEL": {
            "SWIN": {"WINDOW_SIZE": WINDOW, "QK_SCALE": None},
            "DECODER_HEAD": dict.fromkeys(TASKS, "hrnet"),
            "MTLORA": {
                "ENABLED": True,
                "SHARED_MODE": "matrix",
                "SPLIT_QKV": False,
                "SHARED_SCALE": [SCALE] * 4,
                "SCALE_PER_TASK_LIST": [scales] * 4,
            },
        },
    }


def main() -> None:
    """Train both phases and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args()
    torch.manual_seed(0)
    drawn = scenes.scenes(options.scenes, scenes.TRAIN_SEED)
    data = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in drawn.items()}
    data["images"] = torch.from_numpy(encode_images(drawn["images"], scenes.SIZE))
    scales = {task: (SCALE,) * 4 for task in TASKS}
    described = SwinModel(TASKS, scenes.SIZE, "matrix", (SCALE,) * 4, scales)
    model = MTLoRASwin.from_tensors(start(), described)
    for phase in range(2):
        train(model, data, phase)
    document = {"model": model.state_dict(), "epoch": 1, "config": configuration()}
    torch.save(document, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
