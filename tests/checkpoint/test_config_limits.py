"""Configs that ask for code from elsewhere, or for models without end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.config_limits import check_config
from mtl_export.errors import BaseModelError, IntegrityError, MtlExportError
from tests.checkpoint.messages import assert_whole
from tests.factories import toy_base

CODE: tuple[dict[str, Any], ...] = (
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "org/evil@main:f"},
    {"text_config": {"attn_implementation": {"": "org/evil"}}},
    {"experts_implementation": "org/evil"},
)
ENDLESS: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 10**9}, {"n_layer": 10**9}, {"encoder_layers": 500},
    {"depths": [2, 10**6]}, {"vision_config": {"depth": 10**9}}, {"num_labels": 10**9},
)  # fmt: skip


@pytest.mark.parametrize(("config", "kind"), [
    *((config, IntegrityError) for config in CODE),
    *((config, BaseModelError) for config in ENDLESS),
])  # fmt: skip
def test_code_from_the_hub_and_endless_models_are_refused(
    config: dict[str, Any], kind: type[MtlExportError]
) -> None:
    """Before transformers sees the file: it would fetch the one and build the other."""
    with pytest.raises(kind) as caught:
        check_config(config, 200, where="config.json")
    assert_whole(caught.value, where="config.json", found="")


def test_configs_of_models_that_there_are_pass() -> None:
    """Attention by its usual names, shared layers, and as many layers as there are tensors."""
    check_config(
        {
            "attn_implementation": "sdpa",
            "num_hidden_layers": 12,
            "num_labels": 30000,
            "auto_map": {"AutoModel": "org/evil--m.M"},
            "n_layer": None,
        },
        30,
        where="x",
    )
    check_config({"num_hidden_layers": 126, "depths": [3, 3, 27, 3]}, 1100, where="x")


def test_a_base_is_asked_when_it_is_opened(tmp_path: Path) -> None:
    """Every command opens it first."""
    folder = toy_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CODE[0]}))
    with pytest.raises(IntegrityError, match="program on the hub"):
        open_base(str(folder))
