"""Tiny random models of every decoder family, and random tokens.

Sides are multiples of 64 (inputs) and 32 (outputs): on a CPU, bitsandbytes 0.50.2 multiplies other shapes wrongly.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY = 128
_BASE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = _BASE | {"intermediate_size": 128, "num_key_value_heads": 2}
_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED | {"tie_word_embeddings": True},
    "mistral": _GATED | {"sliding_window": 8},
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 32},
    "gemma2": _GATED | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": _GATED
    | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _GATED,
    "opt": _BASE | {"dropout": 0.0, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": _BASE | {"intermediate_size": 128, "max_position_embeddings": 64},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "falcon": _BASE | {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _GATED
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 3,
    },
    "qwen2_moe": _GATED
    | {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": _GATED
    | {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
}


_TEXT: dict[str, Any] = _GATED | _TOKENS | {"head_dim": 16, "initializer_range": 0.1}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "embed_dim": 64,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_IMAGES: dict[str, Any] = {
    "image_token_id": 124,
    "video_token_id": 125,
    "vision_start_token_id": 126,
    "vision_end_token_id": 127,
}

VISION_LANGUAGE: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": _TEXT | {"rope_parameters": _MROPE}, "vision_config": _QWEN_VISION, **_QWEN_IMAGES},
    "qwen3_vl": {"text_config": _TEXT | {"rope_parameters": _MROPE}, "vision_config": _QWEN_VISION, **_QWEN_IMAGES},
    "qwen3_5": {
        "text_config": _TEXT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 32,
            "linear_num_key_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": _MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
        },
        "vision_config": _QWEN_VISION,
        **_QWEN_IMAGES,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": 127,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 64},
        "image_token_index": 127,
    },
}


def vision_language(folder: Path, family: str) -> Path:
    """A folder with a tiny vision-language model. The last four tokens of its vocabulary stand for images."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **VISION_LANGUAGE[family], **_TOKENS, tie_word_embeddings=False)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A randomly initialized model, with weights large enough that its blocks do something."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, **(FAMILIES.get(family, _GATED) | _TOKENS | {"initializer_range": 0.1} | changes)
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def checkpoint(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A folder with such a model as safetensors."""
    model(family, dtype, **changes).save_pretrained(folder)
    return folder


def sequences(number: int = 10, longest: int = 24, seed: int = 0) -> tuple[Tensor, ...]:
    """Random tokens, each sequence of another length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 3, longest + 1, (number,), generator=generator).tolist()
    return tuple(torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths)
