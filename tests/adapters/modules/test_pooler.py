"""A bare encoder from a base that was saved with another head has no pooler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import BertModel

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.checkpoint.base_model import open_base
from mtl_export.errors import BaseModelError
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner
from tests.graph import kinds

FEATURES = next(kind for kind in kinds.KINDS if kind.name == "bert features")


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return an adapted BertModel on a base without its pooler."""
    folder = tmp_path_factory.mktemp("bare")
    whole = kinds.toy_bound(FEATURES, folder / "whole")
    with quiet_transformers():
        model = BertModel.from_pretrained(whole.base.folder, add_pooling_layer=False)
        model.save_pretrained(folder / "base")
    base = open_base(str(folder / "base"))
    assert not [name for name in base.tensors if "pooler" in name]
    return dataclasses.replace(whole, base=base)


def test_it_answers_with_its_states(bound: BoundModel, tmp_path: Path) -> None:
    """Oracle and merged folder give the hidden states and nothing made up."""
    rows = FEATURES.rows(3, 7)
    with OracleRunner(bound, "fp64") as runner:
        expected = runner.infer({**rows, "task_ids": np.array([1, 1, 1])})
    assert list(expected) == ["last_hidden_state"]
    write_merged(bound, bound.adapters.tasks[1], tmp_path, dtype=None)
    with MergedRunner(tmp_path) as merged:
        found = merged.infer(rows)
    assert list(found) == ["last_hidden_state"]
    np.testing.assert_allclose(found["last_hidden_state"], expected["last_hidden_state"], atol=3e-5)


def test_any_other_gap_is_refused(bound: BoundModel) -> None:
    """A class with a head needs it in the base or in the checkpoint."""
    adapters = dataclasses.replace(bound.adapters, model_class="BertForTokenClassification")
    with (
        pytest.raises(BaseModelError, match=r"classifier\.weight"),
        OracleRunner(dataclasses.replace(bound, adapters=adapters), "fp32"),
    ):
        pass
