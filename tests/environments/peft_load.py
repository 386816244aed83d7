"""Load PEFT folders that mtl-export wrote with PEFT itself, and save the logits it computes.

Runs in an environment of its own, for PEFT is no dependency of the project:

    python -m venv ENV && ENV/bin/pip install peft==0.21.2 torch transformers
    ENV/bin/python tests/environments/peft_load.py BASE MODEL_CLASS FOLDER

``FOLDER/inputs.npz`` holds the inputs and ``FOLDER/labels.json`` the label count of every task;
``FOLDER/<task>/logits.npy`` is written. Everything is computed in float64. A key that PEFT does
not expect, or misses, is an error.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers


def main(base: Path, model_class: str, folder: Path) -> None:
    """Write the logits of every task."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("error", message=".*(missing|unexpected|mismatch).*")
    with np.load(folder / "inputs.npz") as stored:
        inputs = {name: torch.from_numpy(stored[name]) for name in stored.files}
    for task, labels in json.loads((folder / "labels.json").read_text()).items():
        model = getattr(transformers, model_class).from_pretrained(
            base, num_labels=labels, dtype=torch.float64
        )
        adapted = peft.PeftModel.from_pretrained(model, folder / task).double().eval()
        with torch.no_grad():
            logits = adapted(**inputs).logits
        np.save(folder / task / "logits.npy", logits.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
