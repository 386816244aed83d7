from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import base_model, quiet_transformers
from mtl_export.errors import AdapterError, BaseModelError
from tests.adapters import toys
from tests.checkpoint.messages import assert_whole
from tests.graph import language


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return the toy checkpoint bound to the toy base."""
    return toys.toy_bound(tmp_path_factory.mktemp("toy"))


def test_the_model_has_the_bases_weights_in_the_dtype_asked_for(bound: BoundModel) -> None:
    """Every base tensor is in the model class under prefix + name, in eval mode."""
    model = base_model(bound, torch.float64)
    assert not model.training
    state = model.state_dict()
    for name, tensor in bound.base.tensors.items():
        value = state[bound.prefix + name]
        assert value.dtype == torch.float64
        np.testing.assert_array_equal(value.numpy(), tensor.numpy())


def test_a_mixture_of_experts_computes_in_float64(tmp_path: Path) -> None:
    """Its usual kernel takes no such numbers; the oracle needs them."""
    bound = language.language_bound(tmp_path, "MixtralForCausalLM")
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        exact, lower = (
            base_model(bound, dtype)(input_ids=ids).logits
            for dtype in (torch.float64, torch.float32)
        )
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(lower.numpy(), exact.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["", "BertForEverything", "BertConfig"])
def test_an_unknown_model_class_is_refused(bound: BoundModel, name: str) -> None:
    """A class that transformers does not have, or that is no model, is named."""
    adapters = replace(bound.adapters, model_class=name)
    with pytest.raises(AdapterError) as caught:
        base_model(replace(bound, adapters=adapters), torch.float32)
    assert repr(name) in caught.value.problem
    assert "BertForSequenceClassification" in caught.value.expected
    assert "architectures" in caught.value.fix


def test_a_weight_that_is_nowhere_is_refused(bound: BoundModel, tmp_path: Path) -> None:
    """A base that lacks a weight is refused: transformers would invent it."""
    (tmp_path / "config.json").write_bytes((bound.base.folder / "config.json").read_bytes())
    tensors = load_file(bound.base.folder / "model.safetensors")
    del tensors["pooler.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    base = replace(bound.base, folder=tmp_path)
    with pytest.raises(BaseModelError) as caught:
        base_model(replace(bound, base=base), torch.float32)
    assert "bert.pooler.dense.bias" in caught.value.problem
    assert "BertForSequenceClassification" in caught.value.problem
    assert caught.value.expected
    assert caught.value.fix


def test_transformers_logging_is_restored() -> None:
    """Silence ends with the block, also after an error."""
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())

    def fail_quietly() -> None:
        with quiet_transformers():
            assert logging.get_verbosity() == 40  # ERROR
            assert not logging.is_progress_bar_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail_quietly()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


WRONG_CONFIGS: dict[str, dict[str, object]] = {
    "no width": {"hidden_size": 0},
    "negative": {"max_position_embeddings": -5},
    "no heads": {"num_attention_heads": 0},
    "of another type": {"intermediate_size": "x"},
    "another width": {"intermediate_size": 24},
    "no dtype": {"dtype": "load"},
    "no activation": {"hidden_act": "__import__"},
    "larger than memory": {"vocab_size": 10**9, "hidden_size": 10**5},
}


@pytest.mark.parametrize("wrong", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_config_that_fits_no_model_is_refused(
    bound: BoundModel, tmp_path: Path, wrong: dict[str, object]
) -> None:
    """Whatever transformers and torch raise, it is a fault of the base, and said so."""
    folder = Path(shutil.copytree(bound.base.folder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **wrong}))
    broken = replace(bound, base=replace(bound.base, folder=folder))
    with pytest.raises(BaseModelError) as caught:
        base_model(broken, torch.float32)
    assert_whole(caught.value, where=bound.base.reference, found="of its config.json")


def test_a_model_much_larger_than_its_files_is_refused(bound: BoundModel) -> None:
    """Else transformers fills gigabytes of a class that the base never was with random numbers."""
    other = replace(bound, adapters=replace(bound.adapters, model_class="RagModel"))
    with pytest.raises(BaseModelError) as caught:
        base_model(other, torch.float32)
    assert_whole(caught.value, where=bound.base.reference, found="numbers, the files")
