"""Write small checkpoints with AdapterHub's own library, each with the outputs it computes.

Runs in an environment of its own, for ``adapters`` needs transformers 4:

    python -m venv ENV && ENV/bin/pip install adapters==1.3.0 torch
    ENV/bin/python tests/environments/adapterhub_write.py OUT

``OUT/bases/NAME`` are the base models, ``OUT/cases/NAME`` the checkpoints; beside a checkpoint's
files lies ``case.json`` (its base, its tasks in id order) and ``reference.npz``: the inputs, and
per task the logits (or hidden states) of all rows under that task, computed by the library in
float64 from what it saved in float32.

Every parameter is drawn at random, biases and norms included: the library's own initial
values (B = 0, equal mixing weights, zero biases) would hide most mistakes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
import transformers
from adapters import composition

ROWS, LENGTH, VOCABULARY, PAD = 5, 9, 61, 0
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", {}),
    "roberta": ("RobertaConfig", "RobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {"hidden_dim": 24}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
}
MTL = {"r": 3, "alpha": 5, "n_up_projection": 3, "weights_sharpness": 0.4, "init_weights": "bert"}
EVERYWHERE = {
    "attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True,
}  # fmt: skip


def main(out: Path) -> None:
    """Write all bases and cases below ``out``."""
    transformers.logging.set_verbosity_error()
    for number, (name, (config, model_class, extra)) in enumerate(BASES.items()):
        torch.manual_seed(number)
        model = getattr(transformers, model_class)(
            getattr(transformers, config)(**{**SIZES, **extra})
        )
        randomise(model, 0.25)
        model.save_pretrained(out / "bases" / name)
    for number, (name, write) in enumerate(CASES.items()):
        torch.manual_seed(100 + number)
        write(out, name)


def randomise(model: Any, size: float) -> None:
    """Draw every parameter anew; norms stay near one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn_like(parameter) * size
            parameter.copy_(values + 1.0 if "orm" in name and "weight" in name else values)


def randomise_trained(model: Any) -> None:
    """Draw what training would have changed, tied parameters once."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".m.weight"):
                parameter.mul_(1.0 + 0.3 * torch.randn_like(parameter))
            elif "loras." in name or "heads." in name or name.startswith(("classifier", "lm_head")):
                # A tied output layer goes by its embedding's name and so stays frozen.
                parameter.copy_(torch.randn_like(parameter) * 0.4 + 0.1)


def inputs_for(base: str) -> dict[str, torch.Tensor]:
    """Return seeded rows, padded on the right."""
    pad = BASES[base][2].get("pad_token_id", PAD)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([9, 4, 7, 9, 2])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if base in {"bert", "roberta"}:
        types = 2 if base == "bert" else 1
        inputs["token_type_ids"] = torch.randint(0, types, (ROWS, LENGTH), generator=generator)
    return inputs


def load(out: Path, base: str, model_class: str, **kwargs: Any) -> Any:
    """Return ``model_class`` on the base, ready for adapters."""
    owner = adapters if hasattr(adapters, model_class) else transformers
    model = getattr(owner, model_class).from_pretrained(out / "bases" / base, **kwargs)
    if owner is transformers:
        adapters.init(model)
    return model.eval()


def finish(
    out: Path,
    case: str,
    base: str,
    model: Any,
    tasks: list[str],
    *,
    save: str,
    output: str = "logits",
) -> None:
    """Save ``model`` the way ``save`` names, and what it answers."""
    folder = out / "cases" / case
    model.eval()
    if save == "setup":
        model.save_adapter_setup(str(folder), composition.MultiTask(*tasks))
    elif save == "whole":
        model.save_pretrained(folder, safe_serialization=False)
    else:
        model.save_all_adapters(str(folder), use_safetensors=save == "all_safetensors")
    inputs = inputs_for(base)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
    model.double()
    for task in tasks:
        model.set_active_adapters(task)
        head = {"head": task} if hasattr(model, "heads") else {}
        with torch.no_grad():
            arrays[f"{output}_{task}"] = model(**inputs, **head)[output].numpy()
    np.savez(folder / "reference.npz", **arrays)
    (folder / "case.json").write_text(
        json.dumps({"base": base, "tasks": tasks, "output": output, "save": save})
    )


def flex(
    base: str,
    model_class: str,
    heads: dict[str, dict[str, Any]],
    *,
    save: str = "setup",
    kind: str = "classification",
    config: Callable[[int], Any] = lambda index: adapters.MTLLoRAConfig(**MTL, **EVERYWHERE),
    share: bool = True,
) -> Callable[[Path, str], None]:
    """Return a case: one adapter and one flexible head per task."""

    def write(out: Path, case: str) -> None:
        model = load(out, base, model_class)
        for index, (task, settings) in enumerate(heads.items()):
            model.add_adapter(task, config=config(index))
            add = settings.pop("add", f"add_{kind}_head")
            getattr(model, add)(task, **settings)
        if share:
            model.share_parameters(list(heads))
        randomise_trained(model)
        finish(out, case, base, model, list(heads), save=save)

    return write


def static(
    base: str, model_class: str, *, save: str = "setup", output: str = "logits", **kwargs: Any
) -> Callable[[Path, str], None]:
    """Return a case: a transformers class with its own head, shared by all tasks."""

    def write(out: Path, case: str) -> None:
        model = load(out, base, model_class, **kwargs)
        tasks = ["zeta", "alpha", "mid"]
        for task in tasks:
            model.add_adapter(task, config=adapters.MTLLoRAConfig(**MTL, **EVERYWHERE))
        model.share_parameters(tasks)
        randomise_trained(model)
        finish(out, case, base, model, tasks, save=save, output=output)

    return write


def three(**settings: Any) -> dict[str, dict[str, Any]]:
    """Return three tasks with heads of three widths; the ids are not in alphabetical order."""
    return {
        "zeta": {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, **settings},
        "task1": {"num_labels": 4, **settings},
        "task10": {"num_labels": 1, **settings},
    }


LORAS = [
    lambda: adapters.LoRAConfig(r=4, alpha=6, init_weights="bert", **EVERYWHERE),
    lambda: adapters.LoRAConfig(r=2, alpha=7, attn_matrices=["q"], leave_out=[0]),
    lambda: adapters.LoRAConfig(r=3, alpha=3),
]
CASES: dict[str, Callable[[Path, str], None]] = {
    "bert_two_layers": flex("bert", "BertAdapterModel", three()),
    "bert_one_layer": flex("bert", "BertAdapterModel", three(layers=1), save="all"),
    "bert_three_layers": flex(
        "bert", "BertAdapterModel", three(layers=3, activation_function="gelu")
    ),
    "bert_pooler": flex("bert", "BertAdapterModel", three(layers=1, use_pooler=True)),
    "bert_pooler_two_layers": flex(
        "bert", "BertAdapterModel", three(use_pooler=True, activation_function="leakyrelu")
    ),
    "bert_multilabel": flex(
        "bert",
        "BertAdapterModel",
        {
            "a": {"num_labels": 3, "add": "add_classification_head", "multilabel": True},
            "b": {"num_labels": 2},
        },
    ),
    "bert_tagging": flex(
        "bert",
        "BertAdapterModel",
        {"a": {"num_labels": 3}, "b": {"num_labels": 5}},
        kind="tagging",
    ),
    "bert_tagging_two_layers": flex(
        "bert",
        "BertAdapterModel",
        {"a": {"num_labels": 3, "layers": 2}, "b": {"num_labels": 5, "layers": 2}},
        kind="tagging",
    ),
    "bert_whole": flex("bert", "BertAdapterModel", three(), save="whole"),
    "bert_unshared": flex("bert", "BertAdapterModel", three(), share=False),
    "bert_lora": flex(
        "bert", "BertAdapterModel", three(), config=lambda i: LORAS[i](), share=False, save="all"
    ),
    "bert_dora": flex(
        "bert",
        "BertAdapterModel",
        three(),
        share=False,
        save="all_safetensors",
        config=lambda i: adapters.DoRAConfig(r=3 + i, alpha=7, **EVERYWHERE),
    ),
    "bert_ia3": flex(
        "bert",
        "BertAdapterModel",
        three(),
        share=False,
        config=lambda i: adapters.IA3Config(alpha=1 + i),
    ),
    "bert_mixed": flex(
        "bert",
        "BertAdapterModel",
        three(),
        share=False,
        config=lambda i: [
            LORAS[0](),
            adapters.DoRAConfig(r=2, alpha=5),
            adapters.IA3Config(),
        ][i],
    ),
    "bert_static": static("bert", "BertForSequenceClassification", num_labels=3),
    "bert_static_whole": static(
        "bert", "BertForSequenceClassification", num_labels=3, save="whole"
    ),
    "bert_bare": static("bert", "BertModel", output="last_hidden_state"),
    "roberta_two_layers": flex("roberta", "RobertaAdapterModel", three()),
    "roberta_static": static("roberta", "RobertaForSequenceClassification", num_labels=3),
    "distilbert_two_layers": flex(
        "distilbert", "DistilBertAdapterModel", three(activation_function="relu")
    ),
    "llama_two_layers": flex("llama", "LlamaAdapterModel", three()),
    "llama_one_layer": flex("llama", "LlamaAdapterModel", three(layers=1)),
    "llama_causal": static("llama", "LlamaForCausalLM"),
    "llama_causal_tied": static("llama_tied", "LlamaForCausalLM"),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
