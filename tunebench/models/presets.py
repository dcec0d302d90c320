"""The presets: one entry per model, with its published dimensions."""

from dataclasses import dataclass, replace
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
QWEN2: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "attention_bias": True,  # of q, k and v alone
    "max_position_embeddings": 131072,
    "use_sliding_window": False,
}
LLAMA_3: dict[str, Any] = LLAMA | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
# ChatGLM2 in transformers' native class: the same architecture under the names of a later release.
GLM: dict[str, Any] = LLAMA | {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,  # of q, k and v alone
    "max_position_embeddings": 32768,
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


@dataclass(frozen=True)
class Preset:
    """A model by name: its Hugging Face config and the dtype of its random checkpoint on disk."""

    config: dict[str, Any]
    checkpoint_dtype: str

    def cut(self, layers: int | None) -> "Preset":
        """The same model with so many layers; None: all."""
        return self if layers is None else replace(self, config=self.config | {self._layers_name: layers})

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.config[self._layers_name]

    @property
    def _layers_name(self) -> str:
        return "n_layer" if "n_layer" in self.config else "num_hidden_layers"


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    vocab: int,
    dtype: str,
    key_value_heads: int | None = None,
    base: dict[str, Any] = LLAMA,
    **ids: int,
) -> Preset:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads or heads,
        "vocab_size": vocab,
    }
    return Preset(base | sizes | ids, dtype)


def _bloom(hidden: int, layers: int, heads: int, vocab: int, dtype: str, **ids: int) -> Preset:
    sizes = {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
    return Preset(BLOOM | sizes | ids, dtype)


def _llama_3_scaling(factor: float) -> dict[str, Any]:
    """The rotary scaling of Llama 3.1 and later models. They were trained at a length of 8,192 first."""
    trained = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **trained}


LLAMA_3_1 = LLAMA_3 | {"rope_scaling": _llama_3_scaling(8.0)}
LLAMA_3_2_TIED = LLAMA_3 | {"rope_scaling": _llama_3_scaling(32.0), "tie_word_embeddings": True}
QWEN2_TIED = QWEN2 | {"max_position_embeddings": 32768, "tie_word_embeddings": True}
LLAMA_3_IDS = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004}
QWEN2_IDS = {"bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 151643}

# The tiny models have the embedded tokenizer's vocabulary of 8192. Its padding token is 0.
PRESETS: dict[str, Preset] = {
    "llama-tiny": _llama(256, 688, 4, 8, 8192, "float32"),
    "llama-13b-tiny": _llama(320, 864, 5, 8, 8192, "float32"),
    "llama-30b-tiny": _llama(416, 1120, 6, 8, 8192, "float32"),
    "llama-65b-tiny": _llama(512, 1376, 8, 8, 8192, "float32"),
    "bloom-tiny": _bloom(256, 4, 8, 8192, "float32", pad_token_id=0),
    "qwen2-tiny": _llama(256, 688, 4, 8, 8192, "float32", key_value_heads=4, base=QWEN2),
    "qwen2.5-7b-tiny": _llama(256, 688, 4, 8, 8192, "float32", key_value_heads=4, base=QWEN2),
    "qwen2.5-0.5b-tiny": _llama(256, 1024, 4, 8, 8192, "float32", key_value_heads=4, base=QWEN2_TIED),
    "llama-3.1-8b-tiny": _llama(256, 896, 4, 8, 8192, "float32", key_value_heads=4, base=LLAMA_3_1),
    "llama-3.2-1b-tiny": _llama(256, 1024, 4, 8, 8192, "float32", key_value_heads=4, base=LLAMA_3_2_TIED),
    "chatglm2-tiny": _llama(256, 856, 4, 8, 8192, "float32", key_value_heads=2, base=GLM, head_dim=32),
    "llama-7b": _llama(4096, 11008, 32, 32, 32000, "float16"),
    "llama-13b": _llama(5120, 13824, 40, 40, 32000, "float16"),
    "llama-30b": _llama(6656, 17920, 60, 52, 32000, "float16"),
    "llama-65b": _llama(8192, 22016, 80, 64, 32000, "float16"),
    "chatglm2-6b": _llama(4096, 13696, 28, 32, 65024, "float16", key_value_heads=2, base=GLM, head_dim=128),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 128256, "float16", key_value_heads=8, base=LLAMA_3_1, **LLAMA_3_IDS),
    "llama-3.2-1b": _llama(
        2048, 8192, 16, 32, 128256, "float16", key_value_heads=8, base=LLAMA_3_2_TIED, **LLAMA_3_IDS
    ),
    "qwen2-7b": _llama(3584, 18944, 28, 28, 152064, "float16", key_value_heads=4, base=QWEN2, **QWEN2_IDS),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 152064, "float16", key_value_heads=4, base=QWEN2, **QWEN2_IDS),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 151936, "float16", key_value_heads=2, base=QWEN2_TIED, **QWEN2_IDS),
    "bloomz-7b1-mt": _bloom(4096, 30, 32, 250880, "float16"),
}
