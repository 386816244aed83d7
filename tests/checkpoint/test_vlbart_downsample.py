"""VL-BARTs trained with ``--downsample``: each image's grid is pooled before the encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.adapters.modules.vl_bart import VLBart
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import HyperparameterError, UsageError
from mtl_export.runtime.ort import OrtPart, open_session
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner
from mtl_export.runtime.runners.seq2seq import FILES
from mtl_export.runtime.seq2seq_generation import Seq2SeqDecoding, Seq2SeqParts
from mtl_export_cli.main import cli
from tests.checkpoint import vl_bart_toys as toys
from tests.factories import toy_checkpoint

NAMES = "vqa,gqa,nlvr,caption"
NUMBERS = ("--alpha", str(toys.ALPHA), "--temperature", str(toys.TEMPERATURE), "--tasks", NAMES)
TASKS = [2, 0, 3, 1]
Inputs = dict[str, Array]


def grids(side: int, images: int) -> Inputs:
    """Return the toy's rows with images of ``side`` x ``side`` regions, one after the other."""
    generator = np.random.default_rng(side)
    count, cells = images * side * side, side * side
    return {
        **toys.rows(),
        "vis_feats": generator.normal(size=(4, count, toys.FEATURES)),
        "boxes": generator.uniform(0, 1, (4, count, 4)),
        "img_order_ids": np.tile(np.arange(images).repeat(cells), (4, 1)),
        "obj_order_ids": np.tile(np.arange(cells), (4, images)),
    }


def pooled(inputs: Inputs, images: int) -> Inputs:
    """Return what the trainer's encoder makes of them: 6 x 6 maxima, the first 36 of the rest.

    As its class Downsample has it: torch's adaptive max pooling over each image's grid.
    """
    found = dict(inputs)
    halves = np.split(inputs["vis_feats"], images, axis=1)
    side = int(halves[0].shape[1] ** 0.5)
    features = []
    for half in halves:
        grid = torch.from_numpy(half).transpose(1, 2).reshape(4, toys.FEATURES, side, side)
        features.append(functional.adaptive_max_pool2d(grid, (6, 6)).flatten(2).transpose(1, 2))
    found["vis_feats"] = torch.cat(features, dim=1).numpy()
    for name in ("boxes", "img_order_ids", "obj_order_ids"):
        kept = [half[:, :36] for half in np.split(inputs[name], images, axis=1)]
        found[name] = np.concatenate(kept, axis=1)
    return found


def expected(inputs: Inputs, images: int, tasks: list[int]) -> Array:
    """Return the logits of a forward pass written from the paper, on pooled features."""
    reference, values = toys.Reference(toys.state_dict()), pooled(inputs, images)
    return np.stack([reference.logits(values, row, task) for row, task in enumerate(tasks)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with base, run, merged folders and graphs, written by the command line."""
    folder = tmp_path_factory.mktemp("downsample")
    toys.base_folder(folder / "base")
    toys.write(folder / "run", toys.state_dict())
    for command, kind in (("merge", "merged"), ("onnx", "onnx")):
        words = ["-c", str(folder / "run"), "-b", str(folder / "base"), *NUMBERS, "--downsample",
                 "--all-tasks", "-o", str(folder / "out" / kind)]  # fmt: skip
        result = CliRunner().invoke(cli, [command, *words])
        assert result.exit_code == 0, result.output
    return folder


def bound_toy(folder: Path, *, downsample: bool) -> BoundModel:
    """Return the toy's checkpoint bound to its base."""
    checkpoint = open_checkpoint(
        folder / "run", alpha=toys.ALPHA, temperature=toys.TEMPERATURE, downsample=downsample
    )
    base = open_base(str(folder / "base"))
    return bind(checkpoint, read_adapters(checkpoint, base), base)


@pytest.mark.parametrize(("side", "images"), [(7, 1), (7, 2), (6, 1), (14, 1), (17, 2)])
def test_oracle_pools_each_image(folder: Path, side: int, images: int) -> None:
    """Logits are those of the trainer's pooling, for one image and for two, of any grid."""
    inputs = grids(side, images)
    with OracleRunner(bound_toy(folder, downsample=True), "fp64") as oracle:
        found = oracle.infer({**inputs, "task_ids": np.array(TASKS)})["logits"]
    np.testing.assert_allclose(found, expected(inputs, images, TASKS), rtol=0, atol=1e-11)


def single(inputs: Inputs) -> Inputs:
    """Return the inputs in float32."""
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in inputs.items()}


@pytest.mark.parametrize("images", [1, 2])
def test_merged_folders_pool(folder: Path, images: int) -> None:
    """A merged folder says that it pools, and does, in forward passes and generation."""
    merged, inputs = folder / "out" / "merged" / "nlvr", grids(7, images)
    config = json.loads((merged / "config.json").read_text())
    assert (config["downsample"], config["n_boxes"]) == (True, 36)
    with MergedRunner(merged) as runner:
        found = runner.infer(single(inputs))["logits"]
    np.testing.assert_allclose(found, expected(inputs, images, [2] * 4), rtol=0, atol=2e-5)
    with quiet_transformers():
        model: Any = VLBart.from_pretrained(merged)
        model.eval()
    given = {name: torch.from_numpy(value) for name, value in single(inputs).items()}
    del given["decoder_input_ids"]
    with torch.inference_mode():
        tokens = model.generate(
            **given, max_new_tokens=3, do_sample=False, eos_token_id=None, forced_eos_token_id=None
        )
        logits = model(**given, decoder_input_ids=tokens[:, :-1]).logits
    assert torch.equal(logits.argmax(dim=-1), tokens[:, 1:])


def encoded_by_graphs(folder: Path, inputs: Inputs, tasks: list[int]) -> Array:
    """Return the logits of the three graphs after the first token."""
    graphs = folder / "out" / "onnx"
    parts = Seq2SeqParts(
        *(OrtPart(open_session(graphs / name, threads=1), graphs / name) for name in FILES)
    )
    given = single(inputs)
    tokens = given.pop("decoder_input_ids")
    given.setdefault("vis_attention_mask", np.ones(given["img_order_ids"].shape, np.int64))
    return Seq2SeqDecoding(parts, given, np.array(tasks), tokens[:, :1]).logits


@pytest.mark.parametrize(("side", "images"), [(7, 1), (7, 2), (9, 1)])
def test_encoder_graph_pools(folder: Path, side: int, images: int) -> None:
    """The graph gives the trainer's logits for grids it was not traced with."""
    inputs = grids(side, images)
    found = encoded_by_graphs(folder, inputs, TASKS)
    np.testing.assert_allclose(found, expected(inputs, images, TASKS)[:, :1], rtol=0, atol=2e-5)


def test_rows_with_one_image_and_with_two_share_a_batch(folder: Path) -> None:
    """A masked second image is as if it were not there, row by row."""
    inputs = grids(7, 2)
    mask = np.ones((4, 98), np.int64)
    mask[1:3, 49:] = 0
    found = encoded_by_graphs(folder, {**inputs, "vis_attention_mask": mask}, TASKS)
    regions = ("vis_feats", "boxes", "img_order_ids", "obj_order_ids")
    one = {name: v[:, :49] if name in regions else v for name, v in inputs.items()}
    two_images, one_image = (expected(x, n, TASKS)[:, :1] for x, n in ((inputs, 2), (one, 1)))
    right = np.where(mask[:, -1:, None] == 1, two_images, one_image)
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-5)
    with OracleRunner(bound_toy(folder, downsample=True), "fp64") as oracle:
        given = {**inputs, "vis_attention_mask": mask, "task_ids": np.array(TASKS)}
        np.testing.assert_allclose(oracle.infer(given)["logits"][:, :1], right, rtol=0, atol=1e-11)


def test_what_is_no_grid_is_never_pooled(folder: Path) -> None:
    """An image that is no square of regions is refused; in a graph its row alone is NaN."""
    inputs = grids(7, 1)
    mask = np.ones((4, 49), np.int64)
    mask[2, 40:] = 0
    found = encoded_by_graphs(folder, {**inputs, "vis_attention_mask": mask}, TASKS)
    np.testing.assert_array_equal(np.isnan(found).all(axis=(1, 2)), [False, False, True, False])
    assert np.isfinite(found[[0, 1, 3]]).all()
    with (
        OracleRunner(bound_toy(folder, downsample=True), "fp64") as oracle,
        pytest.raises(UsageError, match="an image of 40 regions"),
    ):
        oracle.infer({**inputs, "vis_attention_mask": mask, "task_ids": np.array(TASKS)})


def parity(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Return the exit code of ``mtl-export parity`` in ``folder``."""
    monkeypatch.chdir(folder)
    command = ["parity", "-c", "run", "-b", "base", *NUMBERS, *words, "--threads", "1"]
    return CliRunner().invoke(cli, command).exit_code


def test_parity_tells_pooled_from_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exports pass as they were made, and neither passes for the other."""
    for name in ("base", "run", "out"):
        shutil.copytree(folder / name, tmp_path / name)
    assert parity(tmp_path, monkeypatch, "--downsample") == 0
    assert parity(tmp_path, monkeypatch, "--no-downsample") == 3
    shutil.rmtree(tmp_path / "out" / "onnx")
    for name in NAMES.split(","):
        file = tmp_path / "out" / "merged" / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "downsample": False}))
    assert parity(tmp_path, monkeypatch, "--downsample") == 3


def test_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """Nothing is exported before somebody says how the run was; inspect lists it as missing."""
    checkpoint = open_checkpoint(folder / "run", alpha=toys.ALPHA, temperature=toys.TEMPERATURE)
    with pytest.raises(HyperparameterError, match="--downsample or --no-downsample"):
        read_adapters(checkpoint)
    words = ["-c", str(folder / "run"), "-b", str(folder / "base"), *NUMBERS]
    result = CliRunner().invoke(cli, ["merge", *words, "--all-tasks", "-o", str(tmp_path / "m")])
    assert result.exit_code == 5, result.output
    assert not (tmp_path / "m").exists()
    report = json.loads(CliRunner().invoke(cli, ["inspect", *words, "--json"]).output)
    assert report["downsample"] is None
    assert [line.partition(":")[0] for line in report["missing"]] == ["downsample"]
    assert any("--oneddownsample" in note for note in report["notes"])
    text = CliRunner().invoke(cli, ["inspect", *words, "--downsample"]).output
    assert "downsample yes" in text


def test_environment_and_file_say_it_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``downsample = true`` in mtl-export.toml and the environment count, flags above them."""
    monkeypatch.chdir(tmp_path)
    words = ["inspect", "-c", str(folder / "run"), *NUMBERS, "--json"]

    def said(*more: str, **env: str) -> object:
        return json.loads(CliRunner().invoke(cli, [*words, *more], env=env).output)["downsample"]

    assert said(MTL_EXPORT_DOWNSAMPLE="0") == 0.0
    Path("mtl-export.toml").write_text("downsample = true\n")
    assert said() == 1.0
    assert said("--no-downsample") == 0.0


def test_a_converted_checkpoint_carries_it(folder: Path, tmp_path: Path) -> None:
    """The next run need not say it, and may not say the contrary."""
    own = str(tmp_path / "own")
    words = ["-c", str(folder / "run"), *NUMBERS, "--downsample", "--convert", own]
    assert CliRunner().invoke(cli, ["inspect", *words]).exit_code == 0
    words = ["-c", own, "-b", str(folder / "base"), "--task", "nlvr", "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(cli, ["merge", *words, "--no-downsample"]).exit_code == 2
    assert CliRunner().invoke(cli, ["merge", *words]).exit_code == 0
    (config,) = (tmp_path / "out").rglob("config.json")
    assert json.loads(config.read_text())["downsample"] is True


def test_no_other_model_has_the_switch(tmp_path: Path) -> None:
    """Given for another checkpoint it is refused, not ignored."""
    toy_checkpoint(tmp_path / "adapter")
    with pytest.raises(UsageError, match="Expected a VL-BART"):
        open_checkpoint(tmp_path / "adapter", downsample=True)
