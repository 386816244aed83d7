"""The trained model and its fold against formulas written a second time, and the trainer's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_export.adapters.modules import mtlora_swin
from mtl_export.adapters.modules.mtlora_swin import COMPUTED, MTLoRASwin
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.dense.fold import folded, layer_folds
from mtl_export.dense.model import DenseModel, open_dense
from mtl_export.errors import CheckpointError, UsageError
from tests.checkpoint.mtlora_toys import write
from tests.dense.checkpoints import (
    LAYERS,
    PLAIN,
    TASK_SCALES,
    TASKS,
    Recipe,
    checkpoint_file,
    configuration,
    state,
)
from tests.dense.plain_forward import PlainSwin
from tests.fixtures.folder import FIXTURES, needs

MATRIX = FIXTURES / "mtlora" / "matrix"

RECIPES = {
    "matrix": PLAIN,
    "matrixv2": Recipe("matrixv2"),
    "addition": Recipe("addition"),
    "lora_only": Recipe("lora_only"),
    "plus": Recipe(merging=True, trained_scale=True),
    "matrixv2 plus": Recipe("matrixv2", merging=True),
    "no proj": Recipe(adapted=("attn.qkv", "mlp.fc1", "mlp.fc2")),
    "no fc1": Recipe(adapted=("attn.qkv", "attn.proj", "mlp.fc2")),
    "no fc2": Recipe(adapted=("attn.qkv", "attn.proj", "mlp.fc1")),
    "fc2 alone": Recipe(adapted=("mlp.fc2",)),
    "addition, no fc2": Recipe("addition", adapted=LAYERS[:3]),
    "addition, no proj": Recipe("addition", adapted=("mlp.fc1", "mlp.fc2")),
    "aspp": Recipe(head="aspp"),
    "segformer": Recipe(head="segformer"),
    "updecoder": Recipe(head="updecoder"),
}


def opened(folder: Path, recipe: Recipe = PLAIN) -> DenseModel:
    """Return the model of a toy file in ``folder``."""
    return open_dense(open_checkpoint(checkpoint_file(folder, recipe)))


def images(count: int = 2) -> torch.Tensor:
    """Return float64 images of noise."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 64, 64, dtype=torch.float64, generator=generator)


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest error as a share of its task's largest value."""
    assert found.keys() <= wanted.keys()
    assert all(found[task].shape == wanted[task].shape for task in found)
    return max(
        float((found[task] - wanted[task]).abs().max() / wanted[task].abs().max()) for task in found
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_and_its_folds_compute_the_formulas(tmp_path: Path, name: str) -> None:
    """Unmerged to 1e-12; folded, for all tasks, two and one, to float32's rounding."""
    recipe = RECIPES[name]
    model, image = opened(tmp_path, recipe), images()
    with torch.inference_mode():
        wanted = PlainSwin(state(recipe), recipe)(image)
        assert list(model.trained(torch.float64)(image)) == list(TASKS)
        assert worst(model.trained(torch.float64)(image), wanted) < 1e-12
        for tasks in (TASKS, ("sal", "semseg"), ("normals",)):
            tensors, described = model.folded(tasks)
            found = MTLoRASwin.from_tensors(tensors, described).double()(image)
            assert list(found) == list(tasks)
            assert worst(found, wanted) < 2e-6
            assert not any(".lora_" in key and "norm" not in key for key in tensors)
            others = set(TASKS) - set(tasks)
            assert not any(f".{task}." in key for key in tensors for task in others)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_hidden_values_in_parts_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """From however many tokens on the tasks' hidden values are computed in parts."""
    monkeypatch.setattr(mtlora_swin, "LONG", 5)
    model, image = opened(tmp_path, Recipe(mode)), images()
    with torch.inference_mode():
        wanted = PlainSwin(state(Recipe(mode)), Recipe(mode))(image)
        found = MTLoRASwin.from_tensors(*model.folded(TASKS)).double()(image)
    assert worst(found, wanted) < 2e-6


def test_the_state_dict_is_the_trainers(tmp_path: Path) -> None:
    """Names, shapes and computed tables are those of the file, so it loads strictly."""
    model = opened(tmp_path)
    own = model.trained().state_dict()
    assert own.keys() == model.tensors.keys()
    assert all(torch.equal(own[name], value) for name, value in model.tensors.items())
    assert any(name.endswith(COMPUTED) for name in own)


def test_it_can_be_trained(tmp_path: Path) -> None:
    """Every parameter but those that reach no output gets a gradient."""
    model = opened(tmp_path).trained()
    sum(value.square().mean() for value in model.train()(images().float()).values()).backward()
    silent = {name for name, value in model.named_parameters() if value.grad is None}
    last = "backbone.layers.3.blocks.1.mlp.fc2.lora_shared"
    assert silent == {f"{last}_A", f"{last}_B"}


@pytest.mark.parametrize(
    ("mode", "kept"), [("matrix", "streams"), ("addition", "streams and norm")]
)
def test_what_stays_beside_a_weight_is_said_layer_by_layer(
    tmp_path: Path, mode: str, kept: str
) -> None:
    """The qkv layers and all but the last blocks fold whole."""
    model = opened(tmp_path, Recipe(mode))
    folds = {one.name: one for one in layer_folds(model.tensors, model.described)}
    assert folds["backbone.layers.0.blocks.0.mlp.fc1"].kept == ""
    assert folds["backbone.layers.0.blocks.1.attn.qkv"].kept == ""
    last = folds["backbone.layers.0.blocks.1.mlp.fc1"]
    assert (last.kept, last.ranks) == (kept, (3, 2, 1))


def test_lora_only_folds_to_a_plain_swin(tmp_path: Path) -> None:
    """No second stream is left, and a head per task."""
    model = opened(tmp_path, Recipe("lora_only"))
    tensors, _ = model.folded(["sal"])
    assert not any("task_" in name or "shared_" in name for name in tensors)
    assert {one.kept for one in layer_folds(model.tensors, model.described)} == {""}


def test_a_task_may_have_no_rank(tmp_path: Path) -> None:
    """Rank 0 is a zero update."""
    recipe = Recipe()
    tensors = state(recipe)
    for name in [name for name in tensors if name.endswith(".sal") and "lora_tasks" in name]:
        tensors[name] = tensors[name][:0] if "_A." in name else tensors[name][:, :0]
    file = write(tmp_path / "ckpt_epoch_3.pth", tensors, configuration(recipe))
    model, image = open_dense(open_checkpoint(file)), images()
    with torch.inference_mode():
        wanted = PlainSwin(tensors, recipe)(image)
        found = MTLoRASwin.from_tensors(*model.folded(["sal"])).double()(image)
    assert worst(found, wanted) < 2e-6


def test_images_of_another_size_get_tables_and_masks_of_their_own(tmp_path: Path) -> None:
    """With windows of 2 everywhere, 128 pixels fit as well, and shift where 64 did not."""
    recipe = Recipe(window=2)
    model = opened(tmp_path, recipe).at(128)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64, generator=generator)
    with torch.inference_mode():
        wanted = PlainSwin(state(recipe), recipe)(image)
        found = MTLoRASwin.from_tensors(*model.folded(TASKS)).double()(image)
    assert worst(found, wanted) < 2e-6


@pytest.mark.parametrize("size", [65, 96, 128])
def test_a_size_that_no_window_divides_is_refused_with_those_that_fit(
    tmp_path: Path, size: int
) -> None:
    """The advice is followed once."""
    model = opened(tmp_path)
    with pytest.raises(UsageError, match=f"--image-size {size}: ") as caught:
        model.at(size)
    assert "64" in caught.value.expected
    assert model.at(64).described.image_size == 64


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("backbone.layers.1.downsample.norm.weight", None), "is missing"),
        (("backbone.layers.0.blocks.0.norm2.bias", None), "norm2.bias is missing"),
        (("decoders.decoders.sal.last_layer.0.weight", None), "unknown kind"),
        (("downsampler.sal.downsample_1.weight", (4, 9, 1, 1)), "layers do not take"),
        (("backbone.layers.0.blocks.1.attn_mask", (4, 16, 16)), "DATA.IMG_SIZE 64"),
        (("backbone.layers.0.blocks.0.attn.relative_position_index", (16, 16)), "other values"),
    ],
)
def test_a_state_dict_that_is_not_whole_is_refused(
    tmp_path: Path, change: tuple[str, tuple[int, ...] | None], found: str
) -> None:
    """One message says which tensor."""
    name, shape = change
    tensors = state()
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    if "last_layer" in name:
        tensors = {key: v for key, v in tensors.items() if "sal.last_layer.0" not in key}
    file = write(tmp_path / "ckpt_epoch_3.pth", tensors, configuration())
    with pytest.raises(CheckpointError, match=found):
        open_dense(open_checkpoint(file))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    """Numpy has no bfloat16; what is stored is computed with in float32."""
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state().items()}
    file = write(tmp_path / "ckpt_epoch_3.pth", tensors, configuration())
    model, image = open_dense(open_checkpoint(file)), images()
    with torch.inference_mode():
        wanted = PlainSwin(tensors, Recipe())(image)
        found = MTLoRASwin.from_tensors(*model.folded(["sal"])).double()(image)
    assert worst(found, wanted) < 2e-6


@pytest.mark.parametrize(
    ("flag", "lacking"),
    [("TRAINABLE_SCALE_PER_TASK", "task_scale_0"), ("TRAINABLE_SCALE_SHARED", "shared_scale")],
)
def test_scales_that_were_trained_and_not_stored_are_refused(
    tmp_path: Path, flag: str, lacking: str
) -> None:
    """The configuration's numbers are where training began, not where it ended."""
    file = checkpoint_file(tmp_path, Recipe(settings={flag: True}))
    with pytest.raises(CheckpointError, match=f"lacks {lacking}, which was trained"):
        open_checkpoint(file)


def test_scales_per_task_that_a_fork_trained_are_used(tmp_path: Path) -> None:
    """In place of the configuration's; some of them alone are refused."""
    tensors = state()
    for name in [name for name in tensors if "lora_tasks_A" in name]:
        tensors[name.replace("lora_tasks_A", "lora_task_scale")] = torch.tensor([1.5])
    file = write(tmp_path / "ckpt_epoch_3.pth", tensors, configuration())
    model, image = open_dense(open_checkpoint(file)), images()
    as_configured = {k: v for k, v in tensors.items() if "task_scale" not in k}
    for name in [name for name in as_configured if "lora_tasks_B" in name]:
        stage, task = int(name.split(".")[2]), name.rpartition(".")[2]
        as_configured[name] = as_configured[name] * 1.5 / TASK_SCALES[task][stage]
    with torch.inference_mode():
        wanted = PlainSwin(as_configured, Recipe())(image)
        assert worst(model.trained(torch.float64)(image), wanted) < 1e-6
        found = MTLoRASwin.from_tensors(*model.folded(TASKS)).double()(image)
    assert worst(found, wanted) < 2e-6
    del tensors["backbone.layers.0.blocks.1.mlp.fc1.lora_task_scale.sal"]
    file = write(tmp_path / "ckpt_epoch_3.pth", tensors, configuration())
    with pytest.raises(CheckpointError, match="lacks task_scale_2"):
        open_checkpoint(file)


class TestTrainersFile:
    """A file that the authors' code wrote, and what that code answered."""

    pytestmark = needs("mtlora")

    def test_features_and_outputs_are_theirs(self) -> None:
        """Stage by stage and task by task."""
        model = open_dense(open_checkpoint(MATRIX / "ckpt_epoch_0.pth"))
        stored = np.load(MATRIX / "reference.npz")
        reference = {name: torch.from_numpy(stored[name]) for name in stored}
        image = reference["image"]
        module = model.trained()
        with torch.inference_mode():
            features = module.backbone(image)
            outputs = module.answers(module.maps(features))
        for stage, one in enumerate(features):
            assert (one.shared - reference[f"stage{stage}_shared"]).abs().max() < 3e-6
            for place, task in enumerate(model.tasks):
                wanted = reference[f"stage{stage}_task_{task.name}"]
                assert (one.tasks[place] - wanted).abs().max() < 3e-6
        for name, value in outputs.items():
            assert (value - reference[f"out_{name}"]).abs().max() < 3e-5
        tensors, described = folded(model.tensors, model.described, ["sal"])
        with torch.inference_mode():
            alone = MTLoRASwin.from_tensors(tensors, described)(image)["sal"]
        assert (alone - reference["out_sal"]).abs().max() < 3e-5
