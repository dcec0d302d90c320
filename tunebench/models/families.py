"""The model families: the fields of their config.json, their tensors, and what a built model computes with.

A new family is one entry in FAMILIES. What a framework names differently stands in that framework's folder.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunebench.record import Built

Config = dict[str, Any]  # a normalised config: the fields of a family's Shape
Count = Annotated[int, Field(gt=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, lt=10_000)]
Epsilon = Annotated[float, Field(gt=0, lt=10)]
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 means none
HEAD = "lm_head.weight"  # present where the head is not the embedding


class Shape(BaseModel):
    """Fields of all families. Texts and booleans do not count as numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model_type: str
    hidden_size: Count
    vocab_size: Count
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None


class LlamaShape(Shape):
    """A decoder with rotary embedding, RMSNorm and a gated feed-forward layer. The defaults are transformers'."""

    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Annotated[float, Field(ge=1, lt=1e15)] = 10000.0
    rope_scaling: dict[str, Any] | None = None  # made by `_rotary` in config.py
    partial_rotary_factor: Literal[1.0] = 1.0  # type: ignore[valid-type]  # pydantic knows such literals
    hidden_act: Literal["silu", "swish"] = "silu"  # both name the same function
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        self.hidden_act = "silu"
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        self.num_key_value_heads = self.num_key_value_heads or heads
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        self.head_dim = self.head_dim or self.hidden_size // heads
        rotated = self.head_dim * self.partial_rotary_factor
        if rotated % 2:
            raise ValueError(f"rotary embedding turns pairs, and head_dim {self.head_dim} gives it {rotated:g} numbers")
        return self


class Qwen2Shape(LlamaShape):
    """Qwen2: Llama with biases at q, k and v. Both libraries read a missing num_key_value_heads as 32."""

    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32768


class GlmShape(LlamaShape):
    """Glm, which PaddleNLP calls ChatGLMv2. It rotates half of each head."""

    num_key_value_heads: Count | None = 2
    head_dim: Count | None = 128
    max_position_embeddings: Count = 131072
    rms_norm_eps: Epsilon = 1.5625e-7
    partial_rotary_factor: Literal[0.5] = 0.5  # type: ignore[valid-type]
    tie_word_embeddings: Literal[False] = False


class BloomShape(Shape):
    """Bloom: ALiBi, LayerNorm, biases in all linear layers, and a head that is the embedding."""

    n_layer: Layers
    n_head: Count
    layer_norm_epsilon: Epsilon = 1e-5
    tie_word_embeddings: Literal[True] = True

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.n_head:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of n_head {self.n_head}")
        return self


@dataclass(frozen=True)
class Family:
    """What this project knows of the causal language models of one `model_type`.

    - `title`: the name in tables.
    - `shape`: the fields of the config. `aliases`: other names of a field.
    - `architectures`: the class names of its causal language model.
    - `only`: keys that must have one of a few values. `unused`: keys without an effect on the model, with the reason.
    - `tensors`, `widths`, `computes`: functions of a normalised config. They give each parameter's shape by its Hugging
      Face name (linear weights are (out, in)), the widths that tensor parallelism slices, and what a built model must
      compute with.
    - `lora_targets`: the modules that LoRA adapts.
    - `prefix`: what some published checkpoints leave out of their tensors' names.
    """

    title: str
    shape: type[Shape]
    architectures: tuple[str, ...]
    only: dict[str, tuple[Any, ...]]
    unused: dict[str, str]
    tensors: Callable[[Config], dict[str, tuple[int, ...]]]
    widths: Callable[[Config], dict[str, int]]
    computes: Callable[[Config], Built]
    lora_targets: tuple[str, ...]
    aliases: dict[str, str]
    prefix: str = ""

    @property
    def rotates(self) -> bool:
        """Whether the family has a rotary embedding, which its config.json describes."""
        return "rope_theta" in self.shape.model_fields


def _by_key(reasons: dict[str, str]) -> dict[str, str]:
    """The reason of each key, from a table that has the keys of each reason."""
    return {key: reason for reason, keys in reasons.items() for key in keys.split()}


OTHER_ORDER = "lets a library compute the same sums in another order or layout; the flags decide that here"
UNUSED = _by_key(
    {
        "says how the file came to be": "_name_or_path name_or_path model_name transformers_version paddlenlp_version "
        "_commit_hash original_architectures is_llama_config transformers.js_config unsloth_version unsloth_fixed "
        "unsloth_training_config trl_version",
        "is of the tokenizer, which has files of its own": "tokenizer_class model_max_length pad_token eos_token "
        "bos_token bos_token_id unk_token_id sep_token_id mask_token_id cls_token_id chat_template",
        "is decided by the flags": "torch_dtype dtype _attn_implementation attn_implementation use_bfloat16 "
        "torchscript _attn_implementation_autoset _experts_implementation compile_config _flash_attn_2_enabled "
        "use_flash_attention recompute use_recompute recompute_granularity recompute_use_reentrant no_recompute_layers "
        "pp_recompute_interval gradient_checkpointing refined_recompute offload_recompute_inputs skip_recompute_ops",
        "steers generation, and nothing is generated here": "use_cache max_length min_length do_sample early_stopping "
        "num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
        "length_penalty no_repeat_ngram_size bad_words_ids encoder_no_repeat_ngram_size num_return_sequences "
        "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
        "suppress_tokens begin_suppress_tokens max_new_tokens generation_config cache_implementation "
        "use_last_token_for_generation immediate_clear_past_key_value use_flash_attention_for_generation "
        "task_specific_params prefix decoder_start_token_id user_token_id assistant_token_id",
        "says what a forward pass returns beside the logits": "output_attentions output_hidden_states output_scores "
        "return_dict return_dict_in_generate keys_to_ignore_at_inference",
        "describes a classification head, which a causal language model lacks": "id2label label2id num_labels "
        "problem_type finetuning_task classifier_dropout classifier_bias num_choices",
        "is of a loss that is not called here": "loss_type loss_function ignore_index tf_legacy_loss dpo_config "
        "enable_delay_scale_loss",
        "is for weights that are drawn anew, and all are read": "initializer_range init_class init_std",
        OTHER_ORDER: "pretraining_tp seq_length max_sequence_length tensor_parallel_degree tensor_parallel_rank "
        "tensor_parallel_output pipeline_parallel_degree virtual_pp_degree sequence_parallel sep_parallel_degree "
        "context_parallel_degree fuse_sequence_parallel_allreduce enable_parallel_cross_entropy parallel_attn_hcg "
        "use_fused_rms_norm use_fused_rope use_fused_linear use_fused_dropout_add use_fused_linear_cross_entropy "
        "use_fused_head_and_loss_fn use_fast_layer_norm num_acc_steps",
    }
)
BLOOM_UNUSED = UNUSED | _by_key(
    {
        OTHER_ORDER: "skip_bias_add skip_bias_add_qkv bias_dropout_fusion masked_softmax_fusion "
        "attention_softmax_in_fp32 pretraining_pp",
        "is read by neither library: ALiBi needs no table of positions": "offset_alibi max_position_embeddings",
    }
)
# Keys of all families whose other values would mean another model or another task, with the values that are allowed.
ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "quantization_config": (),
    "auto_map": ({},),
    "per_layer_config": (),
    "attention_dropout": (0,),
    "attention_probs_dropout_prob": (0,),
    "attention_dropout_prob": (0,),
    "hidden_dropout": (0,),
    "hidden_dropout_prob": (0,),
    "hidden_dropout_rate": (0,),
    "resid_pdrop": (0,),
    "embd_pdrop": (0,),
    "attn_pdrop": (0,),
    "lora_dropout": (0,),
    "alibi": (False,),
    "rope": (True,),
    "use_long_sequence_strategies": (False,),
    "long_sequence_strategy_type": (),
    "long_sequence_strategy_name": (),
    "long_sequence_init_args": ({},),
    "fuse_attention_qkv": (False,),
    "fuse_attention_ffn": (False,),
    "transformers_weights": (),  # another file of weights
    "text_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
}
LLAMA_ONLY = ONLY | {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": ("full_attention",),
    "bias": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "mrope_section": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
}

# A config.json describes its rotary embedding in one of these tables, or at the top level by these names.
ROTARY_TABLES = ("rope_parameters", "rope_scaling")
ROTARY_NAMES = {
    "rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_percent": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "rope_scaling_type": "rope_type",  # PaddleNLP's
    "rope_scaling_factor": "factor",
}
QKV_BIAS = {"attention_bias": (True,), "qkv_bias": (True,)}


def llama_tensors(config: Config, biases: bool = False, joined_gate: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of Llama. `biases` adds those of q, k and v. `joined_gate` joins gate and up projection."""
    hidden, vocabulary, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        for name, width in outputs.items():
            shapes[f"{prefix}self_attn.{name}.weight"] = (width, hidden)
        for name, width in outputs.items() if biases else ():
            shapes[f"{prefix}self_attn.{name}.bias"] = (width,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, queries)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if joined_gate:
            shapes[prefix + "mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        else:
            shapes[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
            shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (vocabulary, hidden)
    return shapes


def bloom_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of Bloom, whose head is the embedding."""
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (config["vocab_size"], hidden)}
    norms = ["transformer.word_embeddings_layernorm"]
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
        linears = {
            "self_attention.query_key_value": (3 * hidden, hidden),
            "self_attention.dense": (hidden, hidden),
            "mlp.dense_h_to_4h": (4 * hidden, hidden),
            "mlp.dense_4h_to_h": (hidden, 4 * hidden),
        }
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    for norm in [*norms, "transformer.ln_f"]:
        shapes[norm + ".weight"] = shapes[norm + ".bias"] = (hidden,)
    return shapes


def llama_widths(config: Config) -> dict[str, int]:
    """The widths of a Llama that tensor parallelism slices, by their names in messages."""
    heads = {"attention heads": config["num_attention_heads"]}
    if config.get("num_key_value_heads"):
        heads["key-value heads"] = config["num_key_value_heads"]
    return heads | {"feed-forward width": config["intermediate_size"], "vocabulary": config["vocab_size"]}


def bloom_widths(config: Config) -> dict[str, int]:
    """The widths of a Bloom that tensor parallelism slices, by their names in messages."""
    inner = 4 * config["hidden_size"]
    return {"attention heads": config["n_head"], "feed-forward width": inner, "vocabulary": config["vocab_size"]}


def llama_computes(config: Config) -> Built:
    """What a Llama of this normalised config computes with."""
    return Built(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        vocabulary=config["vocab_size"],
        activation=config["hidden_act"],
        norm_epsilon=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        window=None,
        padding_row=None,
        rotary=rotary_frequencies(config),
        rotary_scale=1.0,
        alibi=None,
    )


def bloom_computes(config: Config) -> Built:
    """What a Bloom of this normalised config computes with."""
    heads = config["n_head"]
    return Built(
        layers=config["n_layer"],
        heads=heads,
        key_value_heads=heads,
        head_size=config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        activation="gelu_tanh",
        norm_epsilon=config["layer_norm_epsilon"],
        tied=True,
        window=None,
        padding_row=None,
        rotary=None,
        rotary_scale=None,
        alibi=alibi_slopes(heads),
    )


def rotary_frequencies(config: dict[str, Any]) -> list[float]:
    """The angle in radians by which each pair of a head's numbers turns per position.

    The angles are theta^(-2i/d), as in RoFormer (Su et al.). The scaling `linear` divides all of them by a factor, as
    in Position Interpolation (Chen et al.). `llama3` divides the slow ones and blends those in between, as
    `apply_scaling` of Meta's llama-models does.
    """
    rotated = int(config["head_dim"] * config["partial_rotary_factor"])
    plain = float(config["rope_theta"]) ** -(np.arange(0, rotated, 2) / rotated)
    scaling = config["rope_scaling"]
    if scaling is None:
        return plain.tolist()
    if scaling["rope_type"] == "linear":
        return (plain / scaling["factor"]).tolist()
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # Turns within the length that the model was trained for.
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (plain * (kept + (1 - kept) / scaling["factor"])).tolist()


def alibi_slopes(heads: int) -> list[float]:
    """The amount by which each head's scores grow per position, for any number of heads (ALiBi, Press et al.)."""
    whole = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    return slopes + [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole) + 1, 2)]


LLAMA = Family(
    title="Llama",
    shape=LlamaShape,
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    only=LLAMA_ONLY,
    unused=UNUSED,
    tensors=llama_tensors,
    widths=llama_widths,
    computes=llama_computes,
    lora_targets=("q_proj", "k_proj", "v_proj"),
    aliases={},
)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": replace(
        LLAMA,
        title="Qwen2",
        shape=Qwen2Shape,
        architectures=("Qwen2ForCausalLM",),
        only={key: values for key, values in LLAMA_ONLY.items() if key != "sliding_window"} | QKV_BIAS,
        unused=UNUSED | dict.fromkeys(("sliding_window", "max_window_layers"), "counts with use_sliding_window alone"),
        tensors=functools.partial(llama_tensors, biases=True),
    ),
    "glm": replace(
        LLAMA,
        title="ChatGLM2",
        shape=GlmShape,
        architectures=("GlmForCausalLM",),
        only=LLAMA_ONLY | QKV_BIAS,
        tensors=functools.partial(llama_tensors, biases=True, joined_gate=True),
        # PaddleNLP joins q, k and v in one matrix. A LoRA update of it differs from updates of its three parts, so LoRA
        # adapts other modules.
        lora_targets=("o_proj", "gate_up_proj", "down_proj"),
    ),
    "bloom": Family(
        title="Bloom",
        shape=BloomShape,
        architectures=("BloomForCausalLM", "BloomModel"),  # BloomModel: the head is the embedding
        only=ONLY
        | {"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,), "n_inner": ()}
        | {"hidden_act": ("gelu",), "alibi": (True,)}
        | dict.fromkeys((*ROTARY_TABLES, *ROTARY_NAMES), ()),
        unused=BLOOM_UNUSED,
        tensors=bloom_tensors,
        widths=bloom_widths,
        computes=bloom_computes,
        lora_targets=("query_key_value",),
        aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        prefix="transformer.",
    ),
}


def family_of(config: Config) -> Family:
    """The family of a normalised config."""
    return FAMILIES[config["model_type"]]
