"""VL-BART's LAST.pth: everything from the checkpoint, text and regions in, tied tensors tied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.adapters.modules.vl_bart import VLBart
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, CheckpointError, HyperparameterError
from mtl_export.runtime.ort import OrtPart, open_session
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner
from mtl_export.runtime.runners.seq2seq import FILES
from mtl_export.runtime.seq2seq_generation import Seq2SeqDecoding, Seq2SeqParts
from mtl_export_cli.main import cli
from tests.checkpoint import vl_bart_toys as toys
from tests.checkpoint.messages import assert_whole
from tests.checkpoint.vl_bart_toys import Weights

NAMES = "vqa,gqa,nlvr,caption"
LAYER = "model.decoder.layers.1.encoder_attn.q_proj"


def bound_toy(folder: Path, state: Weights, **changes: Any) -> BoundModel:
    """Return the checkpoint of ``state`` bound to the toy base."""
    base = toys.base_folder(folder / "base", **changes)
    checkpoint = open_checkpoint(
        toys.write(folder / "run", state),
        alpha=toys.ALPHA,
        temperature=toys.TEMPERATURE,
        downsample=False,
        task_names=NAMES.split(","),
    )
    opened = open_base(str(base))
    return bind(checkpoint, read_adapters(checkpoint, opened), opened)


def expected(state: Weights, tasks: list[int]) -> Array:
    """Return the reference's logits of every row under its own task."""
    reference = toys.Reference(state)
    return np.stack([reference.logits(toys.rows(), row, task) for row, task in enumerate(tasks)])


@pytest.mark.parametrize("norms", ["individual", "one", "none"])
def test_oracle_is_the_papers_model(tmp_path: Path, norms: str) -> None:
    """A mixed batch through the unmerged model equals a forward pass written from the paper."""
    state = toys.state_dict(norms=norms)
    tasks = [2, 0, 3, 1]
    with OracleRunner(bound_toy(tmp_path, state), "fp64") as oracle:
        found = oracle.infer({**toys.rows(), "task_ids": np.array(tasks)})["logits"]
    np.testing.assert_allclose(found, expected(state, tasks), rtol=0, atol=1e-11)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the four merged folders, written by the command line."""
    folder = tmp_path_factory.mktemp("vl-bart")
    base = toys.base_folder(folder / "base")
    run = toys.write(folder / "run", toys.state_dict())
    words = ["-c", str(run), "-b", str(base), "--alpha", str(toys.ALPHA), "--temperature",
             str(toys.TEMPERATURE), "--no-downsample", "--tasks", NAMES, "--all-tasks", "-o",
             str(folder / "out"),
             ]  # fmt: skip
    result = CliRunner().invoke(cli, ["merge", *words])
    assert result.exit_code == 0, result.output
    return folder / "out"


def single(values: dict[str, Array]) -> dict[str, Array]:
    """Return the inputs in float32, as a merged model takes them."""
    return {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in values.items()
    }


def test_merged_folders_answer_as_the_unmerged_model(merged: Path) -> None:
    """Every task's folder loads into the class and gives the reference's logits."""
    state = toys.state_dict()
    for task, name in enumerate(NAMES.split(",")):
        with MergedRunner(merged / name) as runner:
            found = runner.infer(single(toys.rows()))["logits"]
        np.testing.assert_allclose(found, expected(state, [task] * 4), rtol=0, atol=2e-5)


def test_everything_is_taken_from_the_checkpoint(merged: Path) -> None:
    """Biases, LayerNorms, visual embedding and vocabulary are the checkpoint's, bit by bit."""
    state = toys.state_dict()
    stored = load_file(merged / "nlvr" / "model.safetensors")
    adapted = {name.rpartition(".")[0] for name in state if name.endswith(".lora_A")}
    kept = {name for name in state if ".lora_" not in name and name not in toys.TIED[1:]}
    assert set(stored) == kept
    for name in kept - {f"{module}.weight" for module in adapted}:
        np.testing.assert_array_equal(stored[name], state[name].numpy(), err_msg=name)
    for module in adapted:
        assert np.abs(stored[f"{module}.weight"] - state[f"{module}.weight"].numpy()).max() > 1e-2


def parity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit code of ``mtl-export parity`` in a folder with base and run."""
    monkeypatch.chdir(folder)
    words = ["-c", "run", "-b", "base", "--alpha", str(toys.ALPHA), "--temperature",
             str(toys.TEMPERATURE), "--no-downsample", "--tasks", NAMES, "--threads",
             "1"]  # fmt: skip
    return CliRunner().invoke(cli, ["parity", *words]).exit_code


def test_parity_sees_the_image(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged folders pass; one whose visual embedding is off does not."""
    for name in ("base", "run"):
        shutil.copytree(merged.parent / name, tmp_path / name)
    shutil.copytree(merged, tmp_path / "out" / "merged")
    assert parity(tmp_path, monkeypatch) == 0
    file = tmp_path / "out" / "merged" / "gqa" / "model.safetensors"
    stored = load_file(file)
    stored[f"{toys.VISUAL}.feat_embedding.0.weight"] *= 1.01
    save_file(stored, file, {"format": "pt"})
    assert parity(tmp_path, monkeypatch) == 3


def test_tied_tensors_stay_tied(merged: Path) -> None:
    """Four modules share the token embedding, and generation runs on it."""
    with quiet_transformers():
        model: Any = VLBart.from_pretrained(merged / "caption")
        model.eval()
    shared = model.model.shared.weight
    assert shared.shape == (toys.VOCABULARY, toys.D)
    for name in toys.TIED:
        assert dict(model.named_parameters(remove_duplicate=False))[name] is shared, name
    inputs = {name: torch.from_numpy(value) for name, value in single(toys.rows()).items()}
    del inputs["decoder_input_ids"]
    stepwise = torch.full((4, 1), model.config.decoder_start_token_id)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, forced_eos_token_id=None
        )
        for _ in range(3):
            logits = model(**inputs, decoder_input_ids=stepwise).logits[:, -1]
            stepwise = torch.cat([stepwise, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, stepwise)


def test_original_repository_finds_every_name(merged: Path) -> None:
    """What is in a merged folder has the names of the trainer's own class; so loads by name."""
    trained = set(toys.state_dict())
    assert set(load_file(merged / "vqa" / "model.safetensors")) <= trained


def test_regions_may_be_masked_or_left_out(tmp_path: Path) -> None:
    """Masking a region is as if it were not there; without any, the model is a plain BART."""
    bound = bound_toy(tmp_path, toys.state_dict())
    model = VLBart.from_tensors(bound.base.config, bound.base.tensors, torch.float64)
    inputs = {name: torch.from_numpy(value) for name, value in toys.rows().items()}
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    regions = ("vis_feats", "boxes", "img_order_ids", "obj_order_ids")
    fewer = {name: v[:, :3] if name in regions else v for name, v in inputs.items()}
    text = {name: value for name, value in inputs.items() if name not in regions}
    with torch.inference_mode():
        masked = model(**inputs, vis_attention_mask=mask).logits
        assert torch.allclose(masked, model(**fewer).logits, rtol=0, atol=1e-12)
        assert model(**text).encoder_last_hidden_state.shape[1] == 6


def test_ledger_says_what_is_copied_folded_and_dead(tmp_path: Path) -> None:
    """Every key has a fate; the tied copies are dead because they are the same numbers."""
    state = toys.state_dict()
    checkpoint = open_checkpoint(toys.write(tmp_path, state))
    fates = {entry.tensor: entry.fate for entry in checkpoint.ledger}
    assert set(fates) == set(state)
    assert {name for name, fate in fates.items() if fate == "known-dead"} == set(toys.TIED[1:])
    assert fates[f"{LAYER}.lora_B"] == "folded"
    assert fates[f"{LAYER}.lora_B_w"] == "stacked"
    assert fates[f"{LAYER}.bias"] == "copied"
    assert checkpoint.format == "official-vlbart"
    assert len(checkpoint.layers) == 2 * (toys.LAYERS + 2 * toys.LAYERS)
    assert any("vqa, gqa, nlvr, caption" in note for note in checkpoint.notes)


def test_alpha_and_temperature_are_asked_for(tmp_path: Path) -> None:
    """They are in no VL-BART checkpoint either."""
    checkpoint = open_checkpoint(toys.write(tmp_path, toys.state_dict()))
    with pytest.raises(HyperparameterError, match="--alpha"):
        read_adapters(checkpoint)


@pytest.fixture(scope="module")
def graphs(merged: Path) -> Path:
    """Give the folder of the single graph's three parts, written by the command line."""
    words = ["-c", str(merged.parent / "run"), "-b", str(merged.parent / "base"), "--alpha",
             str(toys.ALPHA), "--temperature", str(toys.TEMPERATURE), "--no-downsample", "--tasks",
             NAMES, "--all-tasks", "-o", str(merged.parent / "graphs")]  # fmt: skip
    result = CliRunner().invoke(cli, ["onnx", *words])
    assert result.exit_code == 0, result.output
    return merged.parent / "graphs"


def test_graphs_take_the_image(graphs: Path) -> None:
    """The encoder reads regions and says which of its states count; the decoder steps on."""
    state, tasks = toys.state_dict(), [2, 0, 3, 1]
    inputs = single(toys.rows())
    inputs["vis_attention_mask"] = np.ones((4, 5), np.int64)
    tokens = inputs.pop("decoder_input_ids")
    parts = Seq2SeqParts(
        *(OrtPart(open_session(graphs / name, threads=1), graphs / name) for name in FILES)
    )
    decoding = Seq2SeqDecoding(parts, inputs, np.array(tasks), tokens[:, :1])
    logits = [decoding.logits]
    for step in range(1, tokens.shape[1]):
        decoding.feed(tokens[:, step])
        logits.append(decoding.logits)
    found = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(found, expected(state, tasks), rtol=0, atol=2e-5)


def test_parity_compares_graphs_with_masked_regions(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and tokens pass; a graph whose parts are not of one export does not."""
    for name in ("base", "run"):
        shutil.copytree(graphs.parent / name, tmp_path / name)
    shutil.copytree(graphs, tmp_path / "out" / "onnx")
    assert parity(tmp_path, monkeypatch) == 0
    shutil.copy(graphs / "decoder.onnx", tmp_path / "out" / "onnx" / "decoder_with_past.onnx")
    assert parity(tmp_path, monkeypatch) == 3


def edited(change: Callable[[Weights], object]) -> Weights:
    """Return the toy's state dict after ``change``."""
    state = toys.state_dict()
    change(state)
    return state


# fault -> change of the state dict
FAULTS: dict[str, Callable[[Weights], object]] = {
    "Lambda transposed": lambda s: s.update({
        n: v.transpose(1, 2) for n, v in s.items() if n.endswith("lora_lambdas")}),
    "B averaged": lambda s: s.update({
        n: v.mean(0, keepdim=True).expand_as(v) for n, v in s.items() if n.endswith("lora_B")}),
    "tasks permuted": lambda s: s.update({
        n: v[[1, 0, 2, 3]] for n, v in s.items() if n.endswith(("lora_lambdas", "lora_B_w"))}),
    "bias lost": lambda s: s.update({
        n: torch.zeros_like(v) for n, v in s.items() if n.endswith("q_proj.bias")}),
    "norm lost": lambda s: s.update({
        n: torch.ones_like(v) for n, v in s.items() if n.endswith("layer_norm.weight")}),
    "image order lost": lambda s: s.update({
        n: v.flip(0) for n, v in s.items() if n.endswith("img_order_embedding.weight")}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_in_the_logits(tmp_path: Path, fault: str) -> None:
    """Each fault moves the logits far beyond rounding."""
    with OracleRunner(bound_toy(tmp_path, edited(FAULTS[fault])), "fp64") as oracle:
        found = oracle.infer({**toys.rows(), "task_ids": np.array([0, 1, 2, 3])})["logits"]
    assert np.abs(found - expected(toys.state_dict(), [0, 1, 2, 3])).max() > 1e-3


REFUSALS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "no adapter": (lambda s: [s.pop(n) for n in [*s] if ".lora_" in n], "no mLoRALinear"),
    "other method": (lambda s: s.update({f"{LAYER}.lora_As.vqa": torch.ones(2, 3)}), "unknown"),
    "image encoder": (lambda s: s.update({"vis_encoder.conv1.weight": torch.ones(2)}), "unknown"),
    "integers": (lambda s: s.update({f"{LAYER}.bias": torch.ones(12, dtype=torch.int64)}),
                 "has dtype I64"),
    "empty": (lambda s: s.update({f"{LAYER}.bias": torch.ones(0)}), "is empty"),
    "no weight": (lambda s: s.pop(f"{LAYER}.weight"), "lacks its Lambda or base weight"),
    "tied differ": (lambda s: s.update({"lm_head.weight": torch.ones(toys.VOCABULARY, toys.D)}),
                    "'lm_head.weight' differs"),
    "no embedding": (lambda s: s.pop("model.shared.weight"), "no 'model.shared.weight'"),
    "task counts": (lambda s: s.update({f"{LAYER}.lora_lambdas": torch.ones(3, 5, 5)}),
                    "layers for 3, 4 tasks"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_while_reading(tmp_path: Path, name: str) -> None:
    """What cannot be exported whole is refused by name."""
    change, found = REFUSALS[name]
    run = toys.write(tmp_path, edited(change))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(run)
    assert_whole(caught.value, where="LAST.pth", found=found)


BINDING: dict[str, tuple[Callable[[Weights], object], str]] = {
    "missing": (lambda s: s.pop("model.encoder.layers.1.fc2.bias"), "fc2.bias' is missing"),
    "shape": (lambda s: s.update({f"{LAYER}.bias": torch.ones(3)}), "is [3], not [12]"),
    "one norm of two": (lambda s: s.pop(f"{toys.VISUAL}.feat_embedding.1.weight"),
                        "is one too many"),
    "no image order": (lambda s: s.pop(f"{toys.VISUAL}.img_order_embedding.weight"),
                       "no model.encoder.visual_embedding.img_order_embedding.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", BINDING)
def test_incomplete_models_are_refused_before_any_work(tmp_path: Path, name: str) -> None:
    """A tensor that is missing, too many, or of another shape is named."""
    change, found = BINDING[name]
    with pytest.raises(CheckpointError) as caught:
        bound_toy(tmp_path, edited(change))
    assert_whole(caught.value, where="VLBart", found=found)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"d_model": 16}, "d_model 16, the checkpoint's is 12"),
     ({"encoder_layers": 6}, "encoder_layers 6, the checkpoint's is 2"),
     ({"model_type": "bert"}, "model_type bert")],
)  # fmt: skip
def test_another_base_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    """The base gives the config, so its sizes must be the checkpoint's."""
    with pytest.raises(BaseModelError) as caught:
        bound_toy(tmp_path, toys.state_dict(), **changes)
    assert_whole(caught.value, where="config.json", found=found)


def test_converted_to_our_own_folder_it_merges_to_the_same_bytes(
    merged: Path, tmp_path: Path
) -> None:
    """Nothing is lost on the way, and the next run needs no alpha, temperature or names."""
    run, own = str(merged.parent / "run"), str(tmp_path / "own")
    words = ["-c", run, "--alpha", str(toys.ALPHA), "--temperature", str(toys.TEMPERATURE),
             "--no-downsample", "--tasks", NAMES, "--convert", own]  # fmt: skip
    assert CliRunner().invoke(cli, ["inspect", *words]).exit_code == 0
    words = ["-c", own, "-b", str(merged.parent / "base"), "--task", "nlvr"]
    result = CliRunner().invoke(cli, ["merge", *words, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out").rglob("model.safetensors")
    assert file.read_bytes() == (merged / "nlvr" / "model.safetensors").read_bytes()
