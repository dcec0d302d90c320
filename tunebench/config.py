"""Reads a checkpoint's config.json into one normalised config, from which both sides build their model.

Every key of the file is mapped to a field, or known to have no effect on the model, or refused by name and value: a key
that one framework reads and the other ignores would train two models.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tunebench.errors import BadInput
from tunebench.record import Built

Count = Annotated[int, Field(gt=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, lt=10_000)]
Epsilon = Annotated[float, Field(gt=0, lt=10)]
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]  # -1: there is none
PADDLE_MOST_TABLES = 32 * 2**30  # bytes: those of a model of 8 billion parameters with a million positions
PADDLE_LARGEST_EPSILON = 1e-3  # paddle/phi/infermeta/ternary.cc, LayerNormInferMeta
SHOWN = 80  # characters of a refused value


class Shape(BaseModel):
    """Fields of all families. Numbers in quotes and booleans are no numbers here."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model_type: str
    hidden_size: Count
    vocab_size: Count
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None


class LlamaShape(Shape):
    """A decoder with rotary embedding, RMSNorm and a gated feed-forward layer; defaults are transformers'."""

    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Annotated[float, Field(ge=1, lt=1e15)] = 10000.0
    rope_scaling: dict[str, Any] | None = None  # as `_rotary` gives it
    partial_rotary_factor: Literal[1.0] = 1.0
    hidden_act: Literal["silu", "swish"] = "silu"  # two names of one function
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
    """Qwen2: Llama with biases at q, k and v. Both libraries take a missing num_key_value_heads for 32."""

    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32768


class GlmShape(LlamaShape):
    """Glm, which PaddleNLP has as ChatGLMv2: half of each head is rotated."""

    num_key_value_heads: Count | None = 2
    head_dim: Count | None = 128
    max_position_embeddings: Count = 131072
    rms_norm_eps: Epsilon = 1.5625e-7
    partial_rotary_factor: Literal[0.5] = 0.5
    tie_word_embeddings: Literal[False] = False


class BloomShape(Shape):
    """Bloom: ALiBi, LayerNorm, biases everywhere, and a head that is the embedding."""

    n_layer: Layers
    n_head: Count
    layer_norm_epsilon: Epsilon = 1e-5
    tie_word_embeddings: Literal[True] = True

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.n_head:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of n_head {self.n_head}")
        return self


class Family(NamedTuple):
    """How the config.json of a family is read.

    `architectures` are the spellings of its causal language model, `aliases` other names of a field, `only` the keys
    that have to have one of a few values, and `unused` those without effect, each with the reason.
    """

    shape: type[Shape]
    architectures: tuple[str, ...]
    aliases: dict[str, str]
    only: dict[str, tuple[Any, ...]]
    unused: dict[str, str]


def _by_key(reasons: dict[str, str]) -> dict[str, str]:
    """The reason of each key, from the keys of each reason."""
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
# Of all families: what would be another model, or another task, in the values that mean that it is not.
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
# Where rotary embedding is described: in one of these, or at the top level, by these names.
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
# What each kind of scaling needs; `rope_type` None is "default".
ROTARY_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROTARY_OPTIONS = ("rope_theta", "partial_rotary_factor", "rope_type", *ROTARY_KINDS["llama3"])
FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaShape, ("LlamaForCausalLM", "LLaMAForCausalLM"), {}, LLAMA_ONLY, UNUSED),
    "qwen2": Family(
        Qwen2Shape,
        ("Qwen2ForCausalLM",),
        {},
        {k: v for k, v in LLAMA_ONLY.items() if k != "sliding_window"}
        | {"attention_bias": (True,), "qkv_bias": (True,)},
        UNUSED | dict.fromkeys(("sliding_window", "max_window_layers"), "counts with use_sliding_window alone"),
    ),
    "glm": Family(
        GlmShape,
        ("GlmForCausalLM",),
        {},
        LLAMA_ONLY | {"attention_bias": (True,), "qkv_bias": (True,)},
        UNUSED,
    ),
    "bloom": Family(
        BloomShape,
        ("BloomForCausalLM", "BloomModel"),  # whose head is its embedding
        {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        ONLY
        | {"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,), "n_inner": ()}
        | {"hidden_act": ("gelu",), "alibi": (True,)}
        | dict.fromkeys((*ROTARY_TABLES, *ROTARY_NAMES), ()),
        BLOOM_UNUSED,
    ),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The normalised config of a checkpoint folder: the fields of its family's shape. Raises `BadInput`."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; a checkpoint folder has config.json beside its safetensors files") from None
    except RecursionError:
        raise BadInput(f"{path} is not readable JSON (its brackets are nested too deep)") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} is not readable JSON ({error})") from None
    try:
        return normalise(raw)
    except ValueError as fault:
        raise BadInput(f"{path}: {fault}") from None


def normalise(raw: Any) -> dict[str, Any]:
    """The fields of a config, from the content of its config.json. ValueError names the key, its value and why not."""
    name = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(name, str) or name not in FAMILIES:
        hint = "; PaddleNLP 3.0.0b4 has no Qwen3" if name == "qwen3" else ""
        raise ValueError(f"model_type {_shown(name)} is not offered; use one of {', '.join(FAMILIES)}{hint}")
    family, raw = FAMILIES[name], dict(raw)
    _check_architectures(raw.pop("architectures", None), family)
    fields: dict[str, tuple[str, Any]] = {}  # by field: the key that gave it, and its value
    rotary = {key: raw.pop(key) for key in (*ROTARY_TABLES, *ROTARY_NAMES) if key in raw and name != "bloom"}
    for key, value in raw.items():
        field = family.aliases.get(key, key)
        if field in family.shape.model_fields:
            _put(fields, field, key, value)
        elif key in family.only:
            values = value if key == "layer_types" and isinstance(value, list) else [value]
            if not all(any(_same(each, allowed) for allowed in (None, *family.only[key])) for each in values):
                raise ValueError(_not_offered(key, value, family.only[key]))
        elif key not in family.unused:
            raise ValueError(
                f"{key if key.isprintable() else repr(key)} {_shown(value)} is not offered: it is not known what this "
                "key does to the model; remove it if it does nothing"
            )
    if name != "bloom":
        fields |= _rotary(rotary)
    try:
        given = {field: value for field, (_, value) in fields.items()}
        _check_kinds(fields)
        optional = ("num_key_value_heads", "head_dim")  # null has a meaning of its own there
        shape = family.shape.model_validate({k: v for k, v in given.items() if v is not None or k in optional})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if not first["loc"]:
            raise ValueError(first["msg"].removeprefix("Value error, ")) from None
        field = str(first["loc"][0])
        key, value = fields.get(field, (field, None))
        raise ValueError(f"{key} {_shown(value)} is not offered: {first['msg']}") from None
    return shape.model_dump()


def paddle_lacks(config: dict[str, Any]) -> str | None:
    """What of a normalised config PaddleNLP's model of the family does not compute; None where it does all."""
    family = config["model_type"]
    if family == "bloom":
        if config["layer_norm_epsilon"] > PADDLE_LARGEST_EPSILON:
            return (
                f"Paddle 3.3.1 has layer norms with an epsilon of at most {PADDLE_LARGEST_EPSILON:g}, and "
                f"layer_norm_epsilon is {config['layer_norm_epsilon']:g}"
            )
        return None
    tables = paddle_table_bytes(config)
    if tables > PADDLE_MOST_TABLES:
        return (
            f"PaddleNLP 3.0.0b4 keeps rotary tables of all positions (max_position_embeddings, times the factor of "
            f"linear scaling): {tables / 2**30:,.0f} GiB here, of at most {PADDLE_MOST_TABLES / 2**30:.0f} offered"
        )
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return (
            f"PaddleNLP 3.0.0b4 derives the head size from hidden_size, and head_dim is {config['head_dim']} here, not "
            f"{config['hidden_size'] // config['num_attention_heads']}"
        )
    if family != "llama" and config["rope_scaling"]:
        return f"PaddleNLP 3.0.0b4 does not scale the rotary embedding of {family}"
    if family == "glm" and config["rope_theta"] != 10000:
        return f"PaddleNLP 3.0.0b4 has the rotary base 10000 alone in ChatGLMv2, not {config['rope_theta']:g}"
    return None


def paddle_table_bytes(config: dict[str, Any]) -> int:
    """Bytes of PaddleNLP's float32 cosines and sines of all positions, which Llama and Qwen2 keep in each layer."""
    scaling = config["rope_scaling"] or {}
    positions = config["max_position_embeddings"]
    if scaling.get("rope_type") == "linear":
        positions *= scaling["factor"]
    layers = 1 if config["model_type"] == "glm" else config["num_hidden_layers"]
    return int(positions * layers * config["head_dim"] * config["partial_rotary_factor"]) * 2 * 4


def expected_model(config: dict[str, Any]) -> Built:
    """What a model of this normalised config has to compute with; both sides' models are compared with it."""
    if config["model_type"] == "bloom":
        heads, size = config["n_head"], config["hidden_size"] // config["n_head"]
        return Built(
            layers=config["n_layer"],
            heads=heads,
            key_value_heads=heads,
            head_size=size,
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


def rotary_frequencies(config: dict[str, Any]) -> list[float]:
    """By how many radians each pair of a head's numbers is turned per position.

    theta^(-2i/d) as in RoFormer; `linear` divides all of them (Chen et al., Position Interpolation); `llama3` divides
    the slow ones and blends those between, as in Meta's llama-models `apply_scaling`.
    """
    rotated = int(config["head_dim"] * config["partial_rotary_factor"])
    plain = float(config["rope_theta"]) ** -(np.arange(0, rotated, 2) / rotated)
    scaling = config["rope_scaling"]
    if scaling is None:
        return plain.tolist()
    if scaling["rope_type"] == "linear":
        return (plain / scaling["factor"]).tolist()
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the length it was trained for
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (plain * (kept + (1 - kept) / scaling["factor"])).tolist()


def alibi_slopes(heads: int) -> list[float]:
    """By how much each head's scores grow per position (Press et al., ALiBi, for any number of heads)."""
    whole = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    return slopes + [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole) + 1, 2)]


def _rotary(given: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """The fields `rope_theta`, `rope_scaling` and `partial_rotary_factor` from all the places that describe them."""
    found: dict[str, tuple[str, Any]] = {}
    for table in ROTARY_TABLES:
        content = given.get(table)
        if content is None:
            continue
        if not isinstance(content, dict):
            raise ValueError(f"{table} {_shown(content)} is not offered: it has to be an object")
        for key, value in content.items():
            name = "rope_type" if key == "type" else key
            if name not in ROTARY_OPTIONS and value is not None:
                raise ValueError(f"{table}.{key} {_shown(value)} is not offered; kinds are {', '.join(ROTARY_KINDS)}")
            _put(found, name, f"{table}.{key}", value)
    for key, name in ROTARY_NAMES.items():
        if key == "rope_scaling_factor" and given.get("rope_scaling_type") is None and _same(given.get(key), 1):
            continue  # PaddleNLP's default
        if key in given:
            _put(found, name, key, given[key])
    kind_key, kind = found.pop("rope_type", ("rope_scaling.rope_type", None))
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in ROTARY_KINDS:
        raise ValueError(f"{kind_key} {_shown(kind)} is not offered; use one of {', '.join(ROTARY_KINDS)}")
    fields = {name: found.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in found}
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in ROTARY_KINDS[kind]:
        key, value = found.pop(name, (name, None))
        if value is None:
            raise ValueError(f"{kind_key} {_shown(kind)} needs {name}, which is missing")
        least = 1 if name == "factor" else 1e-9
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e9:
            raise ValueError(f"{key} {_shown(value)} is not offered: use a number of {least:g} to 1e9")
        scaling[name] = value
    # The length that a model was trained for may be told of a model without scaling, too.
    key, value = found.pop("original_max_position_embeddings", ("", None))
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
        raise ValueError(f"{key} {_shown(value)} is not offered: it has to be a number above 0")
    for key, value in found.values():
        if value is not None:
            raise ValueError(f"{key} {_shown(value)} is not offered without a kind of scaling that has it")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor {scaling['low_freq_factor']} is not offered: it has to be below high_freq_factor "
            f"{scaling['high_freq_factor']}"
        )
    return fields | ({} if kind == "default" else {"rope_scaling": (kind_key, scaling)})


def _check_kinds(fields: dict[str, tuple[str, Any]]) -> None:
    """Raises ValueError where a number stands for true or false, or the other way round: Python finds them equal."""
    for field, kind in (("tie_word_embeddings", "true or false"), ("partial_rotary_factor", "a number")):
        key, value = fields.get(field, (field, None))
        if value is not None and isinstance(value, bool) != (kind == "true or false"):
            raise ValueError(f"{key} {_shown(value)} is not offered: it has to be {kind}")


def _check_architectures(value: Any, family: Family) -> None:
    """Raises ValueError where a config is of another task or model; old spellings of this one are known."""
    named = [] if value is None else value
    if not isinstance(named, list) or not all(name in family.architectures for name in named):
        raise ValueError(
            f"architectures {_shown(value)} is not offered; use {' or '.join(family.architectures)}, or leave it out"
        )


def _put(fields: dict[str, tuple[str, Any]], field: str, key: str, value: Any) -> None:
    """Keeps the value of a field; ValueError where another key gave it another value."""
    before, known = fields.get(field, (key, None))
    if known is not None and value is not None and not _same(known, value):
        raise ValueError(f"{key} {_shown(value)} contradicts {before} {_shown(known)}; keep one of them")
    if value is not None or field not in fields:
        fields[field] = key, value


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal; false is not 0, but 1 is 1.0."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _not_offered(key: str, value: Any, allowed: Sequence[Any]) -> str:
    use = f"use {' or '.join(map(_shown, allowed))}, or leave it out" if allowed else "leave it out"
    return f"{key} {_shown(value)} is not offered; {use}"


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _without_twins(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found
