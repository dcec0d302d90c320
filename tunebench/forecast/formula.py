"""The memory of a run by formula, in microseconds and without a framework.

The passes are terms of a table (`passes`), made by benchmarks/passes.py from the same traces as a forecast's. What
sharding makes of weights, gradients and states is counted here, as DeepSpeed and Paddle have it.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunebench.flags import WITHOUT_FORMULA, Flags
from tunebench.forecast.memory import PARTS, Memory, largest_batch, with_unseen
from tunebench.forecast.passes import AT_END, AT_FORWARD_END, WEIGHTS, Logit, Passes, passes_of
from tunebench.forecast.shares import Shares, Split, Weight
from tunebench.forecast.symbols import Kind
from tunebench.models.checkpoint import Checkpoint
from tunebench.models.families import FAMILIES
from tunebench.plan import Plan
from tunebench.recipe import SMALLEST_BUCKET
from tunebench.run.unsupported import paddle_table_bytes

NAMED = (AT_FORWARD_END, AT_END, WEIGHTS)
# DeepSpeed's defaults for ZeRO 3, in elements: weights that stay gathered, and those updated at once
# (`max_live_parameters` and `sub_group_size` in deepspeed/runtime/zero/config.py).
MOST_GATHERED = UPDATED_AT_ONCE = 10**9
SAMPLE_REPLICAS = 2, 8, 64  # for which Paddle's table is made

Amounts = dict[str, float]  # bytes by kind of tensor


class Shape(NamedTuple):
    """A micro-batch: rows, their width, positions with a label, and the sum of the squares of the samples' lengths.

    With padding the last one is of the rows' widths.
    """

    rows: int
    width: int
    labels: int
    squares: int


class Run(NamedTuple):
    """What a formula needs of a run. The bytes and numbers of weights are those of a process before ZeRO."""

    flags: Flags
    checkpoint: Checkpoint
    method: str
    shape: Shape
    low: bool  # weights and gradients in two bytes
    weight_bytes: float
    trained_bytes: float
    by_kind: dict[str, np.ndarray]
    phases: list[str]

    @property
    def width(self) -> int:
        """Bytes of a trained weight, and of its gradient."""
        return 2 if self.low else 4

    @property
    def trained(self) -> float:
        """Trained weights of a process."""
        return self.trained_bytes / self.width

    def at(self, phase: str) -> Amounts:
        """What is held beyond what lasts at a named moment."""
        i = self.phases.index(phase)
        return {kind: float(amounts[i]) for kind, amounts in self.by_kind.items()}

    @property
    def carried(self) -> Amounts:
        """What the last pass leaves to the update, gradients left out."""
        end = self.at(AT_END)
        return {kind: end.get(kind, 0.0) for kind in ("logits_and_loss", "activations")}


def predict(framework: str, method: str, flags: Flags, checkpoint: Checkpoint, plan: Plan) -> Memory | None:
    """The memory of one GPU in a step with the plan's largest micro-batch; None where the table lacks such runs."""
    found = tensors_of(framework, method, flags, checkpoint, plan)
    return found and with_unseen(found)


def tensors_of(framework: str, method: str, flags: Flags, checkpoint: Checkpoint, plan: Plan) -> Memory | None:
    """As `predict`, the tensors alone."""
    batch = largest_batch(flags, plan)
    rows, width = batch.input_ids.shape
    squares = rows * width**2 if batch.lengths is None else sum(length**2 for length in batch.lengths)
    return memory_of(framework, method, flags, checkpoint, Shape(rows, width, len(batch.labelled), squares))


def memory_of(framework: str, method: str, flags: Flags, checkpoint: Checkpoint, shape: Shape) -> Memory | None:
    """The memory of one GPU in a step with such a micro-batch; None where the table lacks such runs."""
    kind = kind_of(framework, method, flags, checkpoint)
    passes = None if any(getattr(flags, name) for name in WITHOUT_FORMULA) else passes_of(framework, kind)
    if passes is None:
        return None
    run = run_of(method, flags, checkpoint, shape, passes, Logit.of(framework, kind.types))
    held, moments, accumulated = OF_FRAMEWORK[framework](run)
    phase, most = max(moments, key=lambda each: sum(each[1].values()))
    parts = {kind: round(held.get(kind, 0) + most.get(kind, 0)) for kind in PARTS}
    return Memory(
        peak=sum(parts.values()),
        parts=parts,
        held={kind: round(size) for kind, size in held.items()},
        kept=max(0, round(run.at(AT_FORWARD_END).get("activations", 0))),
        accumulated=round(accumulated),
        moment=phase,
    )


def kind_of(framework: str, method: str, flags: Flags, checkpoint: Checkpoint) -> Kind:
    """The kind of a run in the table. Kinds that make the same tensors share an entry."""
    family = checkpoint.config["model_type"]
    return Kind(
        family="llama" if family == "qwen2" and framework == "torch" else family,  # they differ by small biases
        tied=method == "full" and is_tied(checkpoint),  # without gradients it makes none
        method=method,
        types=flags.amp or "fp32",
        attention="eager" if flags.attention == "eager" else "sdpa",  # both fused kernels keep the same
        padding_free=flags.padding_free,
        recompute=flags.recompute,
        head=flags.head,
        mp=flags.mp > 1,
        # Paddle's are added in `paddle_step`, FSDP2's slices in `fsdp_step`.
        adds=framework == "torch" and flags.accumulation > 1 and not flags.fsdp,
        lean=framework == "paddle" and flags.lean and family != "bloom",
    )


def kinds_of_runs(framework: str) -> Iterator[Kind]:
    """All kinds that the table of a framework has, also of runs that it does not offer."""
    switch = (False, True)
    for family, tied, method in itertools.product(FAMILIES, switch, ("full", "lora")):
        left_out = tied and (method == "lora" or family == "glm")
        if left_out or (family, tied, method) == ("bloom", False, "full") or (family, framework) == ("qwen2", "torch"):
            continue
        of_layers = itertools.product(("fp32", "O1", "O2"), ("eager", "sdpa"), switch, switch)
        splits = itertools.product((("all", False), ("all", True), ("labels", False)), switch)
        for (types, attention, free, recompute), ((head, mp), adds) in itertools.product(of_layers, splits):
            if not adds or framework == "torch":
                for lean in switch[: 1 + (framework == "paddle" and family != "bloom")]:
                    yield Kind(family, tied, method, types, attention, free, recompute, head, mp, adds, lean)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding."""
    return bool(checkpoint.config.get("tie_word_embeddings"))


def run_of(method: str, flags: Flags, checkpoint: Checkpoint, shape: Shape, passes: Passes, logit: Logit) -> Run:
    """The run, with the bytes of its passes."""
    built, config, mp = checkpoint.expected, checkpoint.config, flags.mp
    sizes = {
        "mp": mp,
        "kv": built.key_value_heads / mp,
        "group": built.heads / built.key_value_heads,
        "joined": built.heads / built.key_value_heads + 2,
        "head": built.head_size,
        "hidden": config["hidden_size"] / built.heads,
        "inner": config.get("intermediate_size", 0) / mp,
        "vocabulary": config["vocab_size"] / mp,
        **shape._asdict(),
        "rank": flags.lora_r,
    }
    by_kind = passes.by_kind(sizes, built.layers, logit)
    weights = passes.phases.index(WEIGHTS)
    low = flags.amp == "O2"
    total = float(by_kind["weights"][weights])
    if method == "lora" and is_tied(checkpoint) and checkpoint.config["model_type"] != "bloom":
        total -= config["vocab_size"] / mp * config["hidden_size"] * (2 if low else 4)
    return Run(flags, checkpoint, method, shape, low, total, float(by_kind["trained"][weights]), by_kind, passes.phases)


def largest(run: Run, rows: np.ndarray, by_kind: Mapping[str, np.ndarray]) -> tuple[str, Amounts]:
    """The phase and the bytes by kind of that moment, among `rows`, which holds most."""
    i = int(rows[np.sum([amounts[rows] for amounts in by_kind.values()], axis=0).argmax()])
    return run.phases[i], {kind: float(amounts[i]) for kind, amounts in by_kind.items()}


def of_passes(run: Run) -> np.ndarray:
    """The rows of the passes' moments."""
    return np.array([i for i, phase in enumerate(run.phases) if phase not in NAMED])


def at_moments(framework: str, by_kind: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """All bytes at each moment, for each way in which sharding lets them count."""
    if framework == "torch":
        ways = [by_kind, without(by_kind, "gradients")]
    else:
        ways = [paddle_amounts(by_kind, *way) for way in ((False, 1), (True, 1), *((True, n) for n in SAMPLE_REPLICAS))]
        ways += [paddle_amounts(by_kind, False, n) for n in SAMPLE_REPLICAS]
    return [np.sum([*without(way, WEIGHTS, "trained").values()], axis=0) for way in ways]


def without(by_kind: Mapping[str, np.ndarray], *left_out: str) -> dict[str, np.ndarray]:
    """The other kinds."""
    return {kind: amounts for kind, amounts in by_kind.items() if kind not in left_out}


class Step(NamedTuple):
    """What lasts between two steps, what is held beyond it at the `moments` that may be the peak, with their phases.

    `accumulated` are the bytes of gradients when the last backward pass ends.
    """

    held: Amounts
    moments: list[tuple[str, Amounts]]
    accumulated: float


def torch_step(run: Run) -> Step:
    """A step with PyTorch."""
    flags, config, zero = run.flags, run.checkpoint.config, run.flags.zero
    hidden, replicas = config["hidden_size"], flags.replicas
    passing = without(run.by_kind, WEIGHTS, "trained")
    rows, carried = of_passes(run), run.carried
    held: Amounts = {
        "weights": run.weight_bytes,
        "master_weights": 4 * run.trained * run.low,
        "moments": 8 * run.trained,
    }
    if not zero:
        # DDP's buckets hold a copy of all gradients. With --mp those of transformers' replicas hold one of all weights.
        if replicas > 1:
            held["communication_buffers"] = run.trained_bytes if flags.mp == 1 else run.weight_bytes
        update = carried | {"gradients": 4 * run.trained}  # precision.py casts one after the other
        if run.low and run.method == "full" and not is_tied(run.checkpoint):
            update["workspace"] = 2 * config["vocab_size"] * hidden / flags.mp
        return Step(held, [largest(run, rows, passing), ("update", update)], run.trained_bytes)
    if flags.fsdp:
        return fsdp_step(run)
    share = run.trained / replicas
    own = share if run.method == "lora" else first_share(json.dumps(config), replicas)
    bucket = run.width * max(hidden * hidden, SMALLEST_BUCKET)
    held |= {"master_weights": 4 * share, "moments": 8 * share}
    flat = (4 + 2 * run.low) * share
    if zero < 3:
        of_step = run.width * own
        done = carried | {"communication_buffers": bucket, "gradients": of_step}
        if zero == 1:
            done["gradients"] += run.trained_bytes
            rows_held: Amounts = {}
        else:
            passing = without(passing, "gradients")
            adds = flags.accumulation > 1
            rows_held = {"gradients": of_step * adds}
            done["communication_buffers"] += of_step * adds
        phase, most = largest(run, rows, passing)
        update = carried | {"gradients": of_step, "workspace": flat}
        return Step(held, [(phase, added(most, rows_held)), ("backward", done), ("update", update)], of_step)
    held |= {"weights": run.weight_bytes / replicas, "gradients": run.width * share, "workspace": bucket}
    gathered = MOST_GATHERED + 2 * bucket / run.width  # and what it fetches ahead
    phase, most = largest(run, rows, without(passing, "gradients"))
    most = added(most, {"communication_buffers": min(run.weight_bytes, run.width * gathered)})
    if run.method == "lora":
        most = added(most, {"activations": kept_inputs(run)})
    at_once = (4 + 2 * run.low) * min(share, UPDATED_AT_ONCE)
    return Step(held, [(phase, most), ("update", carried | {"workspace": at_once})], run.width * share)


def fsdp_step(run: Run) -> Step:
    """A step with FSDP2: slices of everything last, and a layer's weights and gradients are whole for a while.

    What is in no layer is whole from the forward pass on until all its gradients are there. In the backward pass stage
    3 has two layers, one that computes and the next one; stage 2 has all whose turn is still to come. The gradients of
    a layer are copied to send them (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py).
    """
    flags, config, layers = run.flags, run.checkpoint.config, run.checkpoint.expected.layers
    frozen, share = run.weight_bytes - run.trained_bytes, run.trained / flags.replicas
    kept = frozen if flags.zero == 2 else 0.0  # whole on each process
    weights = kept + (frozen - kept) / flags.replicas + 4 * share
    held: Amounts = {"weights": weights, "master_weights": 0, "moments": 8 * share}
    matrix = run.width * config["vocab_size"] * config["hidden_size"]  # of the embedding, and of a head of its own
    outside = matrix * (1 if is_tied(run.checkpoint) else 2)
    trained_outside, head = (outside, matrix) if run.method == "full" else (0.0, 0.0)
    outside = trained_outside if kept else outside
    layer = (run.weight_bytes - kept - outside) / layers
    trained_layer = (run.trained_bytes - trained_outside) / layers
    slices = 4 / run.width / flags.replicas  # of gradients, in float32
    earlier = 4 * share if flags.accumulation > 1 else 0.0  # those of earlier passes, to which slices are added
    passing = without(run.by_kind, WEIGHTS, "trained")
    nothing = np.zeros(len(run.phases))
    logits, done = (passing.get(kind, nothing) for kind in ("logits_and_loss", "gradients"))
    in_layers = logits <= 1.01 * run.carried["logits_and_loss"]
    sent = np.minimum(np.maximum(done - head, 0) // trained_layer, layers)
    whole = 2.0 * in_layers if flags.zero == 3 else layers - sent
    passing["communication_buffers"] = outside + layer * whole + trained_layer * (sent > 0)
    passing["gradients"] = done - sent * trained_layer + (earlier or sent * trained_layer * slices)
    moments = [largest(run, of_passes(run), passing)]
    # The table has the moments of the last layer, where the backward pass begins. The layer before has fewer
    # activations and finds the gradients of the last one.
    first = np.flatnonzero(in_layers & (sent == 0) & (done >= head) & [each == "backward" for each in run.phases])
    if len(first) and layers > 1:
        phase, most = largest(run, first, passing)
        fewer = run.at(AT_FORWARD_END)["activations"] / layers
        own = {"activations": -fewer, "gradients": 0 if earlier else trained_layer * slices}
        own["communication_buffers"] = trained_layer - layer * (flags.zero == 2)
        moments.append((phase, added(most, own)))
    of_layers = earlier or layers * trained_layer * slices
    ends = [  # the last gradient is there; then those outside the layers are sent
        {"gradients": of_layers + trained_outside, "communication_buffers": outside + trained_layer},
        {"gradients": 4 * share + head, "communication_buffers": trained_outside * (1 + 1 / flags.replicas)},
    ]
    moments += [("backward", run.carried | end) for end in ends]
    return Step(held, [*moments, ("update", run.carried | {"gradients": 4 * share})], 4 * share)


def kept_inputs(run: Run) -> float:
    """Bytes of the inputs of frozen layers without an adapter, which ZeRO 3's own linear function keeps all the same.

    See LinearFunctionForZeroStage3 in deepspeed/runtime/zero/linear.py. Layers side by side have one input.
    """
    checkpoint = run.checkpoint
    kept: dict[tuple[str, bool, int], bool] = {}  # by input, whether an adapter keeps it
    for name, shape in checkpoint.tensors.items():
        *_, part, module, _ = ("", "", *name.split("."))  # a short name, as lm_head.weight, has no part
        if len(shape) == 2 and part in ("self_attn", "self_attention", "mlp"):
            place = part, module in ("o_proj", "dense"), shape[1]
            kept[place] = kept.get(place, False) or module in checkpoint.family.lora_targets
    widths = sum(width for (_, _, width), adapted in kept.items() if not adapted)
    layers = 1 if run.flags.recompute else checkpoint.expected.layers
    return layers * widths * run.shape.rows * run.shape.width * (4 if run.flags.dtype == "fp32" else 2)


def added(*amounts: Mapping[str, float]) -> Amounts:
    """The sums by kind."""
    return {kind: sum(each.get(kind, 0.0) for each in amounts) for kind in {k for each in amounts for k in each}}


@functools.lru_cache(maxsize=256)
def first_share(config: str, replicas: int) -> int:
    """Elements of the parameters that reach into the first process's share: it has whole gradients of these.

    `config` is a normalised config as JSON.
    """
    sizes = [weight.size for weight in weights_of(config, 0, 4)]
    share, taken = sum(sizes) / replicas, 0
    for size in sizes:
        if taken >= share:
            break
        taken += size
    return taken


@functools.lru_cache(maxsize=64)
def weights_of(config: str, lora_r: int, width: int) -> list[Weight]:
    """The parameters of a model in its order, with `width` bytes an element. `lora_r` is 0 without LoRA."""
    checkpoint = Checkpoint(Path(), json.loads(config), [], "")
    weights = []
    for name, shape in checkpoint.tensors.items():
        weights.append(Weight(int(np.prod(shape)), width, not lora_r))
        if lora_r and len(shape) == 2 and name.split(".")[-2] in checkpoint.family.lora_targets:
            weights += [Weight(lora_r * side, width, True) for side in shape[::-1]]
    return weights


def paddle_step(run: Run) -> Step:
    """A step with Paddle."""
    flags, config = run.flags, run.checkpoint.config
    lasting = paddle_lasting(run)
    held = {**lasting.held, "workspace": paddle_table_bytes(config) if "rope_theta" in config else 0}
    replicas = flags.replicas if flags.zero == 3 else 1
    rows = of_passes(run)
    phase, most = largest(run, rows, paddle_amounts(run.by_kind, lasting.adds_up, replicas))
    more = {"communication_buffers": lasting.in_passes}
    if lasting.adds_up and not held["gradients"]:
        more["gradients"] = lasting.gradients
    moments = [(phase, added(most, more)), ("optimizer", {**run.carried, **lasting.in_update})]
    return Step(held, moments, held["gradients"] + lasting.in_update["gradients"])


class Lasting(NamedTuple):
    """What `Shares` says of a run."""

    held: Mapping[str, float]
    in_passes: float
    in_update: Mapping[str, float]
    gradients: float
    adds_up: bool


def paddle_lasting(run: Run) -> Lasting:
    """What one process holds between two steps, in passes and in the update."""
    flags, config = run.flags, run.checkpoint.config
    if flags.mp > 1:
        largest_weight = config["vocab_size"] * config["hidden_size"] // flags.mp if run.method == "full" else 0
        elements = [largest_weight, round(run.trained) - largest_weight]
        frozen = round((run.weight_bytes - run.trained_bytes) / run.width)
        weights = [*(Weight(each, run.width, True) for each in elements), Weight(frozen, run.width, False)]
        return lasting(Shares(Split.of(flags), weights, config["hidden_size"], run.low))
    rank = flags.lora_r if run.method == "lora" else 0
    return lasting_of(json.dumps(config), rank, run.low, Split.of(flags)._replace(passes=min(2, flags.accumulation)))


@functools.lru_cache(maxsize=1024)
def lasting_of(config: str, lora_r: int, low: bool, split: Split) -> Lasting:
    """What lasts in a run without tensor parallelism."""
    weights = weights_of(config, lora_r, 2 if low else 4)
    return lasting(Shares(split, weights, json.loads(config)["hidden_size"], low))


def lasting(shares: Shares) -> Lasting:
    """What shares say."""
    return Lasting(shares.held(), shares.in_passes(), shares.in_update(), shares.gradients, shares.adds_up)


def paddle_amounts(by_kind: Mapping[str, np.ndarray], adds_up: bool, replicas: int) -> dict[str, np.ndarray]:
    """The bytes by kind of PARTS at each moment, as `timeline` in paddle/forecast.py. `replicas`: ZeRO 3's, or 1."""
    nothing = np.zeros_like(next(iter(by_kind.values())))
    found = {kind: by_kind.get(kind, nothing) for kind in PARTS}
    found["gradients"] = nothing if adds_up else found["gradients"] / replicas
    sliced = replicas > 1
    if adds_up or sliced:
        found["workspace"] = found["workspace"] + by_kind.get("new_gradient", nothing) * (1 + sliced)
    if sliced:
        gathered, copied, tied = (by_kind.get(kind, nothing) for kind in ("gathered", "copied", "tied"))
        found["workspace"] = found["workspace"] + np.maximum(gathered, copied) + 2 * tied
    return found


OF_FRAMEWORK = {"torch": torch_step, "paddle": paddle_step}
