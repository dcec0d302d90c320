"""Says where a framework does not support a run. Such a run is a result: the status `unsupported` with the reason.

The reasons name the installed versions.
"""

from collections.abc import Callable
from importlib import metadata
from typing import Any

from tunebench.bootstrap import has_instructions
from tunebench.flags import Flags
from tunebench.frameworks import FRAMEWORKS
from tunebench.hardware import visible_accelerators
from tunebench.models.checkpoint import Checkpoint

NAMES = {  # how sentences name a distribution; paddlepaddle-gpu goes by paddlepaddle's name
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "deepspeed": "DeepSpeed",
    "paddlepaddle": "Paddle",
    "paddlenlp": "PaddleNLP",
    "paddleformers": "PaddleFormers",
}
PADDLE_MOST_TABLES = 32 * 2**30  # bytes: a model of 8 billion parameters with a million positions needs this much
PADDLE_LARGEST_EPSILON = 1e-3  # paddle/phi/infermeta/ternary.cc, LayerNormInferMeta


def named(distribution: str) -> str:
    """A library with its version, such as `peft 0.21.2`. The name alone where it is not installed here."""
    for name in (distribution, f"{distribution}-gpu"):
        try:
            return f"{NAMES[distribution]} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return NAMES[distribution]


def heads_left(flags: Flags, checkpoint: Checkpoint) -> str | None:
    """Why --mp cannot slice the model: it does not divide its heads. None where it can. Both need whole heads."""
    needed = {name: width for name, width in checkpoint.widths.items() if "heads" in name}
    for name, width in needed.items():
        if width % flags.mp:
            smaller = range(1, min(flags.mp, width + 1))
            works = [str(mp) for mp in smaller if not any(width % mp for width in needed.values())]
            return f"--mp {flags.mp} does not divide the model's {width} ({name}); use {' or '.join(works)}"
    return None


def not_offered(
    framework: str, method: str, flags: Flags, checkpoint: Checkpoint, library: str | None = None
) -> str | None:
    """Why the framework does not support the run; None where it does. `library` is `other_library`'s."""
    if reason := heads_left(flags, checkpoint):
        return reason
    families = FRAMEWORKS[framework].families
    if families is not None and checkpoint.config["model_type"] not in families:
        return f"{FRAMEWORKS[framework].title} has no {checkpoint.family.title} here, but {', '.join(families)}"
    lacks = OF_A_LIBRARY.get(library or framework, ())
    return next((reason for each in lacks if (reason := each(method, flags, checkpoint))), None)


def _torch_lacks(method: str, flags: Flags, checkpoint: Checkpoint) -> str | None:
    config, built = checkpoint.config, checkpoint.expected
    if method == "lora" and flags.mp > 1 and config["model_type"] == "glm":
        return (
            f"{named('peft')} and {named('transformers')} each slice LoRA's A of a layer that tensor parallelism cuts "
            "by its inputs, so that it no longer fits"
        )
    if flags.fuse_projections:
        return f"{named('transformers')} has no model of these families with q, k and v in one weight"
    if flags.quick_lora:
        return f"{named('peft')} has no layer that adds the adapters' product to the weights in each pass"
    if built.alibi and flags.padding_free and flags.attention == "eager":
        return f"{named('transformers')} has no positions in Bloom's eager attention to tell samples apart by"
    if flags.plan or visible_accelerators():
        # torch's flash kernels take grouped queries, but no float32. Its fused float32 kernels take no grouped queries.
        if flags.attention == "sdpa" and flags.dtype == "fp32" and built.key_value_heads != built.heads:
            return f"{named('torch')} has no fused attention in float32 on GPUs for grouped queries"
    elif flags.deepspeed and flags.weights_dtype == "float16" and not multiplies_float16():
        return f"{named('deepspeed')} refuses float16 weights on CPUs that do not compute in it (AVX512-FP16)"
    return None


def _paddlenlp_lacks(method: str, flags: Flags, checkpoint: Checkpoint) -> str | None:
    family = checkpoint.config["model_type"]
    if lacking := paddle_lacks(checkpoint.config):
        return lacking
    if family in ("bloom", "glm") and flags.padding_free:
        return f"{named('paddlenlp')} has no function for attention alone in this model, to call for each sample"
    if family == "glm" and flags.head == "labels":
        return f"{named('paddlenlp')} has no layer for the logits alone in ChatGLMv2"
    if flags.sequence_parallel and family == "bloom":
        return f"{named('paddlenlp')} has no sequence parallelism in Bloom"
    if flags.quick_lora and flags.mp > 1:  # _get_reduce_op(ReduceOp.SUM, "_c_identity") in lora_quick_layers.py
        return (
            f"Quick LoRA of {named('paddlenlp')} with --mp calls a function as {named('paddlepaddle')} does not have it"
        )
    if flags.fuse_projections and method == "lora":
        return f"LoRA adapts q, k and v each here, and {named('paddlenlp')} would make them one weight"
    if flags.fuse_projections and family not in ("llama", "qwen2"):
        return f"{named('paddlenlp')} has no choice of projections in this model"
    return None


def _paddleformers_lacks(method: str, flags: Flags, checkpoint: Checkpoint) -> str | None:
    former, config = named("paddleformers"), checkpoint.config
    if config["model_type"] == "qwen2":
        return f"{former} builds Qwen2 with PaddleFleet, a package that PyPI does not have"
    if config["model_type"] != "llama":
        return f"{former} has no {checkpoint.family.title}"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return f"{former} has heads of hidden_size ÷ their number alone, and head_dim is {config['head_dim']} here"
    if flags.quick_lora:
        return f"{former} has no layer that adds the adapters' product to the weights in each pass"
    if flags.fuse_projections:
        return f"{former} has no choice of projections in this model"
    return None


def _paddle_lacks(method: str, flags: Flags, checkpoint: Checkpoint) -> str | None:
    for name, width in checkpoint.widths.items():
        if width % flags.mp:  # transformers allows a shorter last slice
            return (
                f"{named('paddlepaddle')} slices into equal parts, and --mp {flags.mp} does not divide {width} ({name})"
            )
    if flags.sharding:
        return f"{named('paddlepaddle')} has a sharding of its own, neither DeepSpeed's nor FSDP2; leave --sharding out"
    if flags.compile:
        return (
            f"{named('paddlepaddle')} has no compiler for CPUs (its wheel is built without CINN), and that for GPUs "
            "was not tried"
        )
    if flags.plan or visible_accelerators():
        if flags.attention == "sdpa" and flags.dtype == "fp32" and checkpoint.expected.alibi:
            return (
                f"{named('paddlepaddle')} has fused attention with a bias in float32 on GPUs for some widths of a "
                "batch alone"
            )
    elif flags.dtype != "fp32":
        return (
            f"{named('paddlepaddle')} has no {flags.compute_dtype} kernels for CPUs: there autocast silently computes "
            "in float32, and a model in that dtype stops at its first linear layer"
        )
    return None


def multiplies_float16() -> bool:
    """Whether the processor has AVX512-FP16, with which float16 was tried. DeepSpeed itself asks oneDNN."""
    return has_instructions({"avx512_fp16"})


def paddle_lacks(config: dict[str, Any]) -> str | None:
    """Why PaddleNLP's model does not compute what a normalised config says; None where it does."""
    family = config["model_type"]
    if family == "bloom":
        if config["layer_norm_epsilon"] > PADDLE_LARGEST_EPSILON:
            return (
                f"{named('paddlepaddle')} has layer norms with an epsilon of at most {PADDLE_LARGEST_EPSILON:g}, and "
                f"layer_norm_epsilon is {config['layer_norm_epsilon']:g}"
            )
        return None
    tables = paddle_table_bytes(config)
    if tables > PADDLE_MOST_TABLES:
        return (
            f"{named('paddlenlp')} keeps rotary tables of all positions (max_position_embeddings, times the factor of "
            f"linear scaling): {tables / 2**30:,.0f} GiB here, of at most {PADDLE_MOST_TABLES / 2**30:.0f} offered"
        )
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return (
            f"{named('paddlenlp')} derives the head size from hidden_size, and head_dim is {config['head_dim']} here, "
            f"not {config['hidden_size'] // config['num_attention_heads']}"
        )
    if family != "llama" and config["rope_scaling"]:
        return f"{named('paddlenlp')} does not scale the rotary embedding of {family}"
    if family == "glm" and config["rope_theta"] != 10000:
        return f"{named('paddlenlp')} has the rotary base 10000 alone in ChatGLMv2, not {config['rope_theta']:g}"
    return None


def paddle_table_bytes(config: dict[str, Any]) -> int:
    """Bytes of PaddleNLP's float32 cosines and sines of all positions. Llama and Qwen2 keep them in each layer."""
    scaling = config["rope_scaling"] or {}
    positions = config["max_position_embeddings"]
    if scaling.get("rope_type") == "linear":
        positions *= scaling["factor"]
    layers = 1 if config["model_type"] == "glm" else config["num_hidden_layers"]
    return int(positions * layers * config["head_dim"] * config["partial_rotary_factor"]) * 2 * 4


# By `other_library`, or by the framework with its usual library.
OF_A_LIBRARY: dict[str, tuple[Callable[[str, Flags, Checkpoint], str | None], ...]] = {
    "torch": (_torch_lacks,),
    "paddle": (_paddlenlp_lacks, _paddle_lacks),
    "PaddleFormers": (_paddleformers_lacks, _paddle_lacks),
}
