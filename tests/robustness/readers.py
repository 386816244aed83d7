"""Every reader of the product that opens a pickle, with the file that it opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint

Reader = tuple[Path, Callable[[], object]]


def readers(root: Path) -> dict[str, Reader]:
    """Return what opens which file under ``root``; the folders need ``prepare`` first."""
    folder = {name: root / name for name in FOLDERS}
    checkpoints = {
        "official": "final_checkpoint.pt",
        "official file": "run.bin",
        "vl-bart": "LAST.pth",
        "mtlora": "ckpt_epoch_1.pth",
        "peft": "adapter_model.bin",
        "adapterhub adapter": "zeta/pytorch_adapter.bin",
        "adapterhub head": "zeta/pytorch_model_head.bin",
        "unknown folder": "x.pickle",
    }
    found: dict[str, Reader] = {}
    for name, file in checkpoints.items():
        path = folder[name] / file if name.endswith("file") else folder[name]
        found[name] = (folder[name] / file, partial(open_checkpoint, path, alpha=4.0))
    for name, file in {"base": "pytorch_model.bin", "base shard": "one.bin"}.items():
        found[name] = (folder[name] / file, partial(open_base, str(folder[name])))
    biases = folder["biases"] / "biases.pt"
    run = folder["biases"] / "run"
    found["biases"] = (biases, partial(open_checkpoint, run, alpha=4.0, biases=biases))
    return found


FOLDERS = (
    "official", "official file", "vl-bart", "mtlora", "peft", "adapterhub adapter",
    "adapterhub head", "unknown folder", "base", "base shard", "biases",
)  # fmt: skip


def prepare(root: Path) -> None:
    """Write what lies beside the files: configs, and checkpoints that are well."""
    from tests.checkpoint import adapterhub_toys, official_toys, peft_toys

    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    (root / "peft" / "adapter_config.json").write_text(json.dumps(peft_toys.config()))
    for name in ("adapterhub adapter", "adapterhub head"):
        adapterhub_toys.write_mtl(root / name)
    for name in ("base", "base shard"):
        (root / name / "config.json").write_text("{}")
    index = {"weight_map": {"w": "one.bin"}}
    (root / "base shard" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    states = {"layer.q_proj": official_toys.mtl_lora(official_toys.Drawer(0), 6, 5)}
    official_toys.write(root / "biases/run/final_checkpoint.pt", official_toys.flat(states))
