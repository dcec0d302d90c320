"""How fast a run will be on GPUs: effective tokens per second, from counted work and a few fitted constants.

A step's seconds are the sum of what its kernels must do: matrix products by FLOPs, everything else by bytes that cross
the GPU's memory or its links. Python's share hides behind the kernels, and shows where it is longer. The counts follow
the code of transformers and of this project's scripts. Four constants for each framework make up for what is
not counted; `python -m tunebench.forecast.speed_points --fit` fits them to published rates (`speed_points.py`).
"""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunebench.flags import Flags
from tunebench.forecast.gpus import GPUS, LINKS, Gpu, Link
from tunebench.models.checkpoint import Checkpoint
from tunebench.plan import Plan

CONSTANTS = Path(__file__).with_name("speed_constants.json")
FITTED_GPU, FITTED_LINK = "a100-80g", "nvlink3"  # of every point
FITTED_SIZES = 3e9, 26e9  # parameters: about half of the smallest point's to twice the largest one's
FITTED_WAYS = {"torch": ("zero2", "zero3"), "paddle": ("zero2", "zero3", "mp")}
# Added to the interval's half width, in logarithms and by squares, for each way in which a run is unlike all points. No
# data stand behind it.
WIDER = 0.2

# Bytes that elementwise kernels move per element in a forward pass, in two-byte types, counted from transformers' code:
# each kernel reads and writes its operands once. Its backward pass moves twice as much. Columns: RMSNorm or LayerNorm,
# rotary embedding, one residual sum, gated unit or GELU.
SEPARATE = {"rms_norm": 36, "layer_norm": 4, "rotary": 18, "residual": 6, "gate": 10, "gelu": 32}
FUSED = SEPARATE | {"rms_norm": 4, "rotary": 4, "gelu": 8}
LORA_BYTES = 6, 14  # of an adapter, per element of its input (dropout, product) and output (product, scale, sum)
O1_GROWTH = 1.5  # with autocast norms, residuals and rotary embedding are float32, and inputs of products are cast
ATTENTION_BYTES = 24, 28  # of eager attention per score, forward and backward: scale, mask, float32 softmax, casts
LOGIT_BYTES = {False: 40, True: 12}  # per logit, both passes; fused kernels or not
# Bytes per trained parameter of a step: clipping, AdamW, and at O2 the float32 gradients and the copy of the weights.
OPTIMIZER_BYTES = {"fp32": 40, "O1": 40, "O2": 52, "pure": 20}
# Operators that Python starts in a layer's forward pass, the more for autocast's casts and for a LoRA module. The
# backward pass starts about as many again and a fifth more.
LAYER_OPERATORS, CAST_OPERATORS, LORA_OPERATORS, BACKWARD_OPERATORS = 45, 14, 6, 1.2
HOOK_OPERATORS = 200  # of a layer in both passes: ZeRO 3 gathers and releases 10 modules, about 10 operators each time
STREAMED = 0.8  # fraction of the memory's bandwidth that weights and the optimizer's kernels reach; assumed
REACHED = 0.75  # fraction of a link's bandwidth that rings of long messages reach; assumed
OVERLAP = 0.25  # DDP and ZeRO 3 send while they compute: hidden behind so much of the kernels' time; assumed
SHARPNESS = 4.0  # of the maximum of kernels and host


class Constants(NamedTuple):
    """The fitted constants of a framework. Fractions are of the maker's figures; times are in seconds.

    - `products`: fraction of the peak FLOP/s.
    - `memory`: of the memory's bandwidth, for elementwise kernels; it also stands for kernels that are not counted.
    - `handling`: of the memory's bandwidth too, for what is sent: buckets, copies and waiting, beside the link's time.
    - `operator`: Python's time for one operator.
    """

    products: float
    memory: float
    handling: float
    operator: float


@dataclass(frozen=True)
class Tokens:
    """Means over steps. `padded`, `squared` and `labels` are of one pass of one replica, the fullest of its turn.

    `squared` is the sum of the squares of its rows' widths; without padding, of its samples' lengths. `effective` are
    the tokens of the whole step.
    """

    padded: float
    squared: float
    effective: float
    labels: float

    @classmethod
    def of(cls, plan: Plan, flags: Flags, first: int = 0) -> "Tokens":
        """The means over the steps of a plan from `first` on. All replicas wait for the fullest."""
        shape = (plan.steps, flags.replicas, flags.accumulation, flags.micro_bsz)
        rows = Rows(*(each.reshape(shape)[first:] for each in Rows.of(plan)))
        return cls.of_rows(rows, plan.padding_free)

    @classmethod
    def of_rows(cls, rows: "Rows", padding_free: bool) -> "Tokens":
        """The means over the steps of rows in the shape (steps, replicas, passes, rows of a pass)."""
        lengths, squares, labels = rows
        if padding_free:
            padded, squared = (each.sum(axis=3).max(axis=1).mean() for each in (lengths, squares))
        else:
            widths = lengths.max(axis=(1, 2, 3))
            padded, squared = lengths.shape[3] * widths.mean(), lengths.shape[3] * (widths**2).mean()
        total = lengths.sum(axis=(1, 2, 3)).mean()
        return cls(float(padded), float(squared), float(total), float(labels.sum(axis=3).max(axis=1).mean()))


class Rows(NamedTuple):
    """Of each row of a plan: its tokens, the sum of its samples' squared lengths, and its labels."""

    lengths: np.ndarray
    squares: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, plan: Plan) -> "Rows":
        """All rows of a plan, float64, (steps x bsz,)."""
        samples = np.diff(plan.offsets).astype(np.float64)
        summed = (np.add.reduceat(each, plan.rows[:-1]) for each in (samples**2, samples - plan.prompt_lengths))
        return cls(np.diff(plan.offsets[plan.rows]).astype(np.float64), *summed)


@dataclass(frozen=True)
class Setup:
    """The numbers of a run that decide its time, beside its tokens. Sizes are those of the whole model.

    - `products`: parameters of the layers that are multiplied. `width`: heads x head size.
    - `trained`, `tensors`: trained parameters, and the number of their tensors.
    - `modules`: those of a layer with LoRA; `adapters`: bytes that their adapters move per token in a forward pass.
    - `per_node`: GPUs of a node. `passes`: micro-batches of a step. `low`: two-byte products.
    - `states`: a key of OPTIMIZER_BYTES. `eager`: separate kernels of attention. `causal`: fused ones skip later keys.
    - `by_label`: logits only where there is a label. `whole_logits`: tensor parallelism gathers them, as a published
      script does. `fused`: see FUSED.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    width: int
    key_width: int
    vocabulary: int
    gated: bool
    rotates: bool
    products: float
    parameters: float
    trained: float
    tensors: int
    modules: int
    adapters: float
    gpus: int = 1
    per_node: int = 1
    zero: int = 0
    mp: int = 1
    passes: int = 1
    low: bool = True
    states: str = "O2"
    recompute: bool = False
    eager: bool = True
    causal: bool = True
    by_label: bool = False
    whole_logits: bool = False
    fused: bool = False


class Speed(NamedTuple):
    """The forecast of a run: the rate and the interval of the timed steps, on all GPUs together.

    `step_seconds` is a mean timed step, and `parts` its seconds by kind. `seconds` are those of all steps of the plan,
    warm-up included; start-up (imports, loading, compiling) is left out.
    """

    effective_tokens_per_second: float
    interval: tuple[float, float]
    step_seconds: float
    seconds: float
    parts: dict[str, float]


def forecast_speed(
    framework: str, method: str, flags: Flags, checkpoint: Checkpoint, plan: Plan, gpu: Gpu, link: Link
) -> Speed:
    """The speed of a run. `method` is `full` or `lora`."""
    setup = setup_of_run(method, flags, checkpoint)
    constants, half = fitted()[framework]
    timed, whole = Tokens.of(plan, flags, flags.warmup_steps), Tokens.of(plan, flags)
    parts = step_parts(constants, setup, timed, gpu, link)
    step = sum(parts.values())
    rate = timed.effective / step
    interval = interval_of(rate, half, len(unlike(framework, flags, setup.parameters, gpu, link)))
    seconds = step_seconds(constants, setup, whole, gpu, link) * plan.steps
    return Speed(rate, interval, step, seconds, parts)


def interval_of(rate: float, half: float, ways: int) -> tuple[float, float]:
    """The interval around a rate. `half` is half its width as a logarithm for runs that are unlike others in no way."""
    factor = math.exp(math.hypot(half, *[WIDER] * ways))
    return rate / factor, rate * factor


def unlike(framework: str, flags: Flags, parameters: float, gpu: Gpu, link: Link) -> list[str]:
    """In what a run is unlike all points that the constants were fitted to. Each entry widens the interval."""
    way = "mp" if flags.mp == flags.world_size else f"zero{flags.zero}" if flags.mp == 1 else "mp and replicas"
    way = "fsdp" if flags.fsdp else way
    return [
        *["another GPU"] * (gpu != GPUS[FITTED_GPU]),
        *["another link"] * (flags.world_size > 1 and link != LINKS[FITTED_LINK]),
        *["several nodes"] * (flags.nnodes > 1),
        *["more than 8 GPUs"] * (flags.world_size > 8),
        *["another size of model"] * (not FITTED_SIZES[0] <= parameters <= FITTED_SIZES[1]),
        *["float32"] * (flags.dtype == "fp32"),
        *["compiled layers"] * flags.compile,
        *["kernels of --lean"] * (flags.lean and framework == "paddle"),
        *["overlapped collectives"] * (flags.overlap and flags.world_size > 1),
        *["sequence parallelism"] * flags.sequence_parallel,
        *["Quick LoRA"] * flags.quick_lora,
        *["fused projections"] * flags.fuse_projections,
        *["another way of splitting"] * (flags.world_size > 1 and way not in FITTED_WAYS[framework]),
        *["fused attention"] * (flags.attention != "eager" and framework == "paddle"),
    ]


def step_seconds(constants: Constants, setup: Setup, tokens: Tokens, gpu: Gpu, link: Link) -> float:
    """The seconds of a step of such tokens."""
    return sum(step_parts(constants, setup, tokens, gpu, link).values())


def step_parts(constants: Constants, setup: Setup, tokens: Tokens, gpu: Gpu, link: Link) -> dict[str, float]:
    """The seconds of a step by kind. `host` is what Python's time adds to the kernels, `communication` what shows."""
    c, s, t = constants, setup, tokens
    peak, bandwidth = c.products * (gpu.low_flops if s.low else gpu.single_flops), c.memory * gpu.memory_bandwidth
    head_tokens = t.labels if s.by_label else t.padded
    products = product_flops(s, t.padded, head_tokens) / peak * s.passes
    attention = (attention_flops(s, t.squared) / peak + attention_bytes(s, t.squared) / bandwidth) * s.passes
    streamed = STREAMED * gpu.memory_bandwidth
    memory = (layer_bytes(s, t.padded) + logit_bytes(s, head_tokens)) / bandwidth + weight_bytes(s) / streamed
    memory *= s.passes
    updated = s.trained / s.mp / (s.gpus / s.mp if s.zero else 1)
    optimizer = updated * OPTIMIZER_BYTES[s.states] / streamed + s.tensors * 4 * c.operator
    kernels = products + attention + memory
    inside, across = sent_bytes(s, t.padded)
    # A ring's bytes cross a node's border once, on the network cards of all its GPUs in the ring.
    rate = link.bandwidth if s.gpus <= s.per_node else min(link.bandwidth, s.per_node / s.mp * gpu.between_nodes)
    sent = (inside / link.bandwidth + across / rate) / REACHED + (inside + across) / (c.handling * gpu.memory_bandwidth)
    if s.zero == 3 or (s.zero == 0 and s.mp == 1):
        sent = max(sent - OVERLAP * kernels, 0.0)
    host = host_seconds(c, s) * s.passes
    both = ((kernels + sent) ** SHARPNESS + host**SHARPNESS) ** (1 / SHARPNESS)
    return {
        "products": products,
        "attention": attention,
        "memory traffic": memory,
        "optimizer": optimizer,
        "communication": sent,
        "host": both - kernels - sent,
    }


def product_flops(s: Setup, tokens: float, head_tokens: float) -> float:
    """FLOPs of a GPU in a pass: 2 for each parameter and token forward, as many by inputs, as many by weights."""
    times = 4 if s.modules else 6
    layers = tokens * s.products * (times + 2 * s.recompute)
    return (layers + head_tokens * s.vocabulary * s.hidden * times) / s.mp


def attention_flops(s: Setup, squared: float) -> float:
    """FLOPs of scores and sums in a pass: 4 s^2 x width a layer; FlashAttention (Dao et al.) computes scores again."""
    forward = 4 * squared * s.width * s.layers / s.mp
    if s.eager:
        return forward * (3 + s.recompute)
    return forward * (3.5 + s.recompute) * (0.5 if s.causal else 1)


def attention_bytes(s: Setup, squared: float) -> float:
    """Bytes that eager attention's matrices of scores move in a pass; fused kernels keep them on the chip."""
    forward, backward = ATTENTION_BYTES
    growth = 1 if s.low else 1.4
    return s.eager * squared * s.heads * s.layers / s.mp * (forward * (1 + s.recompute) + backward) * growth


def layer_bytes(s: Setup, tokens: float) -> float:
    """Bytes of norms, rotary embedding, residual sums and activation in a pass. --mp does not split the first three."""
    of = FUSED if s.fused else SEPARATE
    whole = s.hidden * (2 * of["rms_norm" if s.gated else "layer_norm"] + 2 * of["residual"])
    split = s.rotates * (s.width + s.key_width) * of["rotary"] + s.inner * of["gate" if s.gated else "gelu"]
    growth = 2 if not s.low else O1_GROWTH if s.states == "O1" else 1
    return tokens * s.layers * (whole + (split + s.adapters) / s.mp) * (3 + s.recompute) * growth


def adapter_bytes(modules: Iterable[Sequence[int]]) -> float:
    """Bytes per token that the adapters of these modules, (in, out) each, move in a forward pass."""
    return float(sum(LORA_BYTES[0] * width + LORA_BYTES[1] * out for width, out in modules))


def logit_bytes(s: Setup, tokens: float) -> float:
    """Bytes of the loss in a pass: casts, softmax and their gradients."""
    return tokens * s.vocabulary / (1 if s.whole_logits else s.mp) * LOGIT_BYTES[s.fused]


def weight_bytes(s: Setup) -> float:
    """Bytes of weights in a pass: read forward and backward, gradients written; O1 casts weights and gradients."""
    size = 2 if s.low else 4
    cast = 6 if s.states == "O1" else 0
    forward = size + cast
    backward = size + (0 if s.modules else size + cast)
    return (s.parameters * (forward + backward) + s.products * forward * s.recompute) / s.mp


def sent_bytes(s: Setup, tokens: float) -> tuple[float, float]:
    """Bytes that a GPU sends in a step: within a tensor-parallel group, and between replicas. Rings as in NCCL."""
    low = 2 if s.low else 4
    size = 2 if s.states in ("O2", "pure") else 4
    replicas, ring = s.gpus // s.mp, 1 - 1 / s.mp
    sums = s.layers * (4 + 2 * s.recompute) * 2 * tokens * s.hidden * low
    logits = 2 * s.whole_logits * tokens * s.vocabulary * low / 2
    inside = (sums + logits) * ring * s.passes if s.mp > 1 else 0.0
    weights, gradients, ring = size * s.parameters / s.mp, size * s.trained / s.mp, 1 - 1 / replicas
    if s.zero == 3:
        return inside, (weights * (2 + s.recompute) + gradients) * ring * s.passes
    of_step = size * s.trained / s.mp if s.zero else gradients
    return inside, (gradients * (s.passes if s.zero == 2 else 1) + of_step) * ring


def host_seconds(c: Constants, s: Setup) -> float:
    """Python's time in a pass of forward and backward."""
    forward = LAYER_OPERATORS + CAST_OPERATORS * (s.states == "O1") + LORA_OPERATORS * s.modules
    operators = forward * (1 + s.recompute + BACKWARD_OPERATORS) + HOOK_OPERATORS * (s.zero == 3)
    return s.layers * operators * c.operator


def setup_of_run(method: str, flags: Flags, checkpoint: Checkpoint) -> Setup:
    """The setup of these flags."""
    sizes = sizes_of(json.dumps(checkpoint.config), flags.lora_r if method == "lora" else 0)
    return replace(
        sizes,
        gpus=flags.world_size,
        per_node=flags.nproc,
        zero=flags.zero,
        mp=flags.mp,
        passes=flags.accumulation,
        low=flags.dtype != "fp32",
        states=flags.amp or "fp32",
        recompute=flags.recompute,
        eager=flags.attention == "eager",
        causal=sizes.rotates,  # Bloom's bias keeps kernels from skipping later keys
        by_label=flags.head == "labels",
        fused=flags.compile,
    )


@functools.lru_cache(maxsize=64)
def sizes_of(config: str, lora_r: int) -> Setup:
    """The setup of a model on one GPU, from its normalised config as JSON. `lora_r` is 0 without LoRA."""
    checkpoint = Checkpoint(Path(), json.loads(config), [], "")
    built, hidden, tensors = checkpoint.expected, checkpoint.config["hidden_size"], checkpoint.tensors
    adapted = [shape for name, shape in tensors.items() if name.split(".")[-2] in checkpoint.family.lora_targets]
    trained = sum(lora_r * sum(shape) for shape in adapted if len(shape) == 2)
    modules = sum(len(shape) == 2 for shape in adapted) // built.layers
    return Setup(
        layers=built.layers,
        hidden=hidden,
        inner=checkpoint.config.get("intermediate_size", 4 * hidden),
        heads=built.heads,
        width=built.heads * built.head_size,
        key_width=built.key_value_heads * built.head_size,
        vocabulary=built.vocabulary,
        gated=built.activation == "silu",
        rotates=built.rotary is not None,
        products=checkpoint.work.matmul_parameters - built.vocabulary * hidden,
        parameters=checkpoint.parameters,
        trained=trained if lora_r else checkpoint.parameters,
        tensors=2 * modules * built.layers if lora_r else len(tensors),
        modules=modules if lora_r else 0,
        adapters=adapter_bytes([shape[::-1] for shape in adapted if len(shape) == 2]) / built.layers if lora_r else 0,
    )


@functools.cache
def fitted() -> dict[str, tuple[Constants, float]]:
    """Each framework's constants, and the half width of the interval as a logarithm."""
    found = json.loads(CONSTANTS.read_text())
    return {name: (Constants(**each["constants"]), math.log(each["interval_factor"])) for name, each in found.items()}
