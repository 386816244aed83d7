"""ViT's files keep names that its class no longer has; adapters may use either."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTModel

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.adapters.modules.naming import own_module, own_tensor, stored_modules
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.errors import BaseModelError
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.graph import kinds

VIT = next(kind for kind in kinds.KINDS if kind.name == "vit")
STORED = "vit.encoder.layer.0.attention.attention.query"
OWN = "vit.layers.0.attention.q_proj"


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return a ViT with an adapter that names its modules as the files do."""
    return kinds.toy_bound(VIT, tmp_path_factory.mktemp("vit"))


def renamed(bound: BoundModel) -> Checkpoint:
    """Return the checkpoint as a trainer on the class would have written it."""
    model = OracleRunner(bound, "fp64").__enter__()._models[0].model
    own = {name: own_module(model, name) for name in bound.checkpoint.layers}
    assert own[STORED] == OWN
    return bound.checkpoint.renamed(own)


def test_names_in_memory_become_names_in_files(bound: BoundModel) -> None:
    """Bound, both adapters are the same, and so is what their models answer."""
    checkpoint = renamed(bound)
    assert OWN in checkpoint.layers
    again = bind(checkpoint, read_adapters(checkpoint), bound.base)
    assert list(again.adapters.layers) == list(bound.adapters.layers)
    assert list(again.checkpoint.layers) == list(bound.checkpoint.layers)
    inputs = {**VIT.rows(3, 1), "task_ids": np.array([2, 0, 1])}
    with OracleRunner(bound, "fp64") as one, OracleRunner(again, "fp64") as other:
        expected, found = one.infer(inputs)["logits"], other.infer(inputs)["logits"]
    np.testing.assert_array_equal(found, expected)


def test_a_bare_base_lacks_the_first_part(bound: BoundModel, tmp_path: Path) -> None:
    """A base saved without a head has no ``vit.`` before its names."""
    with quiet_transformers():
        ViTModel.from_pretrained(bound.base.folder).save_pretrained(tmp_path)
    checkpoint = dataclasses.replace(renamed(bound))
    base = open_base(str(tmp_path))
    assert STORED.removeprefix("vit.") + ".weight" in base.tensors
    again = bind(checkpoint, read_adapters(checkpoint), base)
    assert again.prefix == "vit."
    assert STORED in again.adapters.layers


def test_tensors_follow_their_modules(bound: BoundModel) -> None:
    """A trained bias is found under the name it has in memory."""
    model = OracleRunner(bound, "fp32").__enter__()._models[0].model
    assert own_tensor(model, f"{STORED}.bias") == f"{OWN}.bias"
    assert own_tensor(model, "classifier.weight") == "classifier.weight"


def test_a_module_that_is_nowhere_is_refused() -> None:
    """With the class and what to correct."""
    with pytest.raises(BaseModelError, match="no module of that name") as caught:
        own_module(torch.nn.Linear(2, 2), "somewhere")
    assert "model_class" in caught.value.fix


def test_what_cannot_be_built_is_left_to_others() -> None:
    """An unknown class or a config of another model renames nothing."""
    for name, config in (("NoSuchModel", {}), ("ViTModel", {"hidden_size": "wide"})):
        assert stored_modules(name, config, [f"{STORED}.weight"], [OWN]) == {}
