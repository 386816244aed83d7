"""VL-BART: a BART that reads text and image regions, and writes text.

    E = [ LN(token + position) ; feature + box + image order + region order ]    encoder input

transformers has no such class, so merged folders of VL-BART checkpoints load into this one:

    VLBart.from_pretrained(folder)

Parameter names are those of the class VLBart in the trainers' repositories, which load a
merged folder's tensors by name. Source of the architecture: Cho et al., "Unifying
Vision-and-Language Tasks via Text Generation", ICML 2021, arXiv:2102.02779, section 3, and
https://github.com/pUmpKin-Co/MTL-LoRA/blob/7848a70/image_text_understanding/VL-T5/src/modeling_bart.py.

With ``downsample`` in its config it pools each image's features first (``region_pooling``).

Not done: training, and flash attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, BartModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder, BartScaledWordEmbedding

from mtl_export.adapters.modules.region_pooling import pooled_mask, pooled_regions
from mtl_export.checkpoint.tensors import Tensor


class VisualEmbedding(nn.Module):
    """What stands for an image region in the encoder's input.

    v = f(features) + p(x1, x2, y1, y2, area) + image order + region order, with f and p
    linear, each followed by a LayerNorm of its own, or one LayerNorm over the sum, or none.
    Region i has the embedding of the i-th token from the vocabulary's end.

    Args:
        config: With ``feat_dim``, ``pos_dim``, ``n_images`` and where the LayerNorms are.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.d_model
        individual = config.use_vis_layer_norm and config.individual_vis_layer_norm

        def part(size: int) -> nn.Sequential:
            norms = [nn.LayerNorm(width)] if individual else []
            return nn.Sequential(nn.Linear(size, width), *norms)

        self.feat_embedding = part(config.feat_dim)
        self.absolute_vis_pos_embedding = part(config.pos_dim + 1)
        # Tied to the token embedding by the model.
        self.obj_order_embedding = nn.Embedding(config.vocab_size, width)
        self.img_order_embedding = nn.Embedding(config.n_images, width)
        one_norm = config.use_vis_layer_norm and not individual
        self.layer_norm = nn.LayerNorm(width) if one_norm else nn.Identity()

    def forward(
        self,
        vis_feats: torch.Tensor,
        boxes: torch.Tensor,
        img_order_ids: torch.Tensor | None = None,
        obj_order_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return one vector per region.

        Args:
            vis_feats: ``[B, V, F]``, any floating dtype.
            boxes: ``[B, V, 4]``: x1, x2, y1, y2.
            img_order_ids: int64 ``[B, V]``: which image a region is of; the first by default.
            obj_order_ids: int64 ``[B, V]``: the region's number; 0 to V - 1 by default.
        """
        vis_feats, boxes = (x.to(self.img_order_embedding.weight.dtype) for x in (vis_feats, boxes))
        regions = torch.arange(vis_feats.shape[1], device=vis_feats.device)[None]
        images = torch.zeros_like(regions) if img_order_ids is None else img_order_ids
        numbers = regions if obj_order_ids is None else obj_order_ids
        x1, x2, y1, y2 = boxes.unbind(-1)
        area = (y2 - y1) * (x2 - x1)
        summed: torch.Tensor = (
            self.feat_embedding(vis_feats)
            + self.absolute_vis_pos_embedding(torch.cat([boxes, area[..., None]], dim=-1))
            + self.img_order_embedding(images)
            + self.obj_order_embedding(self.obj_order_embedding.num_embeddings - numbers - 1)
        )
        normed: torch.Tensor = self.layer_norm(summed)
        return normed


class JointEncoder(BartEncoder):
    """A BART encoder whose input is text followed by image regions."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        vis_feats: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        img_order_ids: torch.Tensor | None = None,
        obj_order_ids: torch.Tensor | None = None,
        vis_attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Return the encoder's hidden states, ``[B, S + V, d]``."""
        hidden = self.embed_tokens(input_ids) + self.embed_positions(input_ids)
        hidden = self.layernorm_embedding(hidden)
        if attention_mask is None:
            attention_mask = text_mask(input_ids, self.config)
        region_mask = mask_of_regions(self.config, img_order_ids, vis_attention_mask)
        if vis_feats is not None:
            if boxes is None:
                boxes = vis_feats.new_zeros(*vis_feats.shape[:2], 4)
            if is_pooled(self.config):
                vis_feats, boxes, img_order_ids, obj_order_ids = pooled_regions(
                    self.config, vis_feats, boxes, img_order_ids, obj_order_ids, vis_attention_mask
                )
            regions = self.visual_embedding(vis_feats, boxes, img_order_ids, obj_order_ids)
            hidden = torch.cat([hidden, regions], dim=1)
        mask = joint_mask(attention_mask, region_mask, hidden.shape[1])
        lowest = torch.finfo(hidden.dtype).min
        added = (1 - mask[:, None, None, :].to(hidden.dtype)) * lowest
        for layer in self.layers:
            hidden = layer(hidden, added)
        return BaseModelOutput(last_hidden_state=hidden)


def text_mask(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Return what counts as a token where no mask is given: all but padding."""
    return torch.ne(input_ids, config.pad_token_id)


def is_pooled(config: Any) -> bool:
    """Return whether the model pools features; folders written before it could say nothing."""
    return bool(getattr(config, "downsample", False))


def mask_of_regions(
    config: Any, img_order_ids: torch.Tensor | None, vis_attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the mask of the regions that the encoder reads; None where every one counts."""
    if not is_pooled(config):
        return vis_attention_mask
    return pooled_mask(config, img_order_ids, vis_attention_mask)


def joint_mask(text: torch.Tensor, regions: torch.Tensor | None, length: int) -> torch.Tensor:
    """Return the mask of text and regions together, int64 ``[B, length]``.

    Args:
        text: ``[B, S]``, 1 for a token; already the joint mask if S is ``length``.
        regions: ``[B, length - S]``; None where every region counts.
        length: S + V.
    """
    text = text.to(torch.int64)
    if text.shape[1] == length:
        return text
    if regions is None:
        regions = text.new_ones(text.shape[0], length - text.shape[1])
    return torch.cat([text, regions.to(torch.int64)], dim=1)


class _JointModel(BartModel):
    _tied_weights_keys = {  # noqa: RUF012
        **BartModel._tied_weights_keys,
        "encoder.visual_embedding.obj_order_embedding.weight": "shared.weight",
    }

    def __init__(self, config: Any) -> None:
        super(BartModel, self).__init__(config)
        scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.shared = BartScaledWordEmbedding(
            config.vocab_size, config.d_model, config.pad_token_id, embed_scale=scale
        )
        self.encoder = JointEncoder(config)
        self.decoder = BartDecoder(config)
        self.post_init()  # type: ignore[no-untyped-call]


class VLBart(BartForConditionalGeneration):
    """A BART for conditional generation with a joint encoder.

    Args:
        config: A BART's, with ``feat_dim`` F, ``pos_dim``, ``n_images``,
            ``use_vis_layer_norm``, ``individual_vis_layer_norm``, ``downsample`` and
            ``n_boxes``.

    Shape:
        input_ids int64 ``[B, S]``, vis_feats ``[B, V, F]``, boxes ``[B, V, 4]``,
        decoder_input_ids int64 ``[B, D]``; logits ``[B, D, vocabulary]``. Without vis_feats
        it is a plain BART.
    """

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: Any) -> None:
        super(BartForConditionalGeneration, self).__init__(config)
        self.model = _JointModel(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_tensors(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> VLBart:
        """Return the model with these values, in eval mode.

        Raises:
            RuntimeError: A parameter that is not tied is missing, or one too many.
        """
        model: Any = cls(BartConfig.from_dict(dict(config)))
        model = model.to(dtype)
        state = {name: torch.from_numpy(tensor.widened()) for name, tensor in tensors.items()}
        tied = {name: state["model.shared.weight"] for name in model.all_tied_weights_keys}
        model.load_state_dict({**state, **tied})
        model.tie_weights()
        done: VLBart = model.eval()
        return done

    def encoded(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        vis_attention_mask: torch.Tensor,
        **regions: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the encoder's states and the mask of text and regions, for a graph."""
        states = self.model.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            vis_attention_mask=vis_attention_mask,
            **regions,
        ).last_hidden_state
        orders = regions.get("img_order_ids")
        region_mask = mask_of_regions(self.config, orders, vis_attention_mask)
        mask = joint_mask(attention_mask, region_mask, states.shape[1])
        return {"last_hidden_state": states, "encoder_attention_mask": mask}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vis_feats: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        img_order_ids: torch.Tensor | None = None,
        obj_order_ids: torch.Tensor | None = None,
        vis_attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        **others: Any,
    ) -> Any:
        """Return the transformers output; ``others`` as ``BartForConditionalGeneration``'s."""
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                vis_feats=vis_feats,
                boxes=boxes,
                img_order_ids=img_order_ids,
                obj_order_ids=obj_order_ids,
                vis_attention_mask=vis_attention_mask,
            )
        if attention_mask is None and input_ids is not None:
            attention_mask = text_mask(input_ids, self.config)
        if attention_mask is not None:
            length = encoder_outputs[0].shape[1]
            region_mask = mask_of_regions(self.config, img_order_ids, vis_attention_mask)
            attention_mask = joint_mask(attention_mask, region_mask, length)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=encoder_outputs,
            **others,
        )
