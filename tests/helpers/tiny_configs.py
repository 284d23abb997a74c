"""Small configurations of Transformers' models, by the names of their fields; what `model_sweep.py` builds from."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCAB, HIDDEN, HEADS, HEAD_DIM, LAYERS, INNER, LENGTH = 33, 32, 4, 8, 2, 64, 64
PAD, BOS, EOS = 0, 1, 2
FIRST, LAST = 3, 28  # ordinary tokens; what is above marks images, sounds and the like
_AUXILIARY = 0.1  # a coefficient large enough for a dropped loss term to show

# the first pattern that matches decides; an integer is only ever made smaller
_SIZES: list[tuple[str, int]] = [
    (r"hidden_size_per_layer_input|laurel_rank|ple_embed_dim", 8),
    (r"(.*_)?vocab_size(_per_layer_input)?|num_hash_buckets|encoder_hash_byte_group_vocab", VOCAB),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"linear_num_key_heads", 2),
    (r"(.*_)?(head_dim|d_kv|d_head|dim_head|head_size|kv_channels|mamba_headdim|rotary_dim)", HEAD_DIM),
    (r"(.*_)?lora_rank|.*_rank|mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_n_groups|mamba_ngroups|n_groups|n_group|topk_group|num_expert_group|.*shared_experts", 1),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", 2),
    (r"(.*_)?(heads|head)", HEADS),
    (r"(en|de)coder_sparse_step", 2),
    (r"(.*_)?(num_experts_per_tok(en)?|moe_top_?k|moe_k)", 2),
    (r"(.*_)?(num_experts|num_local_experts|n_routed_experts|zero_expert_num)", 4),
    (r"(num_|n_|.*_)?(layers|layer|depth|num_blocks)|num_layers_per_stack|num_self_attends_per_block", LAYERS),
    (
        r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|d_inner|mlp_dim|mlp_hidden_size)",
        INNER,
    ),
    (r"shared_intermediate_size|feed_forward_size|mamba_d_ssm", INNER),
    (r"(.*_)?(max_.*position.*|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions)", LENGTH),
    (r"(.*_)?(sliding_window(_size)?|window_size|attention_window(_size)?|local_attention|attention_chunk_size)", 16),
    (r"chunk_size|(.*_)?(mamba_chunk_size|segment_means_seq_len|num_landmarks|block_multiple_of)", 16),
    (
        r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|embedding_dim|entity_emb_size"
        r"|word_embed_proj_dim|lru_width|hidden_size_global|output_dim|d_latents|intra_bottleneck_size)",
        HIDDEN,
    ),
    (r"image_size|input_size|crop_size", 28),
]
_TOKENS = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": BOS, "sep": EOS, "forced_eos": EOS, "forced_bos": BOS}
_TOKEN = re.compile(r"(.*?)_?(token_id|token_index|pad_id|token_ids)|(pad|bos|eos|mask|unk)_index")
_DROPOUT = re.compile(r".*(drop|jitter|mask_time_prob|mask_feature_prob).*")
_COEFFICIENT = re.compile(r".*(aux_loss_coef|z_loss_coef|z_loss_coefficient|moe_loss_weight|aux_loss_alpha).*")
# one entry a layer: recomputed from the number of layers where they are left out
_PER_LAYER = re.compile(
    r"(.*_)?(layer_types|layers_block_type|indexer_types|no_rope_layers|moe_layers|attention_layers|full_attn_idxs"
    r"|layer_rope_theta|num_attention_heads_per_layer|hybrid_layer_ids|activation_sparsity_pattern|qk_head_dim"
    r"|id2label|label2id|num_labels|_.*|transformers_version|model_type|dtype|architectures)"
)

# fields of classes that the patterns don't get right
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_START = {"decoder_start_token_id": BOS}
_UNROUTED = {"output_router_logits": False}  # Transformers 5.17 does not collect what the loss then needs
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "BrosConfig": {"hidden_size": 64},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "DbrxConfig": {"output_router_logits": False, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "DeepseekV4Config": {"mlp_layer_types": ["moe", "moe"]},
    "DogeConfig": _UNROUTED,
    "Dots1Config": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "EsmConfig": {"vocab_size": VOCAB, "mask_token_id": LAST + 4, "pad_token_id": PAD},
    "Gemma3nTextConfig": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "intermediate_size": [INNER] * 10},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeConfig": _UNROUTED,
    "GraniteMoeSWAConfig": _UNROUTED,
    "GraniteMoeHybridConfig": _UNROUTED,
    "GraniteMoeSharedConfig": _UNROUTED,
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LiltConfig": {"hidden_size": 48},
    "LongT5Config": _START,
    "Mamba2Config": {"num_heads": 8},
    "Mistral4Config": {"num_key_value_heads": HEADS, "head_dim": 16},
    "NemotronConfig": {"num_key_value_heads": 2},
    "Qwen3_5TextConfig": {"num_hidden_layers": 4},
    "ReformerConfig": {
        "axial_pos_embds": False,
        "hash_seed": 1,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "SwitchTransformersConfig": _START,
    "T5Config": _START,
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": _ZAMBA,
    "Zamba2Config": _ZAMBA,
}


def tiny_config(kind: type[PreTrainedConfig], **fields: Any) -> PreTrainedConfig:
    """A configuration of `kind` with a few thousand parameters, `fields` set in it and in its parts that know them."""
    if kind.__name__ in COMPOSED:
        return COMPOSED[kind.__name__](fields)
    return kind(**_small(kind(), fields))


def _small(default: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = {**_small(value, fields), "model_type": value.model_type}
        elif not _PER_LAYER.fullmatch(name):
            small = _small_value(name, value, default)
            if small is not value:
                given[name] = small
    special = SPECIAL.get(type(default).__name__, {})
    own = {name: value for name, value in fields.items() if hasattr(default, name)}
    return {**given, **own, **special}


def _small_value(name: str, value: Any, config: PreTrainedConfig) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if _DROPOUT.fullmatch(name) and number:
        return 0.0 if isinstance(value, float) else 0
    if _COEFFICIENT.fullmatch(name) and isinstance(value, float):
        return _AUXILIARY
    if name == "output_router_logits":
        return True
    token = _TOKEN.fullmatch(name)
    if token and (isinstance(value, int) or (isinstance(value, list) and name == "eos_token_id") or name in _PADDED):
        small = _TOKENS.get(
            token[1] or token[3], LAST + 2 if "image" in name else LAST + 3 if "video" in name else LAST + 4
        )
        return small if isinstance(value, int | list) or value is None else value
    if isinstance(value, int) and number:
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, name):
                if size == 2 and "heads" in name and value == getattr(config, "num_attention_heads", None):
                    size = HEADS  # as many as there are of queries
                return min(value, size) if min(value, size) != value else value
    if name == "head_dim" and value is None:
        return HEAD_DIM
    return value


_PADDED = {"pad_token_id"}


def _encoder_decoder(fields: dict[str, Any]) -> PreTrainedConfig:
    parts = {}
    for name in ("encoder", "decoder"):
        part = _small(CONFIG_MAPPING["bert"](), fields)
        parts[name] = {**part, "model_type": "bert", "is_decoder": name == "decoder"}
        parts[name]["add_cross_attention"] = name == "decoder"
    tokens = {"decoder_start_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS, "vocab_size": VOCAB}
    return CONFIG_MAPPING["encoder-decoder"](**parts, **tokens)


COMPOSED = {"EncoderDecoderConfig": _encoder_decoder}
