"""Forecasts the memory of one GPU: the script's own step runs on tensors that have shapes and no data.

The script's `build_model`, `wrap`, `to_device`, `losses.total` and `parallel` run under torch's FakeTensorMode, for one
rank of the setup over a process group that sends nothing. DeepSpeed and FSDP2 are the real ones. So a change of the
script, of transformers or of DeepSpeed changes the forecast. `Ledger` notes when each tensor's memory is taken and
freed.

What differs from a GPU: tensors are on the CPU device, whose fused attention kernels keep the same tensors as the
flash kernels do. --compile is left out: compiled layers hold less. DistributedDataParallel needs real tensors: its
buckets are counted by formula.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import held
import losses
import numpy as np
import parallel
import torch
import torch.distributed
import transformers
import weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.utils.loading_report import LoadStateDictInfo

from tunebench.flags import Flags
from tunebench.forecast.layers import Moment
from tunebench.forecast.memory import PARTS, Memory, largest_batch
from tunebench.forecast.symbols import Amounts, add_up, term
from tunebench.models.checkpoint import Checkpoint
from tunebench.models.hollow import STORED, write_hollow
from tunebench.plan import MicroBatch
from tunebench.run.run import Job

ROUNDED = 512  # bytes: torch's allocator for GPUs gives multiples of it
# Operators that read a number back, and what they are told: all is finite, nothing overflowed.
READ_BACK = {
    torch.ops.aten._local_scalar_dense.default: lambda tensor: 1.0 if tensor.dtype.is_floating_point else 0,
    torch.ops.aten.equal.default: lambda *_: False,
    torch.ops.aten.is_nonzero.default: lambda *_: False,
}
DEVICE = torch.ops.prim.device.default
# The flash kernels' backward pass sums the queries' gradient in float32, in a buffer that no operator shows
# (`dq_accum` in pytorch/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp).
FLASH_BACKWARD = ("flash_attention_for_cpu_backward", "varlen_attn_backward")


@functools.cache
def traits_of(operator: Any) -> tuple[bool, bool]:
    """Whether an operator makes no tensor (layers alike differ in these), and whether it is a flash backward pass."""
    makes_none = operator.namespace in ("prim", "profiler") or operator is torch.ops.aten.detach.default
    return makes_none, any(sign in operator.name() for sign in FLASH_BACKWARD)


class Allocation:
    """The memory of one tensor: its bytes, its kind, and between which operations it was held.

    `labelled` is when a later operation told its kind, as for a gradient when it is complete.
    """

    __slots__ = ("born", "died", "kind", "labelled", "size")

    def __init__(self, kind: str, size: int, born: int) -> None:
        self.kind, self.size, self.born, self.died, self.labelled = kind, size, born, math.inf, born


class Ledger(TorchDispatchMode):
    """Notes each allocation of the tensors that operators return. `phase` names what the script is doing.

    Views and what is written in place take no memory of their own.
    """

    def __init__(self, vocabulary: set[int], rounded: int) -> None:
        """`vocabulary` has the last dimensions of logits on this rank. Bytes are multiples of `rounded`."""
        super().__init__()
        self.vocabulary, self.rounded = vocabulary, rounded
        self.phase = "build"
        self.clock = 0  # operations so far
        self.results: list[tuple[Any, list[torch.Size]]] = []  # of each, the operator and the shapes of its results
        self.live: dict[int, tuple[Allocation, weakref.ref]] = {}  # by the address of a storage
        self.all: list[Allocation] = []
        self.phases: list[tuple[int, str]] = []  # where each begins

    def enter(self, phase: str) -> None:
        """Starts a phase."""
        self.phase = phase
        self.phases.append((self.clock, phase))

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator is DEVICE:
            return args[0].fake_device  # DeepSpeed asks a hundred times for each weight
        if DTensor in types:
            return NotImplemented  # it comes again with each rank's own tensors
        if operator in READ_BACK:
            return READ_BACK[operator](*args)
        if operator is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as on a device; without data it would be a copy
        result = operator(*args, **(kwargs or {}))
        makes_none, is_flash_backward = traits_of(operator)
        if makes_none:
            return result
        self.clock += 1
        leaves = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
        made = [each for each in leaves if isinstance(each, torch.Tensor) and each.device.type != "meta"]
        self.results.append((operator, [each.shape for each in made]))
        for tensor in made:
            self.note(tensor, operator)
        if is_flash_backward:
            buffer = Allocation("workspace", 4 * args[1].numel(), self.clock)
            buffer.died = self.clock + 1
            self.all.append(buffer)
        return result

    def kind_of(self, operator: Any, tensor: torch.Tensor) -> str:
        """The kind of a new tensor, by the phase and its shape."""
        if self.phase in ("build", "wrap", "update"):
            return "workspace"
        forward = self.phase in ("forward", "loss")
        if tensor.dim() and (tensor.shape[-1] in self.vocabulary or (forward and tensor.shape[0] in self.vocabulary)):
            return "logits_and_loss"  # of the second kind is the head's gradient that --head labels makes ahead
        if tensor.dim() == 1 and operator is torch.ops.aten.empty.memory_format:
            return "communication_buffers"  # DeepSpeed's: buckets, and weights that it gathers
        if self.phase == "loss":
            return "logits_and_loss"
        # In the backward pass only recomputation runs with gradients enabled.
        return "activations" if forward or torch.is_grad_enabled() else "workspace"

    def name(self, operation: int) -> str:
        """The name of an operation, with the shapes of its results."""
        operator, shapes = self.results[operation]
        return " ".join([operator.name(), *(str([*shape]) for shape in shapes)])

    def note(self, tensor: torch.Tensor, maker: Any) -> None:
        """Notes the memory behind a tensor, unless it is known. `maker` is its operator, or the tensor's kind."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        kind = maker if isinstance(maker, str) else self.kind_of(maker, tensor)
        self.live[key] = self.taken(kind, storage.nbytes()), weakref.ref(storage, lambda _: self.end(key))

    def taken(self, kind: str, size: int) -> Allocation:
        """Notes memory that is taken now, of so many bytes before they are rounded."""
        made = Allocation(kind, math.ceil(size / self.rounded) * self.rounded, self.clock)
        self.all.append(made)
        return made

    def end(self, key: int) -> None:
        """Notes that the memory behind a storage is freed."""
        made, _ = self.live.pop(key)
        made.died = self.clock + 1

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Notes that a storage is given other memory, or none, as FSDP2 does with what it gathers."""
        if (known := self.live.get(storage._cdata)) is not None:
            known[0].died = self.clock + 1
            self.live[storage._cdata] = self.taken(known[0].kind, size), known[1]

    def label(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Says of which kind the memory behind these tensors is."""
        for tensor in tensors:
            own = parallel.local(tensor)
            self.note(own, kind)
            made = self.live[own.untyped_storage()._cdata][0]
            if made.kind != kind:
                made.kind, made.labelled = kind, self.clock

    def held(self) -> dict[str, int]:
        """The bytes that are held now, by kind."""
        sizes = dict.fromkeys(PARTS, 0)
        for made, _ in self.live.values():
            sizes[made.kind] += made.size
        return sizes

    def peak(self, first: int) -> tuple[dict[str, int], str]:
        """The bytes by kind at the moment, from operation `first` on, at which most is held; and the phase then."""
        alive = [each for each in self.all if each.died > first]
        changes = np.zeros(self.clock + 2, dtype=np.int64)
        for each in alive:
            changes[max(each.born, first)] += each.size
            if each.died <= self.clock:
                changes[int(each.died)] -= each.size
        moment = int(np.cumsum(changes)[: self.clock + 1].argmax())
        sizes = dict.fromkeys(PARTS, 0)
        for each in alive:
            if each.born <= moment < each.died:
                sizes[each.kind] += each.size
        return sizes, [name for start, name in self.phases if start < moment][-1]


class Step(NamedTuple):
    """A traced step, from operation `first` of the ledger on.

    `between` is held before it, by kind. `kept` are the activations when the last forward pass ends, and `accumulated`
    the gradients when the last backward pass does. `weights` and, of them, `trained` are the bytes of each on this
    rank.
    """

    ledger: Ledger
    first: int
    between: dict[str, int]
    kept: int
    accumulated: int
    weights: list[int]
    trained: list[int]


def forecast(job: Job, build_model: Callable, wrap: Callable, to_device: Callable) -> Memory:
    """The memory of one GPU in a step with the plan's largest micro-batch."""
    flags = job.flags
    replicated = flags.zero == 0 and flags.mp == 1 and flags.replicas > 1
    batch, passes = largest_batch(flags, job.plan), min(flags.accumulation, 2)  # a second pass adds to gradients
    if replicated:
        flags = flags.model_copy(update={"nproc": 1, "nnodes": 1, "bsz": flags.bsz // flags.replicas})
    step = trace(flags, job.checkpoint, batch, passes, ROUNDED, build_model, wrap, to_device)
    parts, moment = step.ledger.peak(step.first)
    if replicated:
        # Its buckets hold a copy of all gradients (gradient_as_bucket_view in torch/nn/parallel/distributed.py).
        buckets = sum(step.trained)
        parts["communication_buffers"] += buckets
        step.between["communication_buffers"] += buckets
    return Memory(
        peak=sum(parts.values()),
        parts=parts,
        held=step.between,
        kept=step.kept,
        accumulated=step.accumulated,
        moment=moment,
    )


def trace(
    flags: Flags,
    checkpoint: Checkpoint,
    batch: MicroBatch,
    passes: int,
    rounded: int,
    build_model: Callable,
    wrap: Callable,
    to_device: Callable,
) -> Step:
    """What a step of so many passes of the batch makes and frees. Bytes are rounded up to multiples of `rounded`."""
    flags = flags.model_copy(update={"compile": False})
    with joined(flags) as group, without_collector(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's calls of older functions, and of addresses of tensors
        shapes = FakeTensorMode(allow_non_fake_inputs=True)
        with without_start_values():
            model = build(flags, checkpoint, group, shapes, build_model)
        parameters = [*model.parameters()]
        trainable = [p for p in parameters if p.requires_grad]
        ledger = Ledger(vocabulary_sizes(flags, checkpoint), rounded)
        with shapes, ledger, converted_in_place(), unnoted_propagation(), noted_resizes(ledger):
            ledger.label([*model.parameters(), *model.buffers()], "weights")
            ledger.enter("wrap")
            model, optimizer = wrap(flags, model, trainable, group)
            for parameter in trainable:
                parameter.register_hook(lambda gradient: ledger.label([gradient], "gradients"))
            make_moments(model, optimizer, trainable, group, ledger)
            between, kept, accumulated, first = ledger.held(), 0, 0, 0
            # DeepSpeed records in the first step which weights the layers need, and gathers them ahead in the second.
            for _ in range(2 if flags.zero == 3 and group.deepspeed else 1):
                label_states(model, optimizer, ledger)
                first, between = ledger.clock, ledger.held()
                for each in range(passes):
                    parallel.sync_gradients(model, each == passes - 1, group)
                    ledger.enter("forward")
                    inputs, labels = on_shapes(to_device(flags, batch, group.device), shapes)
                    outputs = model(**inputs)
                    kept = ledger.held()["activations"] - between["activations"]
                    ledger.enter("loss")
                    loss = losses.total(flags, outputs, labels, group) / 2
                    ledger.enter("backward")
                    parallel.backward(model, loss, group)
                    ledger.enter("passed")
                    ledger.label(held.gradients(model, optimizer), "gradients")
                accumulated = ledger.held()["gradients"]
                ledger.enter("update")
                parallel.update(model, optimizer, trainable, group)
    return Step(ledger, first, between, kept, accumulated, *map(local_bytes, (parameters, trainable)))


def local_bytes(parameters: Iterable[torch.nn.Parameter]) -> list[int]:
    """The bytes of each parameter on this rank."""
    return [parallel.local(each).numel() * each.element_size() for each in parameters]


def moments(
    flags: Flags, checkpoint: Checkpoint, batch: MicroBatch, build_model: Callable, wrap: Callable, to_device: Callable
) -> tuple[list[Moment[Amounts]], Amounts]:
    """What each operator of the passes finds beyond what is held between two steps, and the weights on this rank.

    Both are in terms of the sizes in tunebench/forecast/symbols.py. Gradients that are complete are a kind of their
    own: sharding changes these. The kinds of the second are `weights` and, those of them that are trained, `trained`.
    """
    step = trace(flags, checkpoint, batch, min(flags.accumulation, 2), 1, build_model, wrap, to_device)
    ledger, columns, changes = step.ledger, {}, []
    for each in ledger.all:
        if each.died <= step.first + 1 or (made := term(each.size)) is None:
            continue
        spans = [(each.kind, each.born, each.died)]
        if each.kind == "gradients" and each.labelled > step.first:
            spans = [("workspace", each.born, each.labelled + 1), ("gradients", each.labelled + 1, each.died)]
        for kind, born, died in spans:
            column = columns.setdefault((kind, made[0]), len(columns))
            changes.append((max(int(born), step.first) - step.first, column, made[1]))
            if died <= ledger.clock:
                changes.append((int(died) - step.first, column, -made[1]))
    table = np.zeros((ledger.clock - step.first + 2, len(columns)))
    for when, column, size in changes:
        table[when, column] += size
    table = table.cumsum(axis=0)
    held = table[0]
    spans = itertools.pairwise(ledger.phases)
    phase_of = {clock: name for (begin, name), (end, _) in spans for clock in range(begin, end)}

    def amounts(row: np.ndarray) -> Amounts:
        return {column: row[i] for column, i in columns.items() if abs(row[i]) > 1e-9}

    found = [
        Moment(phase_of[clock], ledger.name(clock - 1), amounts(table[clock - step.first] - held))
        for clock in range(step.first + 1, ledger.phases[-1][0])
        if phase_of[clock] != "passed"
    ]
    weights = add_up(("weights", size) for size in step.weights)
    return found, weights | add_up(("trained", size) for size in step.trained)


@contextlib.contextmanager
def joined(flags: Flags) -> Iterator[parallel.Group]:
    """The place of rank 0 in the setup. Its process group sends nothing, and each operation returns at once."""
    before = os.environ.copy()
    if flags.world_size > 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(flags.world_size))
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=flags.world_size)
    group = parallel.place_of(flags, torch.device("cpu"), 0)
    if group.deepspeed:
        deepspeed = parallel.import_deepspeed()
        from deepspeed.runtime.zero import partitioned_param_coordinator

        deepspeed.init_distributed(dist_init_required=False)
        # The ranks cannot be asked whether they agree.
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
        # The CPU stands for a GPU, which has kernels for float16.
        type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda _: True
    yield group
    if flags.world_size > 1:
        torch.distributed.destroy_process_group()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def build(
    flags: Flags, checkpoint: Checkpoint, group: parallel.Group, shapes: FakeTensorMode, build_model: Callable
) -> torch.nn.Module:
    """The script's model on tensors without data.

    transformers slices a model for tensor parallelism before it loads the weights. Loading is left out: the files that
    it is given have no data. Models of one rank alone need no files.
    """
    if flags.mp == 1:
        with shapes, converted_in_place(), replaced(weights, "load", made_from_config):
            return build_model(flags, checkpoint, group)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hollow(folder, checkpoint.config, STORED[flags.weights_dtype])
        sliced = dataclasses.replace(checkpoint, folder=folder, files=sorted(folder.glob("*.safetensors")))
        with converted_in_place(), replaced(transformers.PreTrainedModel, "_load_pretrained_model", left_unloaded):
            model = build_model(flags, sliced, group)
    known: dict[torch.Tensor, torch.Tensor] = {}  # tied weights stay one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = known[tensor] if tensor in known else on_cpu(tensor, shapes)
                    known[tensor] = tensors[name]
    return model


@contextlib.contextmanager
def without_start_values() -> Iterator[None]:
    """Leaves LoRA's matrices as they are. Those of a tensor-parallel model are real, and peft draws values for them."""
    with (
        replaced(parallel, "fill", lambda *_: None),
        replaced(torch.nn.init, "kaiming_uniform_", lambda tensor, **_: tensor),
    ):
        yield


def left_unloaded(model: torch.nn.Module, *_: Any) -> tuple[LoadStateDictInfo, None]:
    """Stands in for transformers' loading of a model on the meta device, which stays there."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return LoadStateDictInfo(**nothing, error_msgs=[], conversion_errors={}, skipped_pp_keys=set()), None


def on_cpu(tensor: torch.Tensor, shapes: FakeTensorMode) -> torch.Tensor:
    """A tensor without data of the same shape and, for a slice, with the same place."""
    with shapes, torch.no_grad():
        made = torch.empty_like(parallel.local(tensor), device="cpu")
    if isinstance(tensor, DTensor):
        place = tensor.device_mesh, tensor.placements
        made = DTensor.from_local(made, *place, run_check=False, shape=tensor.shape, stride=tensor.stride())
    return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made


def made_from_config(config: transformers.PreTrainedConfig, _: Checkpoint, **how: Any) -> torch.nn.Module:
    """Stands in for `weights.load`: a model without weights. With ZeRO 3 transformers makes this rank's slices."""
    return transformers.AutoModelForCausalLM.from_config(config, **how)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute meanwhile."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def converted_in_place() -> contextlib.AbstractContextManager[None]:
    """Lets Module.to and its like work on tensors without data, which torch cannot swap."""

    def convert(self: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
        for child in self.children() if recurse else ():
            convert(child, function)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter is None or parameter.is_meta:
                    continue
                if (made := function(parameter)).dtype != parameter.dtype:
                    self._parameters[name] = torch.nn.Parameter(made, parameter.requires_grad)
        return self

    return replaced(torch.nn.Module, "_apply", convert)


def unnoted_propagation() -> contextlib.AbstractContextManager[None]:
    """Hides from the ledger the tensors of whole size with which DTensor finds out the shape of a result."""
    name = "_propagate_tensor_meta_non_cached"
    own = getattr(ShardingPropagator, name)

    def propagate(*given: Any) -> Any:
        with _disable_current_modes():
            return own(*given)

    return replaced(ShardingPropagator, name, propagate)


def noted_resizes(ledger: Ledger) -> contextlib.AbstractContextManager[None]:
    """Tells the ledger of memory that is taken and freed by the size of a storage. No operator does that."""
    own = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        ledger.resize(storage, size)
        return own(storage, size)

    return replaced(torch.UntypedStorage, "resize_", resize)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Python's collector would go through all modules again and again; tensors are freed without it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def make_moments(
    model: torch.nn.Module, optimizer: Any, trainable: list[torch.nn.Parameter], group: parallel.Group, ledger: Ledger
) -> None:
    """Lets the optimizer make its moments, by a step with gradients of zero. Later steps find them."""
    if group.deepspeed:
        inner = optimizer.optimizer
        for parameters in inner.param_groups:
            for parameter in parameters["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        return
    ledger.enter("update")
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    parallel.update(model, optimizer, trainable, group)


def label_states(model: torch.nn.Module, optimizer: Any, ledger: Ledger) -> None:
    """Tells the ledger which tensors are weights, master weights, moments and lasting gradients."""
    kinds = {
        "gradients": held.gradients(model, optimizer),
        "master_weights": held.masters(optimizer),
        "moments": held.moments(optimizer),
        "weights": [tensor for trains in (True, False) for tensor in held.weights(model, trains)],
    }
    for kind, tensors in kinds.items():
        ledger.label([tensor for tensor in tensors if tensor.numel()], kind)


def vocabulary_sizes(flags: Flags, checkpoint: Checkpoint) -> set[int]:
    """The last dimension of logits: all of them, or the slice of a tensor-parallel rank."""
    vocabulary = checkpoint.config["vocab_size"]
    return {vocabulary, vocabulary // flags.mp}


def on_shapes(
    given: tuple[dict[str, Any], torch.Tensor], shapes: FakeTensorMode
) -> tuple[dict[str, Any], torch.Tensor]:
    """A batch without its data. A padding-free one names the samples' ends as for a GPU's kernel."""
    inputs, labels = given
    samples = inputs.get("samples")
    if samples is not None:
        samples.ends = torch.zeros(len(samples.lengths) + 1, dtype=torch.int32)
    tensors = {k: shapes.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return tensors, shapes.from_tensor(labels)
