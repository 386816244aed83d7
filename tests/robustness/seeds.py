"""Whole, tiny files of every kind that the product reads, made once and copied for every input.

<root>/good/          base, adapter and exports that stay whole: what a file is read against
<root>/<target>/      one folder for each form that the target's files come in
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.adapters import toys
from tests.factories import TASKS, WORDS, toy_base, toy_checkpoint

TOML = """\
base = "./base"
checkpoint = "adapter"
tasks = ["a", "b"]
alpha = 16
biases = "b.pt"
dtype = "fp16"
[output]
dir = "out"
[merge]
layout = "shared"
max_shard_size = "1GB"
[onnx]
dtype = "fp16"
pooling = "mean"
[parity]
inputs = "rows.jsonl"
atol = { logits = 1e-4 }
dataset = "data.jsonl"
max_drop = 0.5
report = ["a.json"]
score = { spam = "f1" }
[trt]
layout = "both"
max_shapes = "input_ids:32x256"
opt_shapes = { x = [1, 2] }
workspace = "1GB"
compute_capability = ["8.6"]
[calibrate]
data = "rows.py:rows"
weight = { spam = 2.0 }
max_excluded = 0.2
[bench]
rounds = 3
shapes = "1x16"
"""
Make = Callable[["Good", Path], object]


class Good:
    """What lies whole under ``root``, each part made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root / "good"
        self.root.mkdir(parents=True, exist_ok=True)

    @cached_property
    def base(self) -> Path:
        """Return the toy BERT."""
        return self._once("base", toy_base)

    @cached_property
    def adapter(self) -> Path:
        """Return a checkpoint for it, in our own format."""
        return self._once("adapter", lambda folder: toy_checkpoint(folder, self.base))

    @cached_property
    def llama(self) -> Path:
        """Return the toy LLaMA."""
        from tests.graph.language import language_base

        return self._once("llama", lambda folder: language_base(folder, "LlamaForCausalLM"))

    @cached_property
    def rows(self) -> Path:
        """Return labelled rows for the toy's tasks."""
        file = self.root / "rows.jsonl"
        words = [word for word in WORDS if word.isalpha()][:6]
        lines = [{"task": task.name, "text": f"{word} night", "text_pair": "who",
                  "label": place % len(task.labels),
                  "query": place // 2} for task in TASKS for place,
                  word in enumerate(words)]  # fmt: skip
        if not file.exists():
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return file

    @cached_property
    def bound(self) -> Any:
        """Return the toy model."""
        return toys.bound_model(self.base, self.adapter)

    @cached_property
    def single(self) -> Path:
        """Return the folder of the single graph, with manifest and golden vectors."""
        return self._once("single", self._write_single)

    @cached_property
    def edited(self) -> Path:
        """Return the same with a task renamed."""
        from mtl_export.bundle.edited import edit_folder
        from mtl_export.graph.task_edit import rename_task

        def write(folder: Path) -> None:
            shutil.copytree(self.single, folder)
            edit_folder(folder, lambda models: rename_task(models, "spam", "junk"),
                        "rename spam junk",
                        renamed=("spam", "junk"))  # fmt: skip

        return self._once("edited", write)

    @cached_property
    def adapted(self) -> Path:
        """Return the graph that takes adapters, with those."""
        from mtl_export.graph.parts import trace_parts
        from tests.runtime.conftest import write_with_adapters

        return self._once(
            "adapted",
            lambda folder: write_with_adapters(self.bound, trace_parts(self.bound), folder),
        )

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        folder = self.root / name
        if not folder.exists():
            make(folder)
        return folder

    def _write_single(self, folder: Path) -> None:
        from mtl_export.api.sources import recipe
        from mtl_export.bundle.output import output_folder
        from mtl_export.graph.lower import routed_graph
        from mtl_export.graph.trace import trace
        from mtl_export.graph.writer import write_graph
        from mtl_export.runtime.golden import GOLDEN_FILE, Vector, golden_bytes
        from mtl_export.runtime.ort import OrtRunner

        names = [task.name for task in TASKS]
        options: dict[str, Any] = {"layout": "single-graph", "served": names}
        with output_folder(folder, recipe=recipe("onnx", self.bound, options)) as plan:
            write_graph(routed_graph(trace(self.bound), self.bound), self.bound, plan.folder, None)
            inputs = {**toys.token_rows(3, 6), "task_ids": np.array([2, 0, 1])}
            with OrtRunner(plan.folder / "model.onnx", threads=1) as runner:
                found = runner.infer(inputs)
            vector = Vector("mixed", "model.onnx", inputs, found, 1e-4, 1e-4)
            (plan.folder / GOLDEN_FILE).write_bytes(golden_bytes([vector]))


def official(good: Good, root: Path) -> None:
    """Write the authors' ``final_checkpoint.pt``, and the pickles of before 1.6."""
    import torch

    from tests.checkpoint import official_toys

    for seed, (name, make) in enumerate((("mtl", official_toys.mtl_lora), ("dora",
                                                                           official_toys.dora),
                                         ("moe", official_toys.moe_lora))):  # fmt: skip
        states = {
            "model.layers.0.self_attn.q_proj": make(official_toys.Drawer(seed), 24, 24),
            "model.layers.1.mlp.down_proj": make(official_toys.Drawer(seed + 9), 24, 20),
        }
        file = official_toys.write(root / name / "final_checkpoint.pt", official_toys.flat(states))
        if name == "mtl":
            (root / "old").mkdir()
            torch.save(
                torch.load(file), root / "old" / file.name, _use_new_zipfile_serialization=False
            )


def vlbart(good: Good, root: Path) -> None:
    """Write the authors' VL-BART with the BART that it was trained from."""
    from tests.checkpoint import vl_bart_toys

    vl_bart_toys.write(root / "run", vl_bart_toys.state_dict())
    vl_bart_toys.base_folder(root / "run" / "base")


def mtlora(good: Good, root: Path) -> None:
    """Write MTLoRA's ``ckpt_epoch_N.pth``, with the configuration inside and beside it."""
    from tests.checkpoint import mtlora_toys
    from tests.dense.checkpoints import Recipe, configuration, state

    for name in ("inside", "beside"):
        (root / name).mkdir(parents=True)
    small = Recipe(depths=(1, 1, 1, 2), heads=(1, 1, 1, 1), embed=4, widths=(2, 2, 2, 2),
                   channels={"semseg": 3, "sal": 1}, shared_ranks=(1, 1, 1, 1), rank=1)  # fmt: skip
    tensors, settings = state(small), configuration(small)
    mtlora_toys.write(root / "inside" / "ckpt_epoch_12.pth", tensors, settings)
    mtlora_toys.write(root / "beside" / "ckpt_epoch_12.pth", tensors, config=None)
    (root / "beside" / "config.json").write_text(json.dumps(settings))


def peft(good: Good, root: Path) -> None:
    """Write PEFT folders: one adapter in either kind of file, and one for each task."""
    from tests.checkpoint import peft_toys

    state = peft_toys.lora(peft_toys.QUERY) | peft_toys.head(2)
    peft_toys.write(root / "one", state)
    peft_toys.write(root / "pickled", state, pickled=True)
    own = {
        "r": 3,
        "use_dora": True,
        "modules_to_save": ["classifier"],
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    peft_toys.write(root / "several" / "second", state)
    peft_toys.write(root / "several" / "first", peft_toys.lora(peft_toys.NARROW, rank=3,
                                                               lora_magnitude_vector="O")
                    | peft_toys.head(4), own)  # fmt: skip


def adapterhub(good: Good, root: Path) -> None:
    """Write AdapterHub folders with heads and setup, in either kind of file."""
    from tests.checkpoint import adapterhub_toys

    adapterhub_toys.write_mtl(root / "safetensors", is_safetensors=True)
    adapterhub_toys.write_mtl(root / "pickled")


def own_folder(good: Good, root: Path) -> None:
    """Write our own folder of one adapter, and of one for each task."""
    from mtl_export.checkpoint.formats.own_folder import store_checkpoint
    from mtl_export.checkpoint.reader import open_checkpoint

    shutil.copytree(good.adapter, root / "mtl_lora")
    peft(good, good.root / "peft")
    several = open_checkpoint(good.root / "peft" / "several", task_names=["second", "first"])
    one = open_checkpoint(good.root / "peft" / "one")
    for name, checkpoint in (("one", one), ("members", several)):
        (root / name).mkdir()
        store_checkpoint(root / name, checkpoint)


def base(good: Good, root: Path) -> None:
    """Write the base as one file and as shards, in safetensors and as pickles."""
    import torch
    from safetensors.numpy import load_file, save_file

    tensors = load_file(good.base / "model.safetensors")
    shards = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    for name in ("single", "sharded", "pickled", "pickled shards"):
        shutil.copytree(good.base, root / name)
        if name != "single":
            (root / name / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()},
               root / "pickled" / "pytorch_model.bin")  # fmt: skip
    files: dict[str, dict[str, str]] = {"sharded": {}, "pickled shards": {}}
    for number, shard in enumerate(shards, 1):
        one = f"model-0000{number}-of-00002.safetensors"
        save_file(shard, root / "sharded" / one, {"format": "pt"})
        files["sharded"] |= dict.fromkeys(shard, one)
        two = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(
            {name: torch.from_numpy(value) for name, value in shard.items()},
            root / "pickled shards" / two,
        )
        files["pickled shards"] |= dict.fromkeys(shard, two)
    for name, stem in (("sharded", "model.safetensors"), ("pickled shards", "pytorch_model.bin")):
        (root / name / f"{stem}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files[name]})
        )


def tokenizer(good: Good, root: Path) -> None:
    """Write what ``TaskSession.encode`` reads."""
    (root / "one").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(good.base / name, root / "one" / name)


def generation(good: Good, root: Path) -> None:
    """Write generation settings of their own, and inside the config as older models have them."""
    settings = {
        "eos_token_id": [2, 5], "pad_token_id": 0, "bos_token_id": 1,
        "decoder_start_token_id": None, "min_length": 3,
        "min_new_tokens": 1, "forced_bos_token_id": 3, "forced_eos_token_id": 2,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2, "suppress_tokens": [7], "begin_suppress_tokens": [8],
        "bad_words_ids": None,
    }  # fmt: skip
    for name, file in (("own", "generation_config.json"), ("old", "config.json")):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps({"vocab_size": 12, "pad_token_id": 0}))
        (root / name / file).write_text(json.dumps({"vocab_size": 12} | settings))


def settings(good: Good, root: Path) -> None:
    """Write an ``mtl-export.toml`` that says everything."""
    (root / "one").mkdir(parents=True)
    (root / "one" / "mtl-export.toml").write_text(TOML)


def biases(good: Good, root: Path) -> None:
    """Write biases that a trainer added, with their checkpoint."""
    from tests.checkpoint import official_toys

    official(good, root)
    for name in ("old", "moe", "dora"):
        shutil.rmtree(root / name)
    modules = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    official_toys.write(
        root / "mtl" / "biases.pt",
        {f"{name}.bias": official_toys.Drawer(9)(24) for name in modules},
    )


def data_rows(good: Good, root: Path) -> None:
    """Write rows of text as ``--data``, ``--dataset`` and ``--inputs`` take them."""
    (root / "one").mkdir(parents=True)
    shutil.copyfile(good.rows, root / "one" / "rows.jsonl")


def data_arrays(good: Good, root: Path) -> None:
    """Write the same as arrays."""
    arrays: dict[str, Any] = {
        **toys.token_rows(6, 7),
        "task_ids": np.arange(6) % 3,
        "labels": np.array([0, 1, 2, 1, 3, 0]),
    }
    for name, save in (("stored", np.savez), ("packed", np.savez_compressed)):
        (root / name).mkdir(parents=True)
        save(root / name / "rows.npz", **arrays)


CACHE_KEY = {"data_sha256": "a" * 64, "seed": 3, "files": {"model.onnx": "b" * 64}}


def cache(good: Good, root: Path) -> None:
    """Write what calibrate keeps, a report beside a quantised graph, and a merge's journal."""
    from mtl_export.bundle.manifest import Recipe, write_manifest
    from mtl_export_calibration.cache import write_arrays, write_cache

    folder = root / "one"
    folder.mkdir(parents=True)
    write_cache(folder / "kept.json", CACHE_KEY, {"latency_ms": {"fp32": 1.0}})
    write_arrays(folder / "kept.npz", CACHE_KEY, {"x": np.arange(5.0)})
    write_cache(folder / "latency.json", {"files": {}}, {"latency_ms": {"fp32": 1.0, "int8": 0.5}})
    task = {
        "rows": 3,
        "labelled": 3,
        "float_accuracy": 0.5,
        "accuracy": 0.4,
        "drop": 10.0,
        "sqnr_db": 30.1,
    }
    report = {"tasks": {"spam": task}, "half": {"spam": task}, "gate": {"max_drop": 1.0},
              "format": "int8",
              "data": {"calibration_sha256": "a" * 64}, "excluded": []}  # fmt: skip
    (folder / "calibration.json").write_text(json.dumps(report))
    journal = {"key": "k", "files": {"spam/model.safetensors": [100, "ab"]},
               "squares": [["spam", "x", {"0": [1.0, 2.0, 3.0]}]]}  # fmt: skip
    (folder / "journal.json").write_text(json.dumps(journal))
    shutil.copyfile(good.single / "model.onnx", folder / "model.onnx")
    write_manifest(folder, Recipe("calibrate", {}, {}, "1"))


def golden(good: Good, root: Path) -> None:
    """Write golden vectors alone."""
    (root / "one").mkdir(parents=True)
    shutil.copyfile(good.single / "golden.npz", root / "one" / "golden.npz")


def outputs(good: Good, root: Path) -> None:
    """Write finished folders as ``verify`` reads them."""
    shutil.copytree(good.single, root / "single")
    shutil.copytree(good.edited, root / "edited")


def graphs(good: Good, root: Path) -> None:
    """Write folders of graphs: as exported, edited, and with adapters beside."""
    outputs(good, root)
    shutil.copytree(good.adapted, root / "adapted")


def engines(good: Good, root: Path) -> None:
    """Write engine files with their manifests."""
    from mtl_export.bundle.manifest import Recipe, write_manifest
    from mtl_export.tensorrt import manifest_path
    from tests.tensorrt.test_manifest import engine_bytes, manifest

    folder = root / "one"
    folder.mkdir(parents=True)
    (folder / "model.engine").write_bytes(engine_bytes() + b"kernel text " * 40)
    tasks = (
        {
            "name": "ads_rel",
            "index": 0,
            "labels": ["no", "yes"],
            "kind": "single_label_classification",
        },
    )
    replace(manifest(), tasks=tasks).write(manifest_path(folder / "model.engine"))
    write_manifest(folder, Recipe("trt", {"dtype": "fp32"}, {"base_sha256": "a" * 64}, "1"))
