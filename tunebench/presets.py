"""The models: one entry each, with the published dimensions. Adding a model is one entry here."""

from dataclasses import dataclass
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM: dict[str, Any] = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": True,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# LoRA adapts the same projections on both sides. The key is the config's model_type.
LORA_TARGETS: dict[str, list[str]] = {"llama": ["q_proj", "k_proj", "v_proj"], "bloom": ["query_key_value"]}


@dataclass(frozen=True)
class Preset:
    """A model by name: its Hugging Face config and the dtype of its random checkpoint on disk."""

    config: dict[str, Any]
    checkpoint_dtype: str


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocab: int, dtype: str) -> Preset:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
    }
    return Preset(LLAMA | sizes, dtype)


def _bloom(hidden: int, layers: int, heads: int, vocab: int, dtype: str, **ids: int) -> Preset:
    sizes = {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
    return Preset(BLOOM | sizes | ids, dtype)


# The tiny ones share the embedded tokenizer's vocabulary of 8192, whose padding token is 0.
PRESETS: dict[str, Preset] = {
    "llama-tiny": _llama(256, 688, 4, 8, 8192, "float32"),
    "llama-13b-tiny": _llama(320, 864, 5, 8, 8192, "float32"),
    "bloom-tiny": _bloom(256, 4, 8, 8192, "float32", pad_token_id=0),
    "llama-7b": _llama(4096, 11008, 32, 32, 32000, "float16"),
    "bloomz-7b1-mt": _bloom(4096, 30, 32, 250880, "float16"),
}
