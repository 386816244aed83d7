"""Bases saved with a head, for checkpoints whose model class has none, and tied output layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import BaseModel, open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.merge.writer import write_merged
from tests.adapters.toys import memory_tensor
from tests.checkpoint import adapterhub_toys as hub
from tests.factories import HIDDEN, VOCABULARY, toy_base


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Return a base saved as the bare encoder."""
    return toy_base(tmp_path / "bare")


@pytest.fixture
def headed(bare: Path, tmp_path: Path) -> Path:
    """Return the same base saved inside a model with a head, as hubs have them."""
    folder = toy_base(tmp_path / "headed")
    state = {f"bert.{name}": value for name, value in load_file(bare / "model.safetensors").items()}
    state["cls.predictions.bias"] = np.ones(VOCABULARY, np.float32)
    save_file(state, str(folder / "model.safetensors"))
    return folder


def bound_to(folder: Path, base: Path) -> BoundModel:
    """Return an AdapterHub checkpoint bound to a base."""
    checkpoint, opened = open_checkpoint(folder), open_base(str(base))
    return bind(checkpoint, read_adapters(checkpoint, opened), opened)


def test_a_base_with_a_head_serves_a_class_without(
    bare: Path, headed: Path, tmp_path: Path
) -> None:
    """Its names lose their first part, its head is left behind, the hash stays the file's."""
    checkpoint = hub.write_mtl(tmp_path / "hub", head={"layers": 1})
    expected, found = bound_to(checkpoint, bare), bound_to(checkpoint, headed)
    assert found.base.tensors.keys() == expected.base.tensors.keys()
    assert found.base.file_of.keys() == found.base.tensors.keys()
    assert found.base.sha256 == open_base(str(headed)).sha256
    for bound, name in ((expected, "expected"), (found, "found")):
        (tmp_path / name).mkdir()
        write_merged(bound, bound.adapters.tasks[0], tmp_path / name)
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("expected", "found")
    )
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)


def test_a_base_layer_is_found_behind_a_first_part(
    bare: Path, headed: Path, tmp_path: Path
) -> None:
    """DoRA's norm is that of the same weight, however the base was saved."""
    hub.write_adapter(
        tmp_path / "dora", "zeta", hub.single_state("zeta", hub.DORA_CONFIG), hub.DORA_CONFIG
    )
    expected, found = bound_to(tmp_path / "dora", bare), bound_to(tmp_path / "dora", headed)
    for name, layer in expected.adapters.layers.items():
        assert layer.gain is not None
        np.testing.assert_array_equal(found.adapters.layers[name].gain, layer.gain)
        np.testing.assert_array_equal(found.adapters.layers[name].bias, layer.bias)


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_copy_of_a_tied_output_layer_replaces_nothing(tmp_path: Path, is_copy: bool) -> None:
    """A saved copy of the tied embedding is no change; anything else unties the two."""
    embedding: Array = hub.draw(np.random.default_rng(1), VOCABULARY, HIDDEN)
    head = {"lm_head.weight": embedding if is_copy else embedding * 2}
    module = "model.layers.0.self_attn.q_proj"
    state = {
        key.replace(next(iter(hub.MODULES)), module): value
        for key, value in hub.mtl_states(["zeta"])["zeta"].items()
        if key.startswith(next(iter(hub.MODULES)))
    }
    hub.write_adapter(
        tmp_path / "a", "zeta", state, hub.MTL_CONFIG, head=({"config": None}, head),
        model_class="LlamaForCausalLM", model_type="llama",
    )  # fmt: skip
    weight = hub.draw(np.random.default_rng(2), HIDDEN, HIDDEN)
    stored = {"model.embed_tokens.weight": embedding, f"{module}.weight": weight}
    tensors = {name: memory_tensor(name, value) for name, value in stored.items()}
    base = BaseModel("toy", tmp_path, {"tie_word_embeddings": True}, tensors, ())
    checkpoint = open_checkpoint(tmp_path / "a")
    bound = bind(checkpoint, read_adapters(checkpoint, base), base)
    if is_copy:
        assert dataclasses.replace(bound.base) == base
    else:
        assert bound.base.config["tie_word_embeddings"] is False
        np.testing.assert_array_equal(bound.base_tensor("lm_head.weight").numpy(), embedding)
