r"""PEFT's ``adapter_config.json`` for LoRA: what is refused, and each layer's scaling.

Rank and alpha of a module are those of the first pattern whose key matches
``(.*\.)?(KEY)$``, else ``r`` and ``lora_alpha``; s = alpha / r, or alpha / sqrt(r) with
``use_rslora``. ``target_modules`` and its companions select layers in training; the keys
of the weights say which layers there are, so they are not read here.

Source: https://github.com/huggingface/peft, release 0.21.2: ``tuners/lora/config.py``,
``tuners/lora/layer.py`` (update_layer), ``utils/other.py`` (get_pattern_key).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import process_time
from typing import Any

from mtl_export.checkpoint.files.json_file import Shape, json_or_none, misfit
from mtl_export.errors import AdapterError, CheckpointError, shortened

CONFIG_FILE = "adapter_config.json"
# What a release up to 0.21.2 writes; of anything else that is set the user is told.
KNOWN_FIELDS = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "enable_lora", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "merge_weights", "modules_to_save",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "use_rslora", "velora_config",
})  # fmt: skip
# Of what is read.
FIELDS: Shape = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern?": {str: int},
    "alpha_pattern?": {str: float},
    "trainable_token_indices?": ([int], {str: [int]}),
    "init_lora_weights?": (bool, str),
    "use_dora?": bool,
    "use_rslora?": bool,
    "kasa_config?": {},
    "task_type?": str,
    "auto_mapping?": {"base_model_class?": str},
    "base_model_name_or_path?": str,
}
# Variants whose weights are not W + s B A: field -> (name, why).
REFUSED_FIELDS = {
    "alora_invocation_tokens": (
        "aLoRA",
        "it adapts only the tokens after its invocation sequence, so no weight holds it",
    ),
    "arrow_config": ("Arrow", "it chooses among adapters by the input, not by the task"),
    "use_bdlora": ("BD-LoRA", "its factors are block-diagonal"),
    "use_qalora": ("QA-LoRA", "its A works on inputs pooled in groups"),
    "monteclora_config": ("MonteCLoRA", "its weights are samples of a distribution"),
    "velora_config": ("VeLoRA", "its forward pass has not been tested here"),
    "megatron_config": ("Megatron layers", "its weights are one rank's share of a layer"),
    "layer_replication": ("layer replication", "the trained model has more layers than the base"),
    "target_parameters": ("target_parameters", "it adapts fused experts, not linear layers"),
}
_CONVERT = (
    "Save it again with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER),"
    " where FOLDER holds the adapter as it was before training: PEFT then writes plain LoRA"
)
# init_lora_weights that leave the base alone. EVA and MiCA choose A or B, "orthogonal"
# makes B A zero, "gaussian" only draws A.
PLAIN_INITS = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica"})
# init_lora_weights that changed the base in a way that can be redone -> family.
REDONE_INITS = {"pissa": "pissa", "olora": "olora"}
# The others: why they cannot be redone, and what to do.
REFUSED_INITS = {
    "pissa_niter": ("a randomised SVD of the base was taken out of it", _CONVERT),
    "corda": ("a decomposition that needs the calibration data was taken out of the base",
              _CONVERT),
    "lora_ga": ("a decomposition of training gradients was taken out of the base", _CONVERT),
    "loftq": ("the base was replaced by a quantised copy of itself",
              "Save that base with save_pretrained, set init_lora_weights to true in the"
              " adapter_config.json and pass the saved base to --base"),
}  # fmt: skip


# An expression can take longer than anybody lives; whole models take milliseconds.
MATCHING_S = 2.0
MOST_PATTERNS, MOST_LETTERS = 10_000, 1_000


@dataclass(frozen=True)
class PeftConfig:
    """One adapter's ``adapter_config.json``.

    Attributes:
        path: The file.
        fields: Its object.
        left_s: Seconds that matching its patterns may still take, in a list of one.
    """

    path: Path
    fields: Mapping[str, Any]
    left_s: list[float] = field(default_factory=lambda: [MATCHING_S], compare=False, repr=False)

    @property
    def family(self) -> str:
        """Return the name of the family that computes the layers."""
        if self.fields.get("kasa_config"):
            return "kasa"
        redone = REDONE_INITS.get(_init_name(self.fields))
        if redone:
            return redone
        return "dora" if self.fields.get("use_dora") else "lora"

    @property
    def model_class(self) -> str:
        """Return the trained transformers class, or the Auto class to look it up with."""
        mapping = self.fields.get("auto_mapping")
        if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
            return str(mapping["base_model_class"])
        return AUTO_CLASSES.get(str(self.fields.get("task_type")), "")

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Return the fields of a newer PEFT that are set to anything."""
        return tuple(
            sorted(
                name for name, value in self.fields.items() if name not in KNOWN_FIELDS and value
            )
        )

    def rank(self, module: str) -> int:
        """Return r of ``module``."""
        return int(self._by_pattern("rank_pattern", module, self.fields["r"]))

    def alpha(self, module: str) -> float:
        """Return alpha of ``module``."""
        return self._by_pattern("alpha_pattern", module, self.fields["lora_alpha"])

    def scaling(self, module: str) -> float:
        """Return s of ``module``."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def token_indices(self, module: str) -> tuple[int, ...] | None:
        """Return which rows of the embedding ``module`` were trained, None if none were."""
        given = self.fields.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next(
                (ids for name, ids in given.items() if f".{module}".endswith(f".{name}")), None
            )
        return None if given is None else tuple(int(index) for index in given)

    def _by_pattern(self, name: str, module: str, default: float) -> float:
        patterns, begun = self.fields.get(name) or {}, process_time()
        try:
            for key, value in patterns.items():
                left_s = self.left_s[0] - (process_time() - begun)
                if left_s <= 0:
                    raise TimeoutError
                if _compiled(key).match(module, timeout=left_s):
                    return float(value)
        except TimeoutError as error:
            raise CheckpointError(
                f"{self.path}: {name}: {len(patterns):,} patterns that take more than "
                f"{MATCHING_S:g} s to match",
                expected="names of modules, or expressions that are matched at once",
                fix="Write the names of the modules instead",
            ) from error
        finally:
            self.left_s[0] -= process_time() - begun
        return float(default)


# task_type -> the Auto class with which PEFT's documentation loads the base. A class in its
# place is looked up in the base's config.json: see ``model_class``.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def peft_fields(folder: Path) -> dict[str, Any] | None:
    """Return the config in ``folder``, None unless there is one that PEFT wrote."""
    parsed = json_or_none(folder / CONFIG_FILE)
    return parsed if parsed and "peft_type" in parsed else None


def read_config(folder: Path) -> PeftConfig:
    """Return the config in ``folder``, once nothing in it has to be refused.

    Raises:
        AdapterError: It is not LoRA, or a variant whose weights are not W + s B A, or it
            started from a base that cannot be made again.
        CheckpointError: A field that the weights depend on is missing or of another type.
    """
    path = folder / CONFIG_FILE
    fields = peft_fields(folder) or {}
    if fields.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: PEFT method {fields.get('peft_type')!r}",
            expected="LORA, because other methods of PEFT are no low-rank delta of one weight",
            fix="Merge it with PEFT's merge_and_unload, if it can, and export that model",
        )
    for name, (title, why) in REFUSED_FIELDS.items():
        if fields.get(name):
            raise AdapterError(
                f"{path}: {name}: {title}, which cannot be exported: {why}",
                expected="LoRA, rsLoRA, DoRA, KaSA, PiSSA or OLoRA",
                fix="Train it again as one of these",
            )
    _check_types(path, fields)
    _check_init(path, fields)
    return PeftConfig(path, fields)


def _check_types(path: Path, fields: Mapping[str, Any]) -> None:
    wrong = misfit(dict(fields), FIELDS)
    problems = [wrong[0]] if wrong else _out_of_range(fields)
    if problems:
        raise CheckpointError(
            f"{path}: {shortened(problems)}",
            expected="what PEFT writes, because the scale of every delta is alpha / r",
            fix="Copy or save the adapter again",
        )


def _out_of_range(fields: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with values that are of the right type."""
    problems = [f"r is {fields['r']}"] if fields["r"] < 1 else []
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = fields.get(name) or {}
        problems += [f"{name} is {patterns}"] * any(value <= 0 for value in patterns.values())
        if len(patterns) > MOST_PATTERNS:
            problems.append(f"{name} has {len(patterns):,} keys, more than {MOST_PATTERNS:,}")
            continue
        problems += [
            f"{name} has the bad key {key!r:.80}" for key in patterns if not _compiles(key)
        ]
    tokens = fields.get("trainable_token_indices") or []
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    if not all(min(ids, default=0) >= 0 and len(set(ids)) == len(ids) for ids in lists):
        problems.append(f"trainable_token_indices is {tokens}")
    return problems


def _check_init(path: Path, fields: Mapping[str, Any]) -> None:
    name = _init_name(fields)
    for prefix, (why, fix) in REFUSED_INITS.items():
        if name.startswith(prefix):
            raise AdapterError(
                f"{path}: init_lora_weights {name!r}: an adapter of a base that is not the one you "
                f"have: {why}",
                expected="an adapter whose start can be computed again from base and config",
                fix=fix,
            )
    if name not in PLAIN_INITS and name not in REDONE_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights {name!r} is not known, and some change the base weight",
            expected=f"one of {', '.join(sorted(PLAIN_INITS | REDONE_INITS.keys()))}",
            fix=_CONVERT,
        )
    changes = [name] if name in REDONE_INITS else []
    changes += ["kasa_config"] if fields.get("kasa_config") else []
    changes += ["use_dora"] if fields.get("use_dora") else []
    if len(changes) > 1:
        raise AdapterError(
            f"{path}: {' together with '.join(changes)}",
            expected="one of them, because the combination has not been tested here",
            fix="Train with one of them",
        )


def _init_name(fields: Mapping[str, Any]) -> str:
    return str(fields.get("init_lora_weights", True)).lower()


@lru_cache(MOST_PATTERNS)
def _compiled(key: str) -> Any:
    import regex  # type: ignore[import-untyped]  # as re, with an end; transformers needs it too

    return regex.compile(rf"(.*\.)?({key})$")


def _compiles(key: str) -> bool:
    if len(key) > MOST_LETTERS:
        return False
    try:
        re.compile(rf"(.*\.)?({key})$")  # PEFT's own
        _compiled(key)
    except Exception:  # regex.error, OverflowError, RecursionError: {99999999999}, ((((...
        return False
    return True
