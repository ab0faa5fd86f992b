"""What a checkpoint of no known layout looks like, from the names of its tensors: for an error that helps.

Nothing is decided here. A name in these tables is one that published files of the kind have and Vision Transformers of
the known layouts do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Table = dict[str, tuple[str, ...]]
"""What it looks like, with what to do where that is known -> patterns, each of which must be found in some name."""

BESIDE: Table = {
    "a LoRA or an adapter, which only changes another model (merge it into that model first)": (
        r"lora_(A|B|down|up|embedding)|\blora\.|hada_w|ia3_|(^|[._])adapters?[._]",
    ),
    "a quantised model (convert the original in full or half precision)": (
        r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_format|weight_scale)\b|\.quant_state|_packed_params",
    ),
    "the state of an optimizer (convert the model beside it)": (
        r"exp_avg|momentum_buffer|^param_groups$|^optimi[sz]er",
    ),
    "a masked autoencoder with its decoder (leave out the names with decoder, they are not needed for features)": (
        r"(^|\.)(decoder_(embed|blocks|pos_embed|pred)|decoder\.decoder_(layers|embed|pos_embed))\b",
    ),
    "a checkpoint of two networks (say which one to take, --branch teacher or --branch student)": (
        r"^(student|teacher)\S* \(outside ",
    ),
    "a Swin Transformer": (
        r"(layers|stages)\.\d+\.blocks\..*(relative_position_bias_table|cpb_mlp)|features\.\d+\.\d+\.attn\.relative_",
    ),
    "a BEiT or another model with learned biases of relative positions": (
        r"(^|\.)(blocks|layers?)\.\d+\.(.*\.)?relative_position_bias|rel_pos_bias\.relative_position_bias",
    ),
    "an EVA, whose attention has biases of its own, and perhaps rotary positions": (
        r"blocks\.\d+\.attn\.(q_bias|v_bias|inner_attn_ln|rope\.freqs)",
    ),
    "a Segment Anything (only its image encoder is a Vision Transformer, with windows and relative positions)": (
        r"(^|\.)(mask_decoder|prompt_encoder)\.|attn\.rel_pos_[hw]$",
    ),
}
"""What may also stand beside the tensors of a known layout, or within it."""

MODELS: Table = {
    "the index of a checkpoint in shards (give the folder that holds it)": (r"^weight_map$",),
    "the weights of a jaxvit model (give the folder that holds them and their config.json)": (
        r"^blocks\.attn\.qkv\.kernel$",
    ),
    "a Flax checkpoint of big_vision": (r"encoderblock(_\d+)?/|Transformer/encoder",),
    "a Keras or TensorFlow checkpoint": (r"(kernel|gamma|embeddings):0$|^_CHECKPOINTABLE_OBJECT_GRAPH$",),
    "a CLIP whose image side is a ResNet": (r"(^|\.)visual\.layer1\.0\.", r"(^|\.)visual\.attnpool\."),
    "a SigLIP as transformers writes it (timm's file of the same model is known)": (
        r"(^|\.)head\.probe$|^logit_bias$",
        r"(^|\.)(embeddings\.patch_embedding|text_model\.)",
    ),
    "a Stable Diffusion with all its parts": (r"^(model\.diffusion_model|first_stage_model)\.",),
    "a diffusion model's VAE": (r"encoder\.(down_blocks|down)\.\d", r"decoder\.(up_blocks|up)\.\d"),
    "a diffusion model's UNet": (r"(^|\.)(down_blocks|up_blocks|mid_block)\.", r"time_embedding"),
    "a diffusion Transformer": (r"adaLN_modulation|(^|\.)(transformer_blocks|double_blocks)\.\d",),
    "a ConvNeXt": (r"stages\.\d+\..*(dwconv|conv_dw|depthwise_conv)|features\.\d+\.\d+\.layer_scale$",),
    "an encoder of texts and images of another kind (BLIP, ImageBind ..)": (r"(^|\.)(qformer|modality_trunks)\.",),
    "a transformers ViT (timm's file of the same model is known)": (r"layernorm_before\.",),
    "torchvision's ViT (timm's file of a like model is known)": (r"encoder_layer_0\.", r"(^|\.)conv_proj\."),
    "a language model of BERT's kind": (r"embeddings\.word_embeddings",),
    "a language model of GPT's kind": (r"(^|\.)(wte|embed_in)\.weight$|(^|\.)h\.\d+\.attn\.c_attn\.",),
    "a language model of T5's kind": (r"(^|\.)layer\.0\.SelfAttention\.",),
    "a language model of Llama's kind": (
        r"(^|\.)(embed_tokens\.weight|tok_embeddings\.weight|input_layernorm\.weight)$",
    ),
    "the text side of a CLIP (its image side is what is converted)": (
        r"(^|\.)(token_embedding\.weight|text_projection(\.weight)?)$",
    ),
    "a ResNet": (r"(^|\.)(layer1\.0\.(conv1|conv2|0)|encoder\.stages\.0\.layers\.0\.layer\.0\.convolution)\.",),
    "a convolutional network, or another that normalises over batches": (r"running_mean$",),
}
"""More specific ones first."""


def describe_foreign(names: Iterable[str]) -> str:
    """A clause such as "a Swin Transformer (layers.0.blocks.0.attn.relative_position_bias_table)"; empty if unknown.

    Args:
      names: of the tensors, or a mapping from them.
    """
    return _first(BESIDE | MODELS, names)


def describe_foreign_extras(names: Iterable[str]) -> str:
    """The same of what is left over beside the tensors of a known layout."""
    return _first(BESIDE, names)


def _first(table: Table, names: Iterable[str]) -> str:
    names = list(names)
    for what, patterns in table.items():
        found = [next((name for name in names if re.search(pattern, name)), None) for pattern in patterns]
        if found[0] is not None and None not in found:
            return f"{what}, with its {found[0]}"
    return ""
