"""Write small checkpoints with PEFT itself, each with the outputs it computes.

Runs in an environment of its own, for PEFT is no dependency of the project:

    python -m venv ENV && ENV/bin/pip install peft==0.21.2 torch transformers
    ENV/bin/python tests/environments/peft_generate.py OUT

``OUT/bases/NAME`` are the base models, ``OUT/cases/NAME`` the checkpoints; beside a checkpoint's
files lies ``case.json`` (its base, its tasks in id order) and ``reference.npz``: the inputs, and
per task the logits of all rows under that task, which PEFT computes in float64 from the files,
loaded anew.

Every parameter is drawn at random, the frozen base included: PEFT's own initial values (B = 0)
would hide most mistakes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

ROWS, LENGTH, VOCABULARY, PAD = 5, 9, 61, 0
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", SIZES),
    "roberta": ("RobertaConfig", "RobertaModel", {**SIZES, "pad_token_id": 1}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {**SIZES, "hidden_dim": 24}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2}),
}
SEQ_CLS, TOKEN_CLS, CAUSAL_LM = "SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"
AUTO = {
    SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TOKEN_CLS: transformers.AutoModelForTokenClassification,
    CAUSAL_LM: transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint to write.

    Attributes:
        base: A key of ``BASES``.
        tasks: LoraConfig's arguments by task name, in id order.
        kind: PEFT's task_type.
        labels: Label counts, in id order.
        pickled: Tasks saved as ``adapter_model.bin``.
        is_together: All adapters are in one PeftModel, saved at once.
    """

    base: str
    tasks: dict[str, dict[str, Any]]
    kind: str = SEQ_CLS
    labels: Sequence[int] = (2, 4, 1)
    pickled: Sequence[str] = field(default=())
    is_together: bool = False


LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
EVERYWHERE = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}
CASES = {
    "lora": Case(
        "bert",
        {
            "zeta": LORA,
            "alpha": {**EVERYWHERE, "use_rslora": True, "rank_pattern": {"output.dense": 5},
                      "alpha_pattern": {r"layer\.1\.attention\.self\.key": 2}},
            "mid": {**LORA, "layers_to_transform": [1], "r": 2},
        },
        pickled=("mid",),
    ),
    "dora": Case("bert", {"a": {**EVERYWHERE, "use_dora": True}, "b": LORA}),
    "bias": Case(
        "bert",
        {"all": {**LORA, "bias": "all"}, "only": {**LORA, "bias": "lora_only"}, "none": LORA},
    ),
    "lora_bias": Case(
        "bert",
        {"a": {**LORA, "lora_bias": True}, "b": {**EVERYWHERE, "lora_bias": True, "bias": "all"},
         "c": {**LORA, "bias": "lora_only"}},
    ),
    "embeddings": Case(
        "bert",
        {
            "words": {**LORA, "target_modules": ["word_embeddings", "query"]},
            "positions": {**LORA, "r": 2, "use_dora": True,
                          "target_modules": ["position_embeddings", "word_embeddings", "key"]},
            "none": LORA,
        },
    ),
    "tokens": Case(
        "bert",
        {
            "dict": {**LORA, "trainable_token_indices": {"word_embeddings": [5, 60, 2]}},
            "list": {**LORA, "trainable_token_indices": [2, 7]},
            "none": LORA,
        },
    ),
    "whole": Case(
        "bert",
        {
            "pooler": {**LORA, "modules_to_save": ["pooler"]},
            "norm": {**LORA, "modules_to_save": ["attention.output.LayerNorm", "key"]},
            "words": {**LORA, "modules_to_save": ["word_embeddings"]},
        },
    ),
    "pissa": Case("bert", {"a": {**LORA, "init_lora_weights": "pissa"}, "b": LORA}),
    "olora": Case("bert", {"a": {**EVERYWHERE, "init_lora_weights": "olora"}, "b": LORA}),
    "kasa": Case(
        "bert", {"a": {**LORA, "kasa_config": peft.KasaConfig()}, "b": {**LORA, "use_dora": True}}
    ),
    "plain_inits": Case(
        "bert",
        {"mica": {**LORA, "init_lora_weights": "mica"},
         "orthogonal": {**LORA, "init_lora_weights": "orthogonal"},
         "gaussian": {**LORA, "init_lora_weights": "gaussian"}},
    ),
    "together": Case(
        "bert", {"default": LORA, "b": {**EVERYWHERE, "r": 2}, "a": {**LORA, "r": 5}},
        labels=(3, 3, 3), is_together=True,
    ),
    "alone": Case("bert", {"only": {**LORA, "trainable_token_indices": [3], "bias": "all"}}),
    "tagging": Case("bert", {"a": LORA, "b": {**LORA, "use_dora": True}}, TOKEN_CLS, (3, 5)),
    "roberta": Case("roberta", {"a": LORA, "b": {**LORA, "bias": "all"}}),
    "distilbert": Case("distilbert", {"a": {**LORA, "target_modules": ["q_lin", "lin1"]},
                                      "b": {**LORA, "target_modules": ["v_lin", "lin2"]}}),
    "gpt2": Case(
        "gpt2",
        {
            "lora": {**LORA, "target_modules": ["c_attn", "c_proj", "c_fc"]},
            "dora": {**LORA, "target_modules": ["c_attn", "c_proj"], "use_dora": True},
            "pissa": {**LORA, "target_modules": ["c_proj"], "init_lora_weights": "pissa"},
        },
    ),
    "gpt2_bias": Case(
        "gpt2",
        {
            "all": {**LORA, "target_modules": ["c_attn"], "bias": "all"},
            "whole": {**LORA, "target_modules": ["c_fc"], "modules_to_save": ["attn.c_proj"]},
            "words": {**LORA, "target_modules": ["wte", "c_fc"]},
        },
    ),
    "llama": Case(
        "llama",
        {
            "a": {**LORA, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
            "b": {**LORA, "target_modules": ["k_proj", "gate_proj"], "use_dora": True},
        },
    ),
    "llama_causal": Case(
        "llama",
        {
            "a": {**LORA, "target_modules": ["q_proj", "embed_tokens"]},
            "b": {**LORA, "target_modules": ["k_proj", "lm_head"]},
        },
        kind=CAUSAL_LM,
    ),
}  # fmt: skip
# Outputs of one graph that tasks cannot share; their merged models are tested alone.
MERGED_ONLY = {
    "gpt2_causal": Case(
        "gpt2",
        {"a": {**LORA, "target_modules": ["c_attn"],
               "trainable_token_indices": {"wte": [4, 9]}}},
        kind=CAUSAL_LM,
    ),
    "adapted_and_whole": Case(
        "bert", {"a": {**LORA, "target_modules": ["pooler.dense"]},
                 "b": {**LORA, "modules_to_save": ["pooler"]}},
    ),
}  # fmt: skip


def main(out: Path) -> None:
    """Write all bases and cases below ``out``."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    for number, (name, (config, model_class, settings)) in enumerate(BASES.items()):
        torch.manual_seed(number)
        model = getattr(transformers, model_class)(getattr(transformers, config)(**settings))
        randomise(model.named_parameters(), lambda name: True, 0.25)
        model.save_pretrained(out / "bases" / name)
    for number, (name, case) in enumerate({**CASES, **MERGED_ONLY}.items()):
        torch.manual_seed(100 + number)
        folder = out / "cases" / name
        write_together(out, folder, case) if case.is_together else write_apart(out, folder, case)
        arrays = {key: value.numpy() for key, value in inputs_for(case.base).items()}
        for index, task in enumerate(case.tasks):
            arrays[f"logits_{task}"] = answers(out, folder, case, index)
        np.savez(folder / "reference.npz", allow_pickle=False, **arrays)
        (folder / "case.json").write_text(
            json.dumps({"base": case.base, "tasks": list(case.tasks), "kind": case.kind})
        )


def randomise(parameters: Any, is_wanted: Callable[[str], bool], size: float) -> None:
    """Draw the wanted parameters anew; norms stay near one, DoRA's lengths near what they are."""
    with torch.no_grad():
        for name, parameter in parameters:
            if not is_wanted(name):
                continue
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.0 + 0.3 * torch.randn_like(parameter))
            else:
                is_norm = "weight" in name and ("orm" in name or ".ln_" in name)
                parameter.copy_(torch.randn_like(parameter) * size + (1.0 if is_norm else 0.0))


def base_for(out: Path, case: Case, index: int) -> Any:
    """Return the task's model before PEFT."""
    labels = {} if case.kind == CAUSAL_LM else {"num_labels": case.labels[index]}
    return AUTO[case.kind].from_pretrained(out / "bases" / case.base, **labels)


def config_for(case: Case, task: str) -> peft.LoraConfig:
    """Return the task's PEFT configuration."""
    return peft.LoraConfig(task_type=case.kind, **case.tasks[task])


def write_apart(out: Path, folder: Path, case: Case) -> None:
    """Save one folder per task; a single task is the folder itself."""
    for index, task in enumerate(case.tasks):
        model = peft.get_peft_model(base_for(out, case, index), config_for(case, task))
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        randomise(model.named_parameters(), lambda name: name in trained, 0.3)  # noqa: B023
        where = folder if len(case.tasks) == 1 else folder / task
        model.save_pretrained(where, safe_serialization=task not in case.pickled)


def write_together(out: Path, folder: Path, case: Case) -> None:
    """Save one model that has all adapters."""
    names = list(case.tasks)
    model = peft.get_peft_model(base_for(out, case, 0), config_for(case, names[0]))
    for task in names[1:]:
        model.add_adapter(task, config_for(case, task))
    ends = tuple(f".{task}{kind}" for task in names for kind in ("", ".weight", ".bias"))
    randomise(model.named_parameters(), lambda name: name.endswith(ends), 0.3)
    model.save_pretrained(folder)


def answers(out: Path, folder: Path, case: Case, index: int) -> np.ndarray:
    """Return the logits of PEFT with the task's files, loaded anew, in float64."""
    task = list(case.tasks)[index]
    is_root = len(case.tasks) == 1 or (case.is_together and task == "default")
    model = peft.PeftModel.from_pretrained(
        base_for(out, case, index), folder if is_root else folder / task
    )
    with torch.no_grad():
        logits: np.ndarray = model.eval().double()(**inputs_for(case.base)).logits.numpy()
    return logits


def inputs_for(base: str) -> dict[str, torch.Tensor]:
    """Return seeded rows, padded on the right."""
    pad = BASES[base][2]["pad_token_id"]
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=generator)
    ids[:, 0] = torch.tensor([5, 2, 60, 7, 9])  # tokens that some cases train
    lengths = torch.tensor([9, 4, 7, 9, 2])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if base in {"bert", "roberta"}:
        types = BASES[base][2].get("type_vocab_size", 2)
        inputs["token_type_ids"] = torch.randint(0, types, (ROWS, LENGTH), generator=generator)
    return inputs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
