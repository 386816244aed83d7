"""PEFT's config: scalings, and everything that is refused by name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from mtl_export.checkpoint.formats import peft_config
from mtl_export.checkpoint.formats.peft_config import REFUSED_FIELDS, PeftConfig, read_config
from mtl_export.errors import AdapterError, CheckpointError
from tests.checkpoint import peft_toys as toys
from tests.checkpoint.messages import assert_whole


def written(folder: Path, **fields: Any) -> PeftConfig:
    """Return the toy config with ``fields`` changed, read back."""
    return read_config(toys.write(folder / "a", toys.lora(toys.QUERY), fields))


def test_scaling_is_alpha_over_r_or_its_root(tmp_path: Path) -> None:
    """RsLoRA divides by the root of the rank."""
    assert written(tmp_path, r=4, lora_alpha=6).scaling("x") == 1.5
    assert written(tmp_path, r=4, lora_alpha=6, use_rslora=True).scaling("x") == 3.0


def test_patterns_are_suffixes_or_regexes_and_the_first_wins(tmp_path: Path) -> None:
    """As peft's get_pattern_key: a whole dotted suffix, matched from its start."""
    config = written(
        tmp_path,
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"self.query": 9, r"layer\.1\..*": 16},
        alpha_pattern={r"layer\.\d\.attention\.self\.query": 3},
    )
    query, other = "bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.1.output"
    assert config.rank(query.format(1)) == 9, "the first key wins"
    assert config.rank("bert.itself.query") == 4, "'self' must begin after a dot"
    assert config.rank(other) == 16
    assert config.scaling(query.format(0)) == 3 / math.sqrt(9)
    assert config.scaling(other) == 6 / math.sqrt(16)
    assert (config.rank("pooler.dense"), config.alpha("pooler.dense")) == (4, 6.0)


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "lora"),
        ({"use_dora": True}, "dora"),
        ({"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, "kasa"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "OLoRA"}, "olora"),
        *(({"init_lora_weights": name}, "lora")
          for name in (False, "gaussian", "orthogonal", "eva", "mica")),
    ],
)  # fmt: skip
def test_the_start_and_the_variant_decide_the_family(
    tmp_path: Path, fields: dict[str, Any], family: str
) -> None:
    """Only a start that left the base, DoRA and KaSA have other maths than LoRA."""
    assert written(tmp_path, **fields).family == family


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_variants_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """Each with the reason why its weights are not W + s B A."""
    with pytest.raises(AdapterError) as caught:
        written(tmp_path, **{name: {"any": 1}})
    assert_whole(caught.value, where=name, found=REFUSED_FIELDS[name][0], expected="LoRA")


@pytest.mark.parametrize("method", ["IA3", "LOHA", "XLORA", "PREFIX_TUNING"])
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str) -> None:
    """PEFT has 44 methods besides LoRA."""
    with pytest.raises(AdapterError) as caught:
        written(tmp_path, peft_type=method)
    assert_whole(caught.value, where="adapter_config.json", found=repr(method), expected="LORA")


@pytest.mark.parametrize("name", ["pissa_niter_16", "corda", "lora_ga", "loftq", "a_new_one"])
def test_starts_that_cannot_be_redone_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    """The option that avoids it is in the message."""
    with pytest.raises(AdapterError) as caught:
        written(tmp_path, init_lora_weights=name)
    assert_whole(caught.value, where=name, found="")
    way_out = "init_lora_weights to true" if name == "loftq" else "path_initial_model"
    assert way_out in caught.value.fix


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa", "use_dora": True},
        {"kasa_config": {"beta": 1.0}, "init_lora_weights": "olora"},
    ],
)
def test_untested_combinations_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Two changes of the base weight in one adapter."""
    with pytest.raises(AdapterError, match="together with"):
        written(tmp_path, **fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", "8"), ("r", True), ("r", None), ("lora_alpha", None), ("lora_alpha", "16"),
        ("rank_pattern", ["q"]), ("rank_pattern", {"q": "8"}), ("alpha_pattern", {"(": 2}),
        ("trainable_token_indices", [1, 1]), ("trainable_token_indices", {"wte": [-1]}),
        ("trainable_token_indices", "all"),
    ],
)  # fmt: skip
def test_broken_fields_are_refused(tmp_path: Path, field: str, value: object) -> None:
    """The field and what it says are named."""
    with pytest.raises(CheckpointError) as caught:
        written(tmp_path, **{field: value})
    assert_whole(caught.value, where="adapter_config.json", found=field)


def test_the_trained_class_is_used_where_it_is_known(tmp_path: Path) -> None:
    """auto_mapping names it; else the task type gives the Auto class; else nothing."""
    mapping = {"base_model_class": "BertForMaskedLM", "parent_library": "transformers"}
    assert written(tmp_path, auto_mapping=mapping, task_type=None).model_class == "BertForMaskedLM"
    assert written(tmp_path, task_type="TOKEN_CLS").model_class == (
        "AutoModelForTokenClassification"
    )
    assert written(tmp_path, task_type=None).model_class == ""


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(.|..|...)*[0-9]", r"(\w|\.|[a-z]|[a-y])*[0-9]"])
def test_expressions_that_never_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pattern: str
) -> None:
    """Python's re would match them for years; all modules of an adapter share one limit."""
    monkeypatch.setattr(peft_config, "MATCHING_S", 0.1)
    config = written(tmp_path, **{name: {pattern: 2}})
    for layer in "abc":
        with pytest.raises(CheckpointError, match=r"more than 0\.1 s to match"):
            config.scaling(f"bert.encoder.layer.{layer}.attention.self.query")


def test_thousands_of_patterns_are_compiled_once_and_more_are_refused(tmp_path: Path) -> None:
    """As many keys as modules are matched at once; 10,001 keys are no adapter."""
    names = [f"layers.{number}.mlp.up_proj" for number in range(600)]
    config = written(tmp_path, rank_pattern={re.escape(name): 3 for name in names})
    assert {config.rank(f"model.{name}") for name in names} == {3}
    with pytest.raises(CheckpointError, match="10,001 keys"):
        written(tmp_path, rank_pattern={str(number): 3 for number in range(10_001)})
    with pytest.raises(CheckpointError, match="bad key"):
        written(tmp_path, rank_pattern={"a?" * 5000: 3})
