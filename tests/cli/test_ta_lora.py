"""TA-LoRA end to end: saved by the trainer's module, merged, routed in one graph, and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mtl_export.adapters.modules.save import save_checkpoint
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import MergedRunner
from tests.adapters import toys
from tests.adapters.modules.test_save import ta_lora_model
from tests.cli.conftest import Run
from tests.factories import toy_base


def test_merged_and_routed_give_the_trained_models_logits(tmp_path: Path, run: Run) -> None:
    """The trained module in float64 against the merged folders and the mixed single graph."""
    base = toy_base(tmp_path / "base")
    model = ta_lora_model(base, "sigmoid")
    reference = BaseReference("toy", open_base(str(base)).sha256)
    save_checkpoint(model, tmp_path / "adapter", tasks=toys.TASKS, base=reference)
    (tmp_path / "mtl-export.toml").write_text("")
    words = ["-c", str(tmp_path / "adapter"), "-b", str(base), "--all-tasks"]
    words += ["--config", str(tmp_path / "mtl-export.toml")]
    for verb in ("merge", "onnx"):
        outcome = run(verb, *words, "-o", str(tmp_path / verb))
        assert outcome.code == 0, outcome.stderr
    rows = toys.token_rows(5, 7)
    tensors = {name: torch.from_numpy(value) for name, value in rows.items()}
    mixed = np.array([2, 0, 1, 1, 0])
    with torch.no_grad():
        expected = model(task_ids=torch.from_numpy(mixed), **tensors)["logits"].numpy()
    with OrtRunner(tmp_path / "onnx" / "model.onnx") as routed:
        found = routed.infer({**rows, "task_ids": mixed})["logits"]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
    for task in toys.TASKS:
        own = mixed == task.index
        with MergedRunner(tmp_path / "merge" / task.name) as merged:
            logits = merged.infer(rows)["logits"]
        labels = len(task.labels)
        np.testing.assert_allclose(logits[own], expected[own, :labels], atol=2e-5, rtol=0)
