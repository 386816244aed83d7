"""Which transformers class a checkpoint was trained as, told from its base's config.

A trainer often says only "sequence classification". The class is then what transformers' Auto
classes would find for the base, never a name put together; where they find none, or where a
language model was trained and the base is one already, it is the base's own. The tables of the
Auto classes are read as text: importing transformers takes seconds.

>>> concrete_class("AutoModelForSequenceClassification", {"model_type": "bert"})
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
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtl_export.checkpoint.own_classes import own_class

AUTO_PREFIX = "AutoModel"
# Auto class -> its table: model_type -> class (models/auto/modeling_auto.py).
TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
_TABLE = re.compile(r"^(MODEL\w*_NAMES) = OrderedDict\(\s*\[(.*?)^ *\]", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r'\(\s*"([^"]+)",\s*[(\[]?\s*"([^"]+)"')
# Auto classes of language models, and how the classes end that are such models.
LANGUAGE_MODELS = frozenset({"AutoModelForCausalLM", "AutoModelForSeq2SeqLM"})
LM_ENDINGS = (
    "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel", "EncoderDecoderModel",
    "ForTextToText",
)  # fmt: skip
# How transformers' classes end that predict next tokens.
CAUSAL_LM_ENDINGS = ("ForCausalLM", "LMHeadModel")
# And those that put any head on an encoder.
HEAD_ENDING = re.compile(r"For[A-Z][A-Za-z]*$")
# How those end that write from an encoder's states, where the config says that they have one.
SEQ2SEQ_ENDINGS = ("ForConditionalGeneration", "MTModel")


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
    if name in LANGUAGE_MODELS and first.endswith(LM_ENDINGS):
        return first
    tables = auto_tables()
    kinds = [str(config.get("model_type", ""))]
    kinds += [kind for table in tables.values() for kind, one in table.items() if one == first]
    table = tables.get(TABLES.get(name, ""), {})
    return next((table[kind] for kind in kinds if kind in table), first)


@cache
def auto_tables() -> Mapping[str, Mapping[str, str]]:
    """Return the tables of transformers' Auto classes by name: model_type -> class."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return MappingProxyType({})
    file = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    found = _TABLE.findall(file.read_text(encoding="utf-8"))
    return MappingProxyType({name: dict(_ENTRY.findall(body)) for name, body in found})


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
