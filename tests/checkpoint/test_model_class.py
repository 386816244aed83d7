"""The transformers class that an Auto class means for a base."""

from __future__ import annotations

import pytest
import transformers
from transformers.models.auto import modeling_auto

from mtl_export.checkpoint.model_class import TABLES, auto_tables, concrete_class, has_head

CLASSIFIER, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        (CLASSIFIER, "BertModel", "BertForSequenceClassification"),
        (CLASSIFIER, "BertForMaskedLM", "BertForSequenceClassification"),
        (CLASSIFIER, "LlamaForCausalLM", "LlamaForSequenceClassification"),
        (CLASSIFIER, "T5ForConditionalGeneration", "T5ForSequenceClassification"),
        (CAUSAL, "GPT2Model", "GPT2LMHeadModel"),
        (CAUSAL, "BertForMaskedLM", "BertLMHeadModel"),
        (CAUSAL, "Qwen3ForCausalLM", "Qwen3ForCausalLM"),
        (CAUSAL, "Qwen2VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
        (CAUSAL, "Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration"),
        (SEQ2SEQ, "T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        (SEQ2SEQ, "MarianMTModel", "MarianMTModel"),
        (SEQ2SEQ, "VisionEncoderDecoderModel", "VisionEncoderDecoderModel"),
        ("AutoModel", "GPT2LMHeadModel", "GPT2Model"),
        ("BertForMaskedLM", "BertModel", "BertForMaskedLM"),
    ],
)
def test_the_class_is_the_bases_own_or_what_the_auto_class_finds(
    name: str, architecture: str, expected: str
) -> None:
    """Whatever class the base was saved as; a concrete class stays, and no name is glued."""
    assert concrete_class(name, {"architectures": [architecture]}) == expected
    assert hasattr(transformers, expected)


def test_the_model_type_stands_in_for_the_architecture() -> None:
    """A config.json without architectures; one that tells nothing gives no class."""
    assert concrete_class(CLASSIFIER, {"model_type": "roberta"}) == (
        "RobertaForSequenceClassification"
    )
    assert concrete_class(CLASSIFIER, {"model_type": "unheard_of"}) == ""


def test_a_class_that_no_table_has_stays() -> None:
    """A base with code of its own keeps its class."""
    config = {"model_type": "unheard_of", "architectures": ["UnheardOfModel"]}
    assert concrete_class(CLASSIFIER, config) == "UnheardOfModel"


@pytest.mark.parametrize("table", sorted(TABLES.values()))
def test_the_tables_are_those_that_transformers_has(table: str) -> None:
    """Read as text, they say what the imported module says."""
    imported = getattr(modeling_auto, table).items()
    first = {kind: name if isinstance(name, str) else name[0] for kind, name in imported}
    assert auto_tables()[table] == first


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
