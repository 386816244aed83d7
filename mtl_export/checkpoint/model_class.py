"""Which transformers class a checkpoint was trained as, told from its base's config.

A trainer often says only "sequence classification". The class is then the base
architecture's own name with the ending of that task, as transformers' Auto classes would
find it; transformers itself is not imported.

>>> concrete_class("AutoModelForSequenceClassification", {"architectures": ["BertModel"]})
'BertForSequenceClassification'
>>> concrete_class("AutoModelForCausalLM", {"architectures": ["GPT2LMHeadModel"]})
'GPT2LMHeadModel'
>>> concrete_class("GPT2Model", {"architectures": ["GPT2LMHeadModel"]})
'GPT2Model'
>>> concrete_class("", {"architectures": ["LlamaForCausalLM"]})
'LlamaForCausalLM'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mtl_export.checkpoint.own_classes import own_class

AUTO_PREFIX = "AutoModel"
# Auto class -> what transformers appends to an architecture's name.
ENDINGS = {
    "AutoModel": "Model",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSeq2SeqLM": "ForConditionalGeneration",
}
# Architectures whose causal language model is called otherwise in transformers 5.23
# (models/auto/modeling_auto.py, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).
LM_HEAD_STEMS = frozenset({
    "Bert", "CTRL", "GPT2", "OpenAIGPT", "XLNet",
})  # fmt: skip
# How transformers' classes end that predict next tokens.
CAUSAL_LM_ENDINGS = ("ForCausalLM", "LMHeadModel")
# And those that put any head on an encoder.
HEAD_ENDING = re.compile(r"For[A-Z][A-Za-z]*$")
# How those end that write from an encoder's states, where the config says that they have one.
SEQ2SEQ_ENDINGS = ("ForConditionalGeneration", "MTModel")
# What may end an architecture's name in config.json, longest first.
KNOWN_ENDINGS = (
    "ForSequenceClassification", "ForConditionalGeneration", "ForTokenClassification",
    "ForQuestionAnswering", "ForQuestionAnsweringSimple", "DoubleHeadsModel", "EncoderModel",
    "ForPreTraining", "WithLMHeadModel", "ForCausalLM", "ForMaskedLM", "LMHeadModel",
    "PreTrainedModel", "Model",
)  # fmt: skip
# model_type -> name, for a base whose config.json names no architecture.
STEMS = {
    "albert": "Albert", "bert": "Bert", "deberta": "Deberta", "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert", "electra": "Electra", "gemma": "Gemma", "gemma2": "Gemma2",
    "gpt2": "GPT2", "gpt_neo": "GPTNeo", "gpt_neox": "GPTNeoX", "llama": "Llama",
    "mistral": "Mistral", "modernbert": "ModernBert", "mpnet": "MPNet", "opt": "OPT",
    "phi": "Phi", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3", "roberta": "Roberta",
    "t5": "T5", "xlm-roberta": "XLMRoberta",
}  # fmt: skip


def concrete_class(name: str, config: Mapping[str, Any]) -> str:
    """Return the transformers class that ``name`` means for a base with this config.

    Args:
        name: A class, which is returned as it is, an Auto class, or nothing where the
            checkpoint does not say: adapters are then trained on the base's own class.
        config: The base's ``config.json``.

    Returns:
        The class; empty if the config does not tell.
    """
    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if not name.startswith(AUTO_PREFIX):
        return name or first
    ending = ENDINGS.get(name)
    stem = next(
        (first.removesuffix(known) for known in KNOWN_ENDINGS if first.endswith(known)),
        STEMS.get(str(config.get("model_type")), ""),
    )
    if not stem or ending is None:
        return ""
    if name == "AutoModelForCausalLM" and stem in LM_HEAD_STEMS:
        ending = "LMHeadModel"
    return stem + ending


def is_causal_lm(model_class: str) -> bool:
    """Return whether a transformers class of this name predicts next tokens.

    >>> is_causal_lm("GPT2LMHeadModel"), is_causal_lm("LlamaForSequenceClassification")
    (True, False)
    """
    return model_class.endswith(CAUSAL_LM_ENDINGS)


def has_head(model_class: str) -> bool:
    """Return whether a transformers class of this name answers with a head's output.

    >>> has_head("BertForTokenClassification"), has_head("GPT2LMHeadModel"), has_head("BertModel")
    (True, True, False)
    """
    return is_causal_lm(model_class) or HEAD_ENDING.search(model_class) is not None


def is_seq2seq(model_class: str, config: Mapping[str, Any]) -> bool:
    """Return whether a class of this name and config writes text from an encoder's states.

    >>> is_seq2seq("T5ForConditionalGeneration", {"is_encoder_decoder": True})
    True
    >>> is_seq2seq("LlavaForConditionalGeneration", {})
    False
    """
    is_own = own_class(model_class) is not None
    has_encoder = is_own or bool(config.get("is_encoder_decoder"))
    return has_encoder and (is_own or model_class.endswith(SEQ2SEQ_ENDINGS))
