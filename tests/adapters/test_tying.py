"""One of several tied weights trained: the others stay, as PEFT computes it, in every path.

The truth is a torch model whose tied modules are taken apart and changed one by one, which is
what PEFT 0.21 does when it wraps one of them (compared with PEFT for these architectures).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.adapters.tying import FLAG_SAYS_MORE
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, UnusableBaseError
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.checkpoint import peft_toys as toys

WIDTH, VOCABULARY = 8, 23
SIZES: dict[str, dict[str, Any]] = {
    "Llama": {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "GPT2": {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "Bert": {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 16},
    "T5": {"d_model": WIDTH, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2,
           "decoder_start_token_id": 0},
    "Bart": {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
             "decoder_ffn_dim": 12, "max_position_embeddings": 16},
}  # fmt: skip
SIZES["Marian"] = SIZES["Bart"] | {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0,
                                   "decoder_start_token_id": 1}  # fmt: skip
CLASSES = {
    "Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM",
    "T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration",
    "Marian": "MarianMTModel",
}  # fmt: skip
TASK_TYPES = {"Bert": None} | dict.fromkeys(["T5", "Bart", "Marian"], "SEQ_2_SEQ_LM")
ADAPTED = {
    "Llama": "model.layers.0.self_attn.q_proj", "GPT2": "transformer.h.0.mlp.c_fc",
    "Bert": "bert.encoder.layer.0.attention.self.query",
    "T5": "encoder.block.0.layer.0.SelfAttention.q",
    "Bart": "model.encoder.layers.0.self_attn.q_proj",
    "Marian": "model.encoder.layers.0.self_attn.q_proj",
}  # fmt: skip
# How a forward pass scales its output where the flag is set.
SCALED = r"if self\.config\.tie_word_embeddings:\n(?: *#.*\n)* *\w+ = \w+ \* "
TEXT = np.random.default_rng(5).integers(3, VOCABULARY, (2, 6))
# architecture -> the tied modules, one of which is trained
CASES = [
    ("Llama", ["model.embed_tokens"]), ("Llama", ["lm_head"]),
    ("Llama", ["model.embed_tokens", "lm_head"]), ("GPT2", ["transformer.wte"]),
    ("Bert", ["bert.embeddings.word_embeddings"]), ("Bert", ["cls.predictions.decoder"]),
    ("T5", ["encoder.embed_tokens", "decoder.embed_tokens"]), ("T5", ["decoder.embed_tokens"]),
    ("T5", ["lm_head"]), ("Bart", ["model.encoder.embed_tokens", "model.decoder.embed_tokens"]),
]  # fmt: skip


def base_of(kind: str, folder: Path, **settings: Any) -> Any:
    """Write a seeded base; return the model."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": VOCABULARY, **SIZES[kind], **settings}
    )
    with quiet_transformers():
        model = getattr(transformers, CLASSES[kind])(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        model.save_pretrained(folder)
    return model


def bound_to(folder: Path, tensors: Mapping[str, Array], kind: str, **fields: Any) -> BoundModel:
    """Return an adapter of these tensors bound to the base in ``folder``."""
    fields = {"task_type": TASK_TYPES.get(kind, "CAUSAL_LM"), "modules_to_save": None, **fields}
    checkpoint = open_checkpoint(toys.write(folder / "adapter", tensors, fields))
    base = open_base(str(folder / "base"))
    return bind(checkpoint, read_adapters(checkpoint, base), base)


def lora(model: Any, module: str, generator: np.random.Generator) -> dict[str, Array]:
    """Return LoRA of a linear layer or an embedding."""
    rows, columns = model.get_submodule(module).weight.shape
    if isinstance(model.get_submodule(module), torch.nn.Embedding):
        names, outputs, inputs = ("lora_embedding_A", "lora_embedding_B"), columns, rows
    else:
        names, outputs, inputs = ("lora_A.weight", "lora_B.weight"), rows, columns
        if "Conv1D" in type(model.get_submodule(module)).__name__:
            outputs, inputs = inputs, outputs
    return {
        f"{module}.{names[0]}": toys.draw(generator, 2, inputs),
        f"{module}.{names[1]}": toys.draw(generator, outputs, 2),
    }


def take_apart(model: Any, module: str, change: torch.Tensor, *, whole: bool) -> None:
    """Give ``module`` a weight of its own: ``change``, or the old one and ``change``."""
    layer = model.get_submodule(module)
    new = change if whole else layer.weight.detach() + change
    layer.weight = torch.nn.Parameter(new.clone())


def add_lora(model: Any, module: str, tensors: Mapping[str, Array]) -> None:
    """Add the delta of the adapter's ``tensors`` at alpha 6 and rank 2."""
    down, up = (torch.from_numpy(v) for n, v in tensors.items() if n.startswith(f"{module}.lora"))
    delta = 3.0 * up @ down
    shape = model.get_submodule(module).weight.shape
    is_square_embedding = isinstance(model.get_submodule(module), torch.nn.Embedding)
    take_apart(
        model, module, delta.T if is_square_embedding or delta.shape != shape else delta,
        whole=False,
    )  # fmt: skip


def logits_of(model: Any, kind: str) -> Array:
    """Return the model's answer to ``TEXT``."""
    ids = torch.from_numpy(TEXT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if TASK_TYPES.get(kind) == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        answer: Array = model(**inputs).logits.numpy()
    return answer


def check(bound: BoundModel, kind: str, expected: Array, folder: Path) -> dict[str, Any]:
    """Hold merged folder and oracle against ``expected``; return the merged config."""
    folder.mkdir()
    write_merged(bound, bound.adapters.tasks[0], folder)
    with quiet_transformers():
        model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
            folder, output_loading_info=True
        )
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (set(), set())
    np.testing.assert_allclose(logits_of(model.eval(), kind), expected, atol=2e-5)
    inputs = {"input_ids": TEXT, "attention_mask": np.ones_like(TEXT), "task_ids": TEXT[:, 0] * 0}
    if TASK_TYPES.get(kind) == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = TEXT[:, :4]
    with OracleRunner(bound, "fp64") as oracle:
        np.testing.assert_allclose(oracle.infer(inputs)["logits"], expected, atol=2e-5)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(("kind", "modules"), CASES)
def test_a_saved_module_leaves_those_that_it_was_tied_to(
    kind: str, modules: list[str], tmp_path: Path
) -> None:
    """modules_to_save on some of several tied weights: the others keep the base's."""
    model = base_of(kind, tmp_path / "base")
    generator = np.random.default_rng(7)
    tensors = lora(model, ADAPTED[kind], generator)
    add_lora(model, ADAPTED[kind], tensors)
    for module in modules:
        own = toys.draw(generator, VOCABULARY, WIDTH)
        tensors[f"{module}.weight"] = own
        take_apart(model, module, torch.from_numpy(own), whole=True)
        if module == "cls.predictions.decoder":
            bias = toys.draw(generator, VOCABULARY)
            tensors[f"{module}.bias"] = bias
            model.get_submodule(module).bias = torch.nn.Parameter(torch.from_numpy(bias))
    bound = bound_to(tmp_path, tensors, kind)
    config = check(bound, kind, logits_of(model, kind), tmp_path / "merged")
    assert config.get("tie_word_embeddings", True) is (kind == "T5")


@pytest.mark.parametrize(
    ("kind", "module"),
    [("Llama", "model.embed_tokens"), ("Llama", "lm_head"), ("GPT2", "transformer.wte"),
     ("Bert", "bert.embeddings.word_embeddings"), ("Bert", "cls.predictions.decoder"),
     ("T5", "encoder.embed_tokens"), ("T5", "lm_head"), ("Bart", "lm_head")],
)  # fmt: skip
def test_lora_on_one_of_tied_weights_changes_that_one(
    kind: str, module: str, tmp_path: Path
) -> None:
    """The delta is added to one of them; the others keep the base's."""
    model = base_of(kind, tmp_path / "base")
    generator = np.random.default_rng(8)
    adapted = {name: lora(model, name, generator) for name in (ADAPTED[kind], module)}
    for name, tensors in adapted.items():
        add_lora(model, name, tensors)
    tensors = {key: value for own in adapted.values() for key, value in own.items()}
    check(bound_to(tmp_path, tensors, kind), kind, logits_of(model, kind), tmp_path / "merged")


def test_a_vocabulary_as_wide_as_an_adapted_layer_is_no_output_layer(tmp_path: Path) -> None:
    """The model stays tied, and nothing of it is left to chance."""
    model = base_of("Llama", tmp_path / "base", intermediate_size=VOCABULARY)
    module = "model.layers.0.mlp.up_proj"
    tensors = lora(model, module, np.random.default_rng(9))
    add_lora(model, module, tensors)
    bound = bound_to(tmp_path, tensors, "Llama")
    config = check(bound, "Llama", logits_of(model, "Llama"), tmp_path / "merged")
    assert config["tie_word_embeddings"] is True


def test_a_base_that_stores_both_and_says_tied_is_untied_where_they_differ(tmp_path: Path) -> None:
    """Transformers 4.57 would overwrite one of them, whatever the adapter touched."""
    model = base_of("Llama", tmp_path / "base", tie_word_embeddings=False)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    tensors = lora(model, ADAPTED["Llama"], np.random.default_rng(10))
    add_lora(model, ADAPTED["Llama"], tensors)
    bound = bound_to(tmp_path, tensors, "Llama")
    config = check(bound, "Llama", logits_of(model, "Llama"), tmp_path / "merged")
    assert config["tie_word_embeddings"] is False


def test_trained_rows_beside_a_tied_bias_are_refused(tmp_path: Path) -> None:
    """PEFT leaves BERT's output bias out while it trains rows: no model can do that."""
    module = "bert.embeddings.word_embeddings"
    tensors = {f"{module}.token_adapter.trainable_tokens_delta": np.ones((1, WIDTH), np.float32)}
    model = base_of("Bert", tmp_path / "base")
    tensors |= lora(model, ADAPTED["Bert"], np.random.default_rng(11))
    with pytest.raises(UnusableBaseError, match=r"cls\.predictions\.decoder"):
        bound_to(tmp_path, tensors, "Bert", trainable_token_indices=[3])


@pytest.mark.parametrize(
    ("kind", "module"),
    [("Bart", "model.encoder.embed_tokens"), ("T5", "decoder.embed_tokens"), ("Llama", "lm_head"),
     ("Marian", "model.shared")],
)  # fmt: skip
def test_rows_that_peft_gives_to_one_of_several_tied_weights_are_refused(
    kind: str, module: str, tmp_path: Path
) -> None:
    """PEFT spreads the rows of what get_input_embeddings returns, Marian's encoder's; no others."""
    tensors = {f"{module}.token_adapter.trainable_tokens_delta": np.ones((1, WIDTH), np.float32)}
    model = base_of(kind, tmp_path / "base")
    tensors |= lora(model, ADAPTED[kind], np.random.default_rng(11))
    with pytest.raises(UnusableBaseError, match="to that one weight alone"):
        bound_to(tmp_path, tensors, kind, trainable_token_indices={module: [3]})


def test_rows_that_are_the_bases_own_change_nothing(tmp_path: Path) -> None:
    """Marian never calls its shared embedding, and what PEFT writes of it is what it was."""
    module = "model.shared"
    base_of("Marian", tmp_path / "base")
    with quiet_transformers():  # positions are no parameters of its files
        model = transformers.MarianMTModel.from_pretrained(tmp_path / "base").eval()
    own = model.get_submodule(module).weight[[3]].detach().numpy()
    tensors = lora(model, ADAPTED["Marian"], np.random.default_rng(12))
    add_lora(model, ADAPTED["Marian"], tensors)
    tensors[f"{module}.token_adapter.trainable_tokens_delta"] = own
    bound = bound_to(tmp_path, tensors, "Marian", trainable_token_indices={module: [3]})
    check(bound, "Marian", logits_of(model, "Marian"), tmp_path / "merged")


def test_lengths_of_a_tied_head_say_that_the_base_has_no_such_tensor(tmp_path: Path) -> None:
    """DoRA on lm_head: the base was given, it ties; the advice is a base that does not."""
    model = base_of("Llama", tmp_path / "base")
    tensors = lora(model, "lm_head", np.random.default_rng(13))
    tensors["lm_head.lora_magnitude_vector"] = np.ones(VOCABULARY, np.float32)
    with pytest.raises(BaseModelError, match="tie_word_embeddings = False"):
        bound_to(tmp_path, tensors, "Llama", use_dora=True)


def test_the_flag_stays_where_transformers_reads_more_from_it() -> None:
    """Every modeling file whose forward pass scales by it, and every config that forces it."""
    models = Path(transformers.__file__).parent / "models"
    scaling = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if re.search(SCALED, path.read_text())
    }
    forced = {
        path.parent.name
        for path in models.glob("*/configuration_*.py")
        if "scale_decoder_outputs = " in (text := path.read_text())
        or 'kwargs.pop("tie_word_embeddings", None)\n        self.tie_word_embeddings = True'
        in text
    }
    assert {"switch_transformers"} <= scaling | forced <= FLAG_SAYS_MORE
