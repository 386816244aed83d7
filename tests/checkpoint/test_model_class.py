"""The transformers class that an Auto class means for a base."""

from __future__ import annotations

import pytest
import transformers

from mtl_export.checkpoint.model_class import LM_HEAD_STEMS, STEMS, concrete_class, has_head

CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        (CLASSIFIER, "BertModel", "BertForSequenceClassification"),
        (CLASSIFIER, "BertForMaskedLM", "BertForSequenceClassification"),
        (CLASSIFIER, "LlamaForCausalLM", "LlamaForSequenceClassification"),
        (CLASSIFIER, "T5ForConditionalGeneration", "T5ForSequenceClassification"),
        ("AutoModelForCausalLM", "GPT2Model", "GPT2LMHeadModel"),
        ("AutoModelForCausalLM", "Qwen3ForCausalLM", "Qwen3ForCausalLM"),
        ("AutoModelForSeq2SeqLM", "T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        ("AutoModel", "GPT2LMHeadModel", "GPT2Model"),
        ("BertForMaskedLM", "BertModel", "BertForMaskedLM"),
    ],
)
def test_the_ending_follows_the_task(name: str, architecture: str, expected: str) -> None:
    """Whatever class the base was saved as; a concrete class stays."""
    assert concrete_class(name, {"architectures": [architecture]}) == expected
    assert hasattr(transformers, expected)


def test_the_model_type_stands_in_for_the_architecture() -> None:
    """A config.json without architectures; one that tells nothing gives no class."""
    assert concrete_class(CLASSIFIER, {"model_type": "roberta"}) == (
        "RobertaForSequenceClassification"
    )
    assert concrete_class(CLASSIFIER, {"model_type": "unheard_of"}) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertForSequenceClassification", True), ("ViTForImageClassification", True),
        ("GPT2LMHeadModel", True), ("BertModel", False), ("FormerModel", False), ("", False),
    ],
)  # fmt: skip
def test_a_class_says_whether_it_has_a_head(name: str, expected: bool) -> None:
    """By how it ends; one that does not say is taken for bare."""
    assert has_head(name) is expected


def test_the_tables_name_classes_that_exist() -> None:
    """A typing error here would only show when such a model is exported."""
    for stem in STEMS.values():
        assert hasattr(transformers, f"{stem}Model") or hasattr(transformers, f"{stem}ForCausalLM")
    for stem in LM_HEAD_STEMS:
        assert hasattr(transformers, f"{stem}LMHeadModel")
