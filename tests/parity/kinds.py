"""Tiny models of many kinds, seeded, each with a PEFT adapter of two tasks: bases on the fly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mtl_export.adapters.modules.base import quiet_transformers

TASKS, RANK = ("alpha", "beta"), 2
SMALL: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
# kind -> class, config of transformers, settings of it, names of the layers that are adapted
KINDS: Mapping[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL, ("q_proj", "v_proj")),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {**SMALL, "query_pre_attn_scalar": 8, "sliding_window": 16}, ("q_proj", "v_proj"),
    ),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig",
        {**SMALL, "num_local_experts": 3}, ("q_proj", "v_proj"),
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {"vocab_size": 48, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 128, "word_embed_proj_dim": 16,
         "pad_token_id": 1}, ("q_proj", "v_proj"),
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128,
         "bos_token_id": 1, "eos_token_id": 2}, ("c_attn",),
    ),
    "bloom": (
        "BloomForCausalLM", "BloomConfig",
        {"vocab_size": 56, "hidden_size": 16, "n_layer": 2, "n_head": 2}, ("query_key_value",),
    ),
    "t5gemma": (
        "T5GemmaForConditionalGeneration", "T5GemmaConfig",
        {"encoder": {**SMALL, "query_pre_attn_scalar": 8, "sliding_window": 16},
         "decoder": {**SMALL, "query_pre_attn_scalar": 8, "sliding_window": 16},
         "vocab_size": 48, "tie_word_embeddings": True}, ("q_proj", "v_proj"),
    ),
    "mamba": (
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 48, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        ("in_proj", "x_proj"),
    ),
    "xlstm": (
        "xLSTMForCausalLM", "xLSTMConfig",
        {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2,
         "chunk_size": 8}, ("mlstm_layer.q", "mlstm_layer.v"),
    ),
    "llama_classifier": (
        "LlamaForSequenceClassification", "LlamaConfig",
        {**SMALL, "pad_token_id": None, "num_labels": 3}, ("q_proj", "v_proj"),
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": 64, "num_mel_bins": 8, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "d_model": 16, "max_source_positions": 20,
         "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None},
        ("q_proj", "v_proj"),
    ),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": {**SMALL, "max_position_embeddings": 32}, "vision_config": VISION,
         "projection_dim": 12}, ("q_proj", "v_proj"),
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "conv_dim": [8, 8], "conv_stride": [5, 2],
         "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_labels": 3},
        ("q_proj", "v_proj"),
    ),
    "ast": (
        "ASTForAudioClassification", "ASTConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_length": 32, "num_mel_bins": 16, "num_labels": 3},
        ("query", "value", "q_proj", "v_proj"),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16],
         "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [7, 3],
         "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8, "num_labels": 5},
        ("query", "value", "q_proj", "v_proj"),
    ),
    "detr": (
        "DetrForObjectDetection", "DetrConfig",
        {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
         "backbone_config": {"model_type": "resnet", "embedding_size": 8,
                             "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic",
                             "out_features": ["stage2"]},
         "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
         "num_queries": 5, "num_labels": 3}, ("q_proj", "v_proj"),
    ),
    "rtdetr": (
        "RTDetrForObjectDetection", "RTDetrConfig",
        {"use_timm_backbone": False, "backbone": None,
         "backbone_config": {"model_type": "rt_detr_resnet", "embedding_size": 8,
                             "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
                             "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
         "encoder_in_channels": [8, 8, 8], "encoder_hidden_dim": 16, "d_model": 16,
         "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
         "num_queries": 5, "num_denoising": 0, "num_labels": 3, "hidden_expansion": 1.0,
         "decoder_in_channels": [16, 16, 16]},
        ("q_proj", "v_proj"),
    ),
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {"model_type": "llama", **SMALL},
         "vision_config": {"model_type": "clip_vision_model", **VISION},
         "image_token_index": 47, "image_token_id": 47, "image_seq_length": 4},
        ("q_proj", "v_proj"),
    ),
}  # fmt: skip


def write_kind(kind: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Write the base of a kind and an adapter of two tasks; return the folders of both.

    Args:
        kind: One of ``KINDS``.
        folder: Holds both.
        changes: Of the settings of its config.
    """
    import transformers

    class_name, config_name, settings, targets = KINDS[kind]
    config = getattr(transformers, config_name)(**{**settings, **changes})
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        model = getattr(transformers, class_name)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Many kinds start with weights of 0.02, and a fault would be lost in noise.
                if parameter.ndim > 1 and ("bbox" in name or "embed" not in name):
                    parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
        model.save_pretrained(folder / "base")
    layers = {
        name: tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if name.endswith(targets) and getattr(layer, "weight", None) is not None
    }
    is_turned = kind == "gpt2"  # transformers' Conv1D keeps [I, O]
    adapters = folder / "adapters"
    for seed, task in enumerate(TASKS):
        _write_adapter(adapters / task, layers, targets, seed, is_turned)
    return folder / "base", adapters


def _write_adapter(
    folder: Path,
    layers: Mapping[str, tuple[int, ...]],
    targets: tuple[str, ...],
    seed: int,
    is_turned: bool,
) -> None:
    """Write one task as PEFT's ``save_pretrained`` does."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in layers.items():
        wide, narrow = reversed(shape) if is_turned else shape
        for piece, size in (("A", (RANK, narrow)), ("B", (wide, RANK))):
            value = (generator.normal(size=size) * 0.3).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_{piece}.weight"] = value
    config = {
        "peft_type": "LORA", "task_type": None, "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": list(targets), "bias": "none", "fan_in_fan_out": is_turned,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def change_weight(folder: Path, layer: str) -> None:
    """Make a column of a layer's weight in a merged folder a twentieth larger.

    All of it would be no fault before a norm, which takes sizes away.
    The folder's own hashes are left as they are: a runner loads it as it lies there.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = [one for one in tensors if one.endswith(f"{layer}.weight")]
    tensors[name] = tensors[name].copy()
    tensors[name][:, 0] *= np.float32(1.05)
    save_file(tensors, file, metadata={"format": "pt"})
