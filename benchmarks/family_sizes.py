"""Configurations of tiny models, one for every module of `mlx_lm.models`.

A configuration is made of values that many families share (`SIZES`, by the names that configurations give them) and of
what a family has besides (`FAMILIES`). Names that a family does not know are ignored by mlx-lm. Windows and chunks are
short, so that texts of the benchmark go far beyond them.
"""

from __future__ import annotations

from typing import Any

VOCAB = 160
WINDOW = 12

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_layers": 4, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "use_bias": False,
    "sliding_window": WINDOW,
    # experts
    "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_shared_experts": 1, "num_local_experts": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "moe_layer_freq": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "decoder_sparse_step": 1, "mlp_only_layers": [],
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    # latent attention
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    # GPT
    "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 2048, "n_ctx": 2048, "n_inner": 64,
    # gated delta nets
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    # Mamba
    "state_size": 8, "conv_kernel": 4, "use_conv_bias": True, "n_groups": 2, "time_step_rank": 8,
    "time_step_limit": (0.0, 100.0), "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_proj_bias": False, "mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2,
    # short convolutions
    "conv_L_cache": 3, "conv_bias": True,
    # multipliers
    "logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.8,
    "partial_rotary_factor": 0.5, "use_qk_norm": True,
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_MOSTLY_WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_LONGCAT = {
    "attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2, "moe_topk": 2,
    "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
}  # fmt: skip
_LFM2 = {
    "block_dim": 64, "block_ff_dim": 64, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True, "full_attn_idxs": [1, 3],
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}  # fmt: skip
_LING = {
    "layer_group_size": 2, "group_norm_size": 1, "num_key_value_heads": 4, "first_k_dense_replace": 1,
    "score_function": "sigmoid",
}  # fmt: skip
_YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 24}
_SCALED = {  # the scale of the queries takes a step every 64 positions
    "rope_parameters": {
        "rope_theta": 10000.0, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 64, "type": "yarn",
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
_QWEN_HYBRID = {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "type": "default"}}
_LINEAR_ATTENTION = {  # kda layers count from 1
    "linear_attn_config": {
        "num_heads": 4, "head_dim": 16, "kda_layers": [1, 3], "full_attn_layers": [2, 4], "short_conv_kernel_size": 4,
    },
    "model_max_length": 2048,
}  # fmt: skip
_GEMMA4 = {
    "num_hidden_layers": 6, "global_head_dim": 32, "num_key_value_heads": 1, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "sliding_window_pattern": 3,
    "final_logit_softcapping": 30.0, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_theta": 100000.0, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_theta": 10000.0},
    },
}  # fmt: skip
_ROPES = {"sliding_attention": {"rope_theta": 5000.0}, "full_attention": {"rope_theta": 10000.0}}
_GEMMA3 = {"sliding_window_pattern": 3, "query_pre_attn_scalar": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 6,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 2.0,
    },
    "afmoe": {"layer_types": _ALTERNATING},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": _LING,
    "bailing_moe_linear": _LING,
    "bailing_moe_v3": _LING,
    "cohere2": {"sliding_window_pattern": 4},
    "dbrx": {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "greedy", "scoring_func": "softmax", "rope_scaling": _YARN},
    "deepseek_v3": {"rope_scaling": _YARN},
    "deepseek_v32": _INDEXER,
    "ernie4_5_moe": {"moe_num_experts": 4},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LLGL"},
    "exaone_moe": {"layer_types": _MOSTLY_WINDOWS, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"]},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "rope_local_base_freq": 5000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": _ALTERNATING,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 3,
        "altup_coef_clip": 10.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {**_INDEXER, "rope_parameters": {"rope_theta": 10000.0}},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": _ALTERNATING},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "internlm3": {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW, "num_hidden_layers": 2},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {**_LINEAR_ATTENTION, "attn_res_block_size": 2, "num_experts_per_token": 2},
    "kimi_linear": _LINEAR_ATTENTION,
    "lfm2": _LFM2,
    "lfm2-vl": _LFM2,
    "lfm2_moe": {**_LFM2, "use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {"block_size": 2048, "n_kv_heads": 2},
    "llama": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "llama4": {
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 64,
        "rope_scaling": None,
        "num_experts_per_tok": 1,
        "attn_temperature_tuning": 4,
        "floor_scale": 16,
        "attn_scale": 0.1,
    },
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [0, 1, 1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": {"layer_types": _ALTERNATING, "rope_parameters": _ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 5000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "routed_scaling_factor": None,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 3.0},
    "minicpm3": {
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 3.0,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 3,
        "sparse_attention_freq": [0, 1, 1, 1],
        "dense_intermediate_size": 64,
    },
    "ministral3": {**_SCALED, "layer_types": _ALTERNATING},
    "mistral3": {**_SCALED, "text_config": {"model_type": "ministral3"}},
    "mistral4": _SCALED,
    "muse_spark": {
        "post_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0},
        "layer_types": _MOSTLY_WINDOWS,
        "layer_rope_theta": [10000.0, 10000.0, 10000.0, 0.0],
        "final_logit_softcapping": 30.0,
        "output_multiplier": 1.0,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": False, "n_heads_in_group": 4}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
        ],
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "M", "E", "-", "*"],
        "num_hidden_layers": 6,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo3": {"layer_types": _MOSTLY_WINDOWS},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "openelm": {
        "num_transformer_layers": 3,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "ffn_multipliers": [1.0, 1.5, 2.0],
        "num_query_heads": [4, 4, 8],
        "num_kv_heads": [2, 2, 4],
    },
    "phi3small": {
        "vocab_size": 100352,  # it writes to the logits of tokens up to there
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 64,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
    },
    "phixtral": {"num_vocab": VOCAB, "model_dim": 64, "num_heads": 4, "num_layers": 3, "rotary_dim": 8},
    "pixtral": {"text_config": {"model_type": "llama"}},
    "plamo": {"num_attention_heads": 8, "num_key_value_heads": 1, "n_shared_head": 8},
    "plamo2": {
        "hidden_size_per_head": 16,
        "mamba_step": 2,
        "attention_window_size": 2048,
        "full_attention_idx": [1, 3],
    },
    "plamo3": {"window_size": WINDOW, "sliding_window_pattern": 2},
    "prism_hadamard_qwen35": {
        **_QWEN_HYBRID,
        "num_experts": 0,
        "intermediate_size": 512,
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": "model.layers.0.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.1.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 0},
        ],
    },
    "qwen": {"kv_channels": 16},
    "qwen3_5": {**_QWEN_HYBRID, "num_experts": 0},
    "qwen3_5_moe": _QWEN_HYBRID,
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {"rope_parameters": _ROPES},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,2,3",
        "use_head_wise_attn_gate": True,
        "layer_types": _ALTERNATING,
    },
}
"""What a family has besides, or instead."""
