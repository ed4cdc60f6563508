"""Every causal language model of the installed transformers, tiny: the list that "opens any model" is measured against.

A generic recipe shrinks a default config: every field whose name says a width, a depth or a count is set to a small
value, nested configs too, and per-layer lists are cut to three layers that show every kind of layer. What a class
insists on beyond that stands in `EXCEPTIONS`. One model is built at a time, first without memory to learn its size, so
that an unshrunken one is refused rather than allocated.

    for entry in sweep(): print(entry.model_type, entry.reason or type(entry.model).__name__)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.zoo import CONTEXT, D_MODEL, EOS, FIRST_WORD, HEADS, KV_HEADS, LAYERS, PAD, VOCAB, randomise

MAX_PARAMETERS = 3_000_000
LENGTH = 8  # tokens of the trial forward

_VALUES: list[tuple[int, str]] = [
    (
        D_MODEL,
        "hidden_size d_model n_embd embedding_size emb_dim word_embed_proj_dim embedding_dim lru_width "
        "attention_hidden_size input_embedding_size output_embedding_size moe_latent_size dim_model",
    ),
    (
        64,
        "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff d_inner d_ff "
        "feed_forward_size ext_pw_out_channel nemo_conv_channels depthwise_separable_out_channel "
        "intermediate_size_mlp dense_intermediate_size mamba_d_ssm prompt_mid_dim",
    ),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size q_lora_rank",
    ),
    (
        16,
        "kv_lora_rank o_lora_rank router_hidden_size attention_head_dim hidden_size_per_layer_input laurel_rank "
        "mamba_head_dim mamba_headdim ple_embed_dim time_step_rank mamba_dt_rank d_rel image_size num_mel_bins "
        "gated_norm_rank chunk_size mamba_chunk_size adapter_rank hc_lowrank max_source_positions prompt_length "
        "chroma_length",
    ),
    (
        8,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim dim_head d_head d_kv attention_head_size state_size "
        "mamba_d_state mamba_d_head mamba_n_heads linear_key_head_dim linear_value_head_dim linear_head_dim "
        "index_head_dim ssm_state_size kv_channels patch_size swa_head_dim num_heads_mamba global_head_dim "
        "rotary_dim n_groups_hidden pronunciation_embed_dim shape_embed_dim attention_chunk_size swa_v_head_dim "
        "compress_rope_head_dim",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads mamba_num_heads "
        "linear_num_key_heads linear_num_value_heads linear_num_heads num_experts n_routed_experts "
        "num_local_experts moe_num_experts swa_num_attention_heads index_n_heads sliding_window "
        "attention_window_size local_attention conv_dim index_topk window_size rel_extent sliding_window_size "
        "num_centroids index_block_size",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
        "moe_topk moe_k top_k_experts n_mamba_heads n_groups mamba_n_groups mamba_ngroups num_expert_group n_group "
        "num_query_groups num_key_value_heads_swa num_global_key_value_heads n_shared_experts o_groups "
        "index_topk_blocks",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers depth",
    ),
    (
        1,
        "topk_group first_k_dense_replace num_dense_layers num_shared_experts moe_num_shared_experts "
        "moe_layer_start_index index_local_blocks num_nextn_predict_layers",
    ),
    (
        0,
        "num_kv_shared_layers",
    ),
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size decoder_vocab_size "
        "unpadded_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    ),
    (
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length "
        "original_max_position_embeddings max_source_position",
    ),
    (
        PAD,
        "pad_token_id pad_index",
    ),
    (
        EOS,
        "eos_token_id bos_token_id decoder_start_token_id forced_eos_token_id sep_token_id cls_token_id "
        "mask_token_id boi_token_id eoi_token_id boa_token_id eoa_token_id image_token_id audio_token_id "
        "video_token_id image_token_index eoa_token_index boi_token_index eoi_token_index vision_start_token_id "
        "vision_end_token_id eod_token_id",
    ),
]
RECIPE = {name: value for value, names in _VALUES for name in names.split()}

# What a class insists on beyond the recipe: fields of its config.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "reformer": {
        **{"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh", "local"]},
        **{"num_hashes": 1, "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 2},
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class SweepEntry:
    """One causal architecture: its tiny model, or None and the reason why it could not be built here."""

    model_type: str
    model: nn.Module | None
    reason: str


def causal_types() -> tuple[str, ...]:
    """Every model type of transformers' own causal-LM map, sorted."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def _layer_kinds(kinds: list[Any]) -> list[Any]:
    """Three layers out of a per-layer list that show as many of its kinds as three can."""
    distinct = list(dict.fromkeys(kinds))[:LAYERS]
    return distinct + [kinds[0]] * (LAYERS - len(distinct))


def shrunken(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The constructor's arguments that make a tiny config out of a default one."""
    defaults = config.to_dict()
    nested = set(getattr(config, "sub_configs", None) or {})
    renamed = getattr(config, "attribute_map", None) or {}
    depth = next((getattr(config, name) for name in ("num_hidden_layers", "n_layer") if hasattr(config, name)), None)
    arguments: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in nested:
            inner = getattr(config, name)
            if isinstance(inner, transformers.PreTrainedConfig):
                arguments[name] = shrunken(inner) | ({"model_type": inner.model_type} if inner.model_type else {})
        elif name in RECIPE and not isinstance(value, bool | list | dict | str):
            arguments[name] = RECIPE[name]
        elif isinstance(value, list) and len(value) == depth and value and isinstance(value[0], str | int):
            arguments[name] = [RECIPE[name]] * LAYERS if name in RECIPE else _layer_kinds(value)
    if "kv_lora_rank" in defaults:  # multi-head latent attention expands keys and values to every head
        arguments["num_key_value_heads"] = HEADS
    return {renamed.get(name, name): value for name, value in arguments.items()}


def tiny_config(model_type: str) -> tuple[transformers.PreTrainedConfig, type[nn.Module]]:
    """The shrunken config of a causal type and the class that takes it."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config_class = CONFIG_MAPPING[model_type]
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not issubclass(config_class, wanted):
        config_class = wanted
    try:
        arguments = shrunken(config_class())
    except Exception:  # a default config that its own validation refuses: the exceptions must say everything
        arguments = {}
    return config_class(**(arguments | EXCEPTIONS.get(model_type, {}))), model_class


def build(model_type: str) -> SweepEntry:
    """Build one causal architecture tiny, random and seeded, and try a forward of 8 tokens."""
    try:
        config, model_class = tiny_config(model_type)
        config.is_decoder = True
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(config).parameters())
        except (RuntimeError, NotImplementedError):
            size = 0  # a class that computes with its own buffers can't be built without memory
        if size > MAX_PARAMETERS:
            return SweepEntry(model_type, None, f"{size:,} parameters: the recipe did not shrink it")
        torch.manual_seed(0)
        model = randomise(model_class(config), zlib.crc32(model_type.encode()))
        ids = torch.randint(FIRST_WORD, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not torch.isfinite(logits).all():
            return SweepEntry(model_type, None, "the trial forward gave values that are not finite")
    except Exception as error:  # the point of the sweep is to list whatever a class refuses
        return SweepEntry(model_type, None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return SweepEntry(model_type, model, "")


def sweep(types: tuple[str, ...] | None = None) -> Iterator[SweepEntry]:
    """Build every causal type (or those given) one by one; nothing is kept between steps."""
    for model_type in types or causal_types():
        yield build(model_type)
