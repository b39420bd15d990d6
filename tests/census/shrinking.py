"""Tiny configurations of every model type: sizes by the names that configurations share, and what single types need."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

LAYERS, WIDTH, HEADS, VOCAB = 4, 32, 4, 160
WORDS = (10, 60)
"""Ids of ordinary tokens; what lies below and above is special."""

SIZES: dict[str, Any] = {}
"""Field of a configuration -> its value in a tiny one."""


def _all(value: Any, names: str) -> None:
    SIZES.update(dict.fromkeys(names.split(), value))


_all(
    LAYERS,
    """num_hidden_layers n_layer n_layers num_layers layers encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers speech_encoder_layers depth num_blocks
    conf_num_hidden_layers""",
)
_all(
    WIDTH,
    """hidden_size d_model dim n_embd emb_dim embed_dim encoder_hidden_size decoder_hidden_size text_hidden_size
    out_hidden_size output_dim projection_dim backbone_hidden_size embedding_size
    vision_hidden_size cross_hidden_size vision_output_dim text_embed_dim audio_embed_dim
    projector_input_dim projector_output_dim hidden_size_global adapter_out_dim unit_embed_dim
    codevector_dim proj_codevector_dim rnn_hidden_dim patch_embed_hidden_size
    thinker_hidden_size mm_embed_dim output_proj_dims output_embedding_size input_embedding_size""",
)
_all(
    64,
    """intermediate_size d_ff ffn_dim ffn_hidden_size dim_ff dff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim
    mlp_dim ff_dim feed_forward_size projector_hidden_size projection_hidden_dim dense_intermediate_size
    projection_hidden_size intermediate_size_mlp speech_encoder_intermediate_size t2u_encoder_ffn_dim
    t2u_decoder_ffn_dim     projection_intermediate_size alignment_intermediate_size""",
)
_all(
    24,
    """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size
    moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim moe_hidden_size""",
)
_all(
    HEADS,
    """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
    num_encoder_attention_heads num_decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads
    speech_encoder_attention_heads conf_num_attention_heads swa_num_attention_heads index_n_heads
    linear_num_value_heads cross_num_attention_heads num_cross_attention_heads num_self_attention_heads
    mamba_num_heads mamba_n_heads resampler_heads resampler_n_heads t2u_decoder_attention_heads
    t2u_encoder_attention_heads linear_num_heads""",
)
_all(2, "num_key_value_heads swa_num_key_value_heads cross_num_key_value_heads linear_num_key_heads n_mamba_heads")
_all(
    8,
    """head_dim d_kv d_head attention_head_size swa_head_dim kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim
    index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim cross_head_dim dim_head resampler_head_dim
    state_size ssm_state_size mamba_d_state mamba_chunk_size chunk_size sliding_window sliding_window_size
    local_attention attention_chunk_size local_attention_window_len mamba_headdim q_groups
    hidden_size_per_layer_input laurel_rank gated_norm_rank embedding_rank query_pre_attn_scalar
    global_head_dim router_hidden_size num_landmarks""",
)
_all(4, "rotary_dim n_window n_query num_latents num_query_tokens latent_query_num resampler_n_latents")
_all(4, "num_experts num_local_experts n_routed_experts moe_num_experts ffn_num_experts num_feedforward_networks")
_all(2, "num_experts_per_tok moe_k moe_topk experts_per_token moe_top_k top_k_experts top_k num_codebooks")
_all(1, "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_mem_blocks")
_all(16, "q_lora_rank kv_lora_rank o_lora_rank mamba_head_dim qk_head_dim ffn_round_up_to_multiple_of")
_all(64, "mamba_d_ssm lru_width mamba_intermediate_size")
_all(
    128,
    """max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len
    max_text_positions original_max_position_embeddings max_decoder_position_embeddings max_encoder_position_embeddings
    t2u_max_position_embeddings max_2d_position_embeddings seq_len max_length position_embedding_size""",
)
_all(
    VOCAB,
    """vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input num_embeddings codebook_size
    audio_vocab_size ngram_vocab_size_base t2u_vocab_size unit_hifi_gan_vocab_size""",
)
_all(16, "image_size resolution")
_all(4, "patch_size")
_all(64, "window_size entity_vocab_size num_mel_bins")
_all(16, "entity_emb_size num_codevectors_per_group num_conv_pos_embeddings attention_window")
_all((16, 16, 16), "conv_dim")
_all((5, 2, 2), "conv_stride")
_all((10, 3, 3), "conv_kernel")
_all(1, "first_k_dense_replace num_dense_layers num_nextn_predict_layers decoder_sparse_step encoder_sparse_step")
_all(3, "depthwise_conv_kernel conv_depthwise_kernel_size conv_kernel_size")

_NEEDED = ("num_experts_per_tok",)
"""Fields without a default that a model needs all the same."""

SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 2, "sep": 3, "cls": 4, "mask": 5, "unk": 6}
_SUFFIXES = ("_token_id", "_token_index", "_id", "_index")


class _Keep:
    """Mark a field that keeps its default."""


KEEP = _Keep()

_NO_RANKS = {"num_key_value_heads": HEADS}
_SHARED_KV = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
_DOTS3 = {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 16}
_DOTS3 |= {"swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
_FOUR_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
_SECTIONED = (
    "glm4v_text glm4v_moe_text glm_ocr_text qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text "
    "qwen2_5_omni_text qwen3_omni_moe_text paddleocr_vl_text"
).split()
_STAGES = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "window_size": 2, "patch_size": 2}

TYPES: dict[str, dict[str, Any]] = {
    "blip-2": {"image_token_index": VOCAB - 1},
    "instructblip": {"image_token_index": VOCAB - 1},
    "instructblipvideo": {"video_token_index": VOCAB - 1},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [2, 3],
        "vocab_size": VOCAB,
    },
    "canine": {"local_transformer_stride": 4, "num_hash_buckets": VOCAB},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1, "IMGIMGA": VOCAB - 2}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "cosmos3_edge_text": _FOUR_SECTIONS,
    "cvt": {"embed_dim": (16, 16, 32), "num_heads": (2, 2, 4), "depth": (1, 2, 3)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "diffusion_gemma_text": {"num_experts": 4, "moe_intermediate_size": 24, "top_k_experts": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_vision_encoder": {
        "pyramid_num_routed": [-1, -1, 2, 4],
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH},
    "dots3_note_text": _NO_RANKS | _DOTS3,
    "efficientnet": {
        "image_size": 64,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "in_channels": (32, 8, 16, 16),
        "out_channels": (8, 16, 16, 16),
        "kernel_sizes": (3, 3, 3, 3),
        "strides": (1, 2, 1, 2),
        "num_block_repeats": (1, 2, 2, 1),
        "expand_ratios": (1, 2, 2, 2),
        "hidden_dim": 1280,
    },
    "emu3": {
        "vocabulary_map": {"<image>": VOCAB - 1, "<|extra_200|>": VOCAB - 2, "<|visual token 000000|>": VOCAB - 3}
    },
    "esm": {"vocab_size": VOCAB, "mask_token_id": 5, "pad_token_id": 0},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "moe_num_experts": 4,
        "moe_intermediate_size": [24, 24],
    },
    "florence_vision": {
        "depths": (1, 1),
        "patch_size": (3, 3),
        "patch_stride": (2, 2),
        "patch_padding": (1, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (16, 32),
        "num_heads": (2, 4),
        "num_groups": (2, 4),
        "window_size": 2,
    },
    "focalnet": {"embed_dim": 16, "depths": (2, 2), "focal_levels": (1, 1), "focal_windows": (3, 3)},
    "evolla": {
        "protein_encoder_config": {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": 64,
            "vocab_size": VOCAB,
            "max_position_embeddings": 128,
        },
        "aligner_num_add_layers": 2,
        "resampler_depth": 1,
        "resampler_num_latents": 4,
    },
    "fun_asr_nano": {
        "adaptor_config": {"hidden_size": WIDTH, "intermediate_size": WIDTH // 4},
        "text_config": {"head_dim": 8},
        "audio_config": {"num_timestamp_prediction_layers": 1},
    },
    "gemma3n_text": _SHARED_KV,
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": LAYERS,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": LAYERS}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": _SHARED_KV | {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "glm5_next_text": _NO_RANKS | {"qk_rope_head_dim": 0},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [(-2, 0)],
        "spatial_target_layers": [1, 2],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hiera": {
        "embed_dim": 16,
        "image_size": (64, 64),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 4),
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "levit": {
        "hidden_sizes": (16, 32, 32),
        "num_attention_heads": (2, 4, 4),
        "depths": (2, 2, 2),
        "key_dim": (8, 8, 8),
        "image_size": 64,
        "patch_size": KEEP,
    },
    "kyutai_speech_to_text": {
        "codec_config": {"codebook_size": 128, "upsample_groups": 4},
        "codebook_vocab_size": VOCAB,
    },
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": HEADS, "head_dim": 16, "n_groups": 1},
    "moonshine_streaming": {"num_key_value_heads": HEADS, "encoder_config": {"sliding_windows": ((8, 4), (8, 0)) * 2}},
    "ministral": {"head_dim": 8},
    "mobilevit": {"hidden_sizes": (16, 16, 16), "neck_hidden_sizes": (8, 8, 8, 8, 16, 16, 16), "image_size": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "mobilevitv2": {"base_attn_unit_dims": (16, 16, 16), "image_size": 64, "patch_size": 2},
    "moshi": {"audio_encoder_config": {"codebook_size": 128}},
    "musicgen": {"audio_encoder": {"codebook_size": 64}, "decoder": {"num_codebooks": 2}},
    "musicgen_melody": {"audio_encoder": {"codebook_size": 64}, "decoder": {"num_codebooks": 2}},
    "nemo_speechlm": {"word_timestamp_config": {"blank_token_id": VOCAB - 1}},
    "nemotron": {"num_key_value_heads": 2},
    "pegasus_x": {"block_size": 8},
    "perceiver": {
        "num_latents": 8,
        "num_blocks": 1,
        "d_latents": WIDTH,
        "d_model": WIDTH,
        "num_self_attends_per_block": LAYERS,
        "max_position_embeddings": 64,
    },
    "phi4_multimodal_audio": {"nemo_conv_channels": 16},
    "pp_formulanet_vision": {
        "window_size": 2,
        "output_channels": 16,
        "global_attn_indexes": (1, 3),
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": WIDTH,
    },
    "pix2struct_vision_model": {"patch_embed_hidden_size": 48},
    "pvt": {"hidden_sizes": (16, 16, 32, 32), "num_attention_heads": (1, 2, 4, 4), "image_size": 64},
    "pvt_v2": {"hidden_sizes": (16, 16, 32, 32), "num_attention_heads": (1, 2, 4, 4), "image_size": 64},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (8, 24), "attn_layers": ("local", "lsh") * 2},
    "roc_bert": {
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": VOCAB,
        "pronunciation_vocab_size": VOCAB,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 11, "no_token_index": 12},
    "segformer": {"hidden_sizes": (16, 16, 32, 32), "num_attention_heads": (1, 2, 4, 4), "image_size": 64},
    "swin": _STAGES,
    "swinv2": _STAGES | {"pretrained_window_sizes": (0, 0)},
    "donut-swin": _STAGES,
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 4, "shape_size": 8},
    "nemotron_h": {"n_groups": 2, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "neomme": {"head_dim": 16},
    "muse_spark_audio": {"hidden_sizes": (16, 16, 16, 32), "out_hidden_size": WIDTH},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": WIDTH}},
    "nemotron_h_omni": {"audio_config": None},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 12},
    "step3p5": {"sliding_window": 8},
    "voxtral": {"text_config": {"head_dim": 8, "num_key_value_heads": 2}},
    "voxtral_realtime": {"text_config": {"head_dim": 8}},
    "wav2vec2-bert": {"feature_projection_input_dim": 64},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": (2, 2), "depths": (1, 1, 1)},
    "xlstm": {"hidden_size": 128},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "n_mamba_heads": HEADS,
        "mamba_headdim": 16,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> what differs from `SIZES`, also where the type is a part of another one."""
TYPES |= {name: _FOUR_SECTIONS for name in _SECTIONED}


def tiny(model_type: str, **more: Any) -> PretrainedConfig:
    """Return a tiny configuration of a model type.

    Args:
        more: fields that are given as they are.
    """
    cls = CONFIG_MAPPING[model_type]
    fields = shrunk(cls, model_type) | more
    config = cls(**fields)
    _number_special_tokens(config)
    return config


def shrunk(cls: type[PretrainedConfig], model_type: str) -> dict[str, Any]:
    """Return what a configuration class is given for a tiny model, its parts as dictionaries."""
    own = TYPES.get(model_type, {})
    fields: dict[str, Any] = {}
    names = inspect.signature(cls.__init__).parameters
    for name, parameter in names.items():
        if name in SIZES and _same_kind(parameter.default, SIZES[name]):
            fields[name] = SIZES[name]
        elif "drop" in name and isinstance(parameter.default, float):
            fields[name] = 0.0
        elif name == "apply_spec_augment":  # it masks at random in training
            fields[name] = False
        elif name in _NEEDED and parameter.default is None:
            fields[name] = SIZES[name]
    if "kv_lora_rank" in names:  # latent attention: keys and values are made for every head
        fields |= {name: HEADS for name in fields if name == "num_key_value_heads"}
    specs = getattr(cls, "sub_configs_defaults", {}) or {}
    for name, spec in specs.items():
        part = spec.config_class if spec.config_class.__name__ != "AutoConfig" else CONFIG_MAPPING[spec.model_type]
        fields[name] = dict(spec.init_kwargs) | shrunk(part, spec.model_type)
        if spec.config_class.__name__ == "AutoConfig":
            fields[name]["model_type"] = spec.model_type
    return {name: value for name, value in _merged(fields, own).items() if value is not KEEP}


def _merged(fields: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with those of `own` in place of them, part by part."""
    fields = dict(fields)
    for name, value in own.items():
        part = fields.get(name)
        nested = isinstance(value, dict) and isinstance(part, dict)
        fields[name] = _merged(part, value) if nested else value
    return {name: value for name, value in fields.items() if value is not KEEP}


def _same_kind(default: Any, value: Any) -> bool:
    """Return whether a size may stand in place of a default: numbers for numbers, tuples for lists."""
    if isinstance(value, tuple):
        return isinstance(default, list | tuple)
    return isinstance(default, int) and not isinstance(default, bool)


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a configuration and all that lie in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts(value)


def _number_special_tokens(config: PretrainedConfig) -> None:
    """Give every special token an id of its own within the vocabulary, the same in all parts."""
    places = []
    for part in parts(config):
        for name, value in vars(part).items():
            stem = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), None)
            if stem is not None and isinstance(value, int) and not isinstance(value, bool):
                places.append((part, name, stem))
    others = sorted({stem for _, _, stem in places} - SPECIAL.keys())
    ids = SPECIAL | {stem: VOCAB - 1 - i for i, stem in enumerate(others)}
    for part, name, stem in places:
        if not (name.endswith("_index") and stem in ("lang", "altup_active", "ignore")):
            setattr(part, name, ids[stem])
