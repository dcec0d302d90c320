"""Forecasts how many bytes a training step holds on one GPU, on a machine without one.

The script's own functions build the model without weights and run its passes into a static program. Such a program
needs shapes and dtypes, no kernels and no memory. Paddle generates static and dynamic gradients from one description
(ops.yaml, backward.yaml), so that what the program's backward operators read is what dynamic gradients keep. A value
counts from the operator that makes it to the last one that reads it. A view counts as what it is a view of.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import attention
import losses
import paddle
import paddle.nn.functional as F
import parallel
import weights
from paddle.amp import amp_lists
from paddle.autograd import PyLayer
from paddle.autograd.ir_backward import grad
from paddle.base import core
from paddle.base.dygraph.base import _switch_to_static_graph_
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group as ProcessGroup
from paddle.distributed.fleet.base import topology
from paddle.distributed.fleet.layers.mpu.random import RNGStatesTracker
from paddle.distributed.fleet.utils.sequence_parallel_utils import AllGatherOp, GatherOp, ReduceScatterOp, ScatterOp
from paddle.jit.dy2static.utils import _convert_into_value as to_value
from paddle.jit.dy2static.utils import graph_tracing_guard
from paddle.nn.functional import sdpa
from paddle.pir import core as pir_core
from paddle.utils import flatten as tree_leaves
from paddle.utils import map_structure as tree_map
from paddlenlp.transformers.model_utils import no_init_weights

from tunebench.flags import Flags
from tunebench.forecast.layers import Moment, pairs
from tunebench.forecast.memory import PARTS, Memory, largest_batch
from tunebench.forecast.shares import Shares, Split, Weight
from tunebench.forecast.symbols import Amounts, add_up
from tunebench.models.checkpoint import Checkpoint
from tunebench.plan import MicroBatch
from tunebench.run.run import Job

# Views of their first input in a dynamic graph: with FLAGS_use_stride_kernel, on by default, more than the reshaping
# operators (paddle/phi/kernels/stride). What is set in a slice is the tensor that it is set in.
VIEWS = {
    *("reshape", "squeeze", "unsqueeze", "flatten", "transpose", "slice", "split", "split_with_num", "unbind"),
    *("expand", "share_data", "mp_allreduce_sum", "set_value_with_tensor"),
}
# Gradients that overwrite what they are computed from (`inplace` in backward.yaml), as sums of gradients do
# (GradTensorHolder::add). Only their first output does.
IN_PLACE = {
    *("reshape_grad", "squeeze_grad", "unsqueeze_grad", "flatten_grad", "transpose_grad"),
    *("add_grad", "add_n", "softmax_grad", "cross_entropy_with_softmax_grad"),
}
FUSED = {"flash_attn": 4, "flashmask_attention": 4, "memory_efficient_attention": 3}  # attention: numbers of results
# They sum the gradient by the queries, which are in low precision, in float32 (`dq_accum` in FlashAttnBwdParamsV2,
# paddle/phi/kernels/gpu/flash_attn_utils.h).
FLASH_GRADIENTS = {"flash_attn_grad", "flashmask_attention_grad"}
RESHAPING = {"reshape", "flatten", "reshape_grad", "flatten_grad"}
# Names of operators in autocast's lists, where they differ (phi::TransToFluidOpName).
IN_LISTS = {
    "embedding": "lookup_table_v2",
    "mean": "reduce_mean",
    "sum": "reduce_sum",
    "cross_entropy_with_softmax": "softmax_with_cross_entropy",
    "flashmask_attention": "flash_attn",
}
T = TypeVar("T")
KINDS = ("gradients", "activations", "logits_and_loss", "communication_buffers", "workspace")


class Operator(NamedTuple):
    """An operator: the values that it makes and has as inputs, and those of the latter whose bytes it reads."""

    name: str
    inputs: list[str]
    outputs: list[str]
    reads: list[str]


class Program(NamedTuple):
    """The operators of a forward and a backward pass in order. `loss` and `backward` are where these two begin.

    `sizes` has the bytes of each value, `wide` those with an entry for each word of the vocabulary. The loop
    holds the model's `outputs` until the next pass has its own, and with its loss the graph, whose hooks hold `kept`,
    the inputs of recomputed layers.
    """

    operators: list[Operator]
    loss: int
    backward: int
    sizes: dict[str, int]
    wide: set[str]
    weights: set[str]
    parameters: set[str]
    gradients: set[str]
    outputs: set[str]
    kept: set[str]


def forecast(job: Job, build_model: Callable, wrap: Callable, to_device: Callable) -> Memory:
    """The bytes on the GPU that holds most, at the peak of a step after the first.

    `wrap` is called as in one process, for the optimizer; what several processes add is in `Shares`. Layers are all
    alike, and the time to write a program grows with the square of its length: passes are written down with two and
    with three of them, or with one and two. Raises RuntimeError where layers differ.
    """
    flags, config = job.flags.model_copy(update={"quick_lora": False}), job.checkpoint.config  # it keeps less
    batch = largest_batch(flags, job.plan)
    group = parallel.Group("cpu", 0, 1, 0, flags.mp, parallel.Clip(0, None), None)
    rotary = "rope_theta" in config and config["model_type"] != "glm"  # tables of all positions are real, in each layer
    positions = config["max_position_embeddings"] if rotary else 1
    less = {"max_position_embeddings": min(positions, batch.input_ids.shape[1])} if rotary else {}
    depth = "n_layer" if "n_layer" in config else "num_hidden_layers"

    def build(layers: int) -> paddle.nn.Layer:
        checkpoint = dataclasses.replace(job.checkpoint, config=config | less | {depth: layers})
        return build_lazily(flags, checkpoint, build_model, group)

    with as_on_a_gpu(flags):
        whole = build(config[depth])
        trained = [each for each in whole.parameters() if not each.stop_gradient]
        _, optimizer = wrap(flags, whole, trained, group)
        sizes = [
            Weight(each.size, core.size_of_dtype(each.dtype), not each.stop_gradient) for each in whole.parameters()
        ]
        shares = Shares(Split.of(flags), sizes, config["hidden_size"], optimizer._multi_precision)
        inputs, labels = to_device(flags, batch, "cpu")
        traces = []
        fewest = min(2, config[depth])
        for layers in (fewest, fewest + 1):
            tracer = Tracer(build(layers), config["vocab_size"] // flags.mp, flags)
            program = _switch_to_static_graph_(tracer.trace)(flags, inputs, labels, group)
            tables = [each for each in tracer.known if id(each) not in tracer.own]
            cut = less.get("max_position_embeddings")
            bytes_of_tables = sum(bytes_of(x) * (positions // cut if cut in x.shape else 1) for x in tables)
            amounts = timeline(program, shares)
            traces.append(Trace(named(program, amounts), amounts[program.backward], {"workspace": bytes_of_tables}))
    return summarise(shares, *traces, config[depth] - fewest)


def moments(
    flags: Flags, checkpoint: Checkpoint, batch: MicroBatch, build_model: Callable, wrap: Callable, to_device: Callable
) -> tuple[list[Moment[Amounts]], Amounts]:
    """What each operator of a pass finds beyond what is held between two steps, and the weights on this process.

    Both are in terms of the sizes in tunebench/forecast/symbols.py. The kinds of the first are those of `Life`. The
    kinds of the second are `weights` and, those of them that are trained, `trained`.
    """
    group = parallel.Group("cpu", 0, 1, 0, flags.mp, parallel.Clip(0, None), None)
    with as_on_a_gpu(flags):
        model = build_lazily(flags, checkpoint, build_model, group)
        parameters = [*model.parameters()]
        inputs, labels = to_device(flags, batch, "cpu")
        tracer = Tracer(model, checkpoint.config["vocab_size"] // flags.mp, flags)
        program = _switch_to_static_graph_(tracer.trace)(flags, inputs, labels, group)
    weights = add_up(("weights", bytes_of(each)) for each in parameters)
    trained = add_up(("trained", bytes_of(each)) for each in parameters if not each.stop_gradient)
    rows: list[list[tuple[str, int]]] = [[] for _ in program.operators]
    for kind, size, first, last in lives(program):
        for row in rows[first : last + 1]:
            row.append((kind, size))
    return named(program, [add_up(row) for row in rows]), weights | trained


def named(program: Program, held: Sequence[T]) -> list[Moment[T]]:
    """What is held at each operator of a program, with its phase. Operators go by name and sizes of results."""
    phases = ["forward"] * program.loss + ["loss"] * (program.backward - program.loss)
    phases += ["backward"] * (len(program.operators) - program.backward)
    names = [" ".join([each.name, *(str(program.sizes[made]) for made in each.outputs)]) for each in program.operators]
    return [Moment(phase, name, now) for phase, name, now in zip(phases, names, held, strict=True)]


@contextlib.contextmanager
def as_on_a_gpu(flags: Flags) -> Iterator[None]:
    """Lets the libraries choose what they choose on a GPU, and take this process for one of a tensor-parallel group."""
    members = ProcessGroup(0, 0, list(range(flags.mp)))
    hybrid = SimpleNamespace(
        get_model_parallel_group=lambda: members,
        get_model_parallel_rank=lambda: 0,
        get_model_parallel_world_size=lambda: flags.mp,
        get_data_parallel_world_size=lambda: 1,
        get_pipe_parallel_world_size=lambda: 1,
    )
    with contextlib.ExitStack() as stack:
        for module in (paddle, paddle.device):
            stack.enter_context(patch.object(module, "get_device", lambda: "gpu:0"))
        fused = "mem_efficient" if flags.dtype == "fp32" else "flash_attn"  # as on GPUs since Ampere
        stack.enter_context(patch.object(sdpa, "select_sdp_for_sdpa", lambda _: fused))
        for module in (paddle, paddle.base.framework):
            read = functools.partial(flags_of_gpus, module.get_flags)
            stack.enter_context(patch.object(module, "get_flags", read))
        if flags.mp > 1:
            stack.enter_context(patch.object(topology, "_HYBRID_PARALLEL_GROUP", hybrid))
            if flags.sequence_parallel:
                stack.enter_context(patch.object(fleet.fleet, "_hcg", hybrid, create=True))
            strategy = fleet.DistributedStrategy()
            stack.enter_context(patch.object(fleet.fleet, "_user_defined_strategy", strategy, create=True))
            stack.enter_context(patch.object(RNGStatesTracker, "rng_state", lambda *_: contextlib.nullcontext()))
        yield


def flags_of_gpus(get_flags: Callable, names: Any) -> dict[str, Any]:
    """paddle.get_flags, and the defaults of flags that builds for CPUs do not have."""
    defaults = {"FLAGS_cudnn_deterministic": False, "FLAGS_flash_attn_version": 2}
    names = as_list(names)
    return get_flags([name for name in names if name not in defaults]) | {
        name: defaults[name] for name in names if name in defaults
    }


def build_lazily(flags: Flags, checkpoint: Checkpoint, build_model: Callable, group: parallel.Group) -> paddle.nn.Layer:
    """The script's model, whose parameters have no memory."""
    with contextlib.ExitStack() as stack:
        for module, name in ((weights, "load"), (parallel, "fill")):
            stack.enter_context(patch.object(module, name, lambda *_: None))
        # ChatGLMv2 makes a short table meanwhile. CPUs have no kernels for it in low precision.
        arange = functools.partial(arange_in_float32, paddle.arange)
        stack.enter_context(patch.object(paddle, "arange", arange))
        stack.enter_context(paddle.LazyGuard())
        stack.enter_context(no_init_weights())
        return build_model(flags, checkpoint, group)


def arange_in_float32(arange: Callable, *arguments: Any, dtype: Any = None, **others: Any) -> paddle.Tensor:
    """paddle.arange, but in float32 in place of a lower precision."""
    low = str(dtype).rpartition(".")[2] in ("float16", "bfloat16")
    return arange(*arguments, dtype="float32" if low else dtype, **others)


class LowPrecision:
    """Lets a machine whose Paddle has no kernels of a low precision write programs in it.

    A program is refused an operator in a dtype without kernels (GetRegisterDataType in
    paddle/fluid/pir/dialect/operator/utils/utils.cc). So float64, which no run has, stands for the low precision, and
    says that it is this one. Autocast, which Paddle has in C++ for real dtypes, is repeated here (GetAmpDestDtype in
    paddle/fluid/eager/amp_utils.h) with Paddle's own lists.
    """

    STAND_IN = paddle.float64
    NOT_CAST = ("cast", "full", "assign", "set_value", "builtin", "parameter", "data")  # how the others' names begin

    def __init__(self, name: str) -> None:
        """`name` is that of the low precision, such as float16."""
        self.name, self.dtype = name, getattr(paddle, name)
        self.level: str | None = None
        self.white: set[str] = set()
        self.black: set[str] = set()
        self.real = paddle.pir.Value.dtype
        self.create_parameter = pir_core.create_parameter

    def replaced(self) -> Iterator[tuple[Any, str, Any]]:
        """What is replaced while a program is written: an owner, a name and a value."""
        yield paddle.pir.Value, "dtype", property(lambda value: self.told(self.real.fget(value)))
        yield (
            pir_core,
            "create_parameter",
            lambda dtype, **others: self.create_parameter(self.stand_in(dtype), **others),
        )
        yield paddle.amp, "auto_cast", self.auto_cast
        operators = {id(each): name for name, each in vars(paddle._C_ops).items() if inspect.isbuiltin(each)}
        for owner, module in [*sys.modules.items()]:  # many modules have operators of their own
            if module and owner.startswith("paddle.") and not owner.startswith("paddle.base"):
                for name, value in [*vars(module).items()]:
                    if id(value) in operators:
                        yield module, name, functools.partial(self.call, operators[id(value)], value)

    def told(self, dtype: Any) -> Any:
        """The dtype that a value's dtype stands for."""
        return self.dtype if dtype == self.STAND_IN else dtype

    def stand_in(self, value: Any) -> Any:
        """What stands for a value: for the low precision's dtype its stand-in, for a parameter its value."""
        if isinstance(value, paddle.Tensor):
            return to_value(value)
        is_low = (isinstance(value, str) and value == self.name) or (
            isinstance(value, type(self.dtype)) and value == self.dtype
        )
        return self.STAND_IN if is_low else value

    @contextlib.contextmanager
    def auto_cast(
        self, enable: bool = True, custom_white_list: Any = None, *, level: str = "O1", dtype: str = "", **_: Any
    ) -> Iterator[None]:
        """In place of paddle.amp.auto_cast."""
        before = self.level, self.white, self.black
        self.level = level if enable else None
        if enable:
            custom = set(custom_white_list or ())
            self.white = amp_lists.white_list()[dtype][level] | custom
            self.black = amp_lists.black_list()[dtype][level] - custom
        try:
            yield
        finally:
            self.level, self.white, self.black = before

    def call(self, name: str, operator: Callable, /, *arguments: Any, **others: Any) -> Any:
        """Writes an operator, after the casts of its inputs."""
        arguments, others = tree_map(self.stand_in, (arguments, others))
        if self.level and not name.startswith(self.NOT_CAST):
            inputs = arguments[:1] if name == "layer_norm" else arguments
            floats = {self.real.fget(each) for each in tree_leaves(inputs) if self.is_float(each)}
            goal = paddle.float32 if paddle.float32 in floats else self.STAND_IN
            if known := {name, IN_LISTS.get(name, name)} & (self.white | self.black):
                goal = self.STAND_IN if known & self.white else paddle.float32
            if floats - {goal}:
                arguments = (*tree_map(functools.partial(self.cast, goal), inputs), *arguments[len(inputs) :])
        return operator(*arguments, **others)

    def cast(self, goal: Any, value: Any) -> Any:
        """The value in the dtype `goal`, if it is one that autocast casts."""
        return paddle._pir_ops.cast(value, goal) if self.is_float(value, goal) else value

    def is_float(self, value: Any, other_than: Any = None) -> bool:
        """Whether autocast looks at a value, or casts it from another dtype than this one."""
        if not isinstance(value, paddle.pir.Value) or value.is_combine():
            return False
        return self.real.fget(value) in {paddle.float32, self.STAND_IN} - {other_than}


class Tracer:
    """Writes down a model's passes."""

    def __init__(self, model: paddle.nn.Layer, vocabulary: int, flags: Flags) -> None:
        self.model, self.vocabulary, self.mp = model, vocabulary, flags.mp
        self.low = LowPrecision(flags.compute_dtype) if flags.amp else None
        self.own = {id(each) for each in model.parameters()}
        self.main = paddle.static.Program()
        self.recomputed: list[tuple[int, int]] = []  # operators before and at the end of each recomputed layer
        self.known: list[paddle.Tensor] = []  # parameters and tables of the model
        self.kept: set[str] = set()  # what recomputed layers are called with
        self.fused: dict[str, tuple[str, str, list[str], int]] = {}  # by its result: see `attend` and `normalise`
        self.inner: list[tuple[int, int, set[str]]] = []  # calls of paddle.grad: operators, values of variables
        self.written_out: list[tuple[list[int], dict[str, str]]] = []  # see `write_out`

    def trace(self, flags: Flags, inputs: dict[str, Any], labels: paddle.Tensor, group: parallel.Group) -> Program:
        """The passes of a micro-batch."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(paddle.static.program_guard(self.main, paddle.static.Program()))
            for target, name, value in self.replaced():
                stack.enter_context(patch.object(target, name, value, create=True))
            with graph_tracing_guard(self.main) as context:
                outputs = self.model(**{name: as_value(name, tensor) for name, tensor in inputs.items()})
                loss_begins = self.last()
                loss = losses.total(flags, outputs, as_value("labels", labels), group)
            backward_begins = self.last()
            parameters, values = context.get_params_with_values()
            self.known = parameters
            trained = [value for each, value in zip(parameters, values, strict=True) if not each.stop_gradient]
            gradients = grad([loss], trained)
            operators, sizes, wide, positions, members = self.read()
        program = Program(
            operators,
            positions[loss_begins] + 1,
            positions[backward_begins] + 1,
            sizes,
            wide,
            {value.id for value in values},
            {value.id for each, value in zip(parameters, values, strict=True) if id(each) in self.own},
            {value.id for value in gradients if value is not None},
            {value.id for value in as_list(outputs) if value is not None},
            self.kept,
        )
        # A member of a split tensor has a name of its own among the values of the program.
        attended = {
            result: (name, rest, [members[each][0] for each in read], size)
            for result, (name, rest, read, size) in self.fused.items()
        }
        program = fuse(program, attended)
        for first, end, held in self.inner:
            names = {name for each in held for name in members.get(each, [])}
            program = hold(program, positions[first] + 1, positions[end], names)
        for marks, gradients in self.written_out:
            program = move_backward(program, *(positions[mark] + 1 for mark in marks), gradients)
        for first, end in reversed(self.recomputed):
            program = recompute(program, positions[first] + 1, positions[end] + 1)
        return program

    def replaced(self) -> Iterator[tuple[Any, str, Any]]:
        """What is replaced meanwhile: an owner, a name and a value."""
        if self.low:
            yield from self.low.replaced()
        yield paddle.pir.Value, "size", property(lambda value: math.prod(value.shape))  # it is an operator otherwise
        yield paddle.pir.Value, "__len__", lambda value: value.shape[0]
        yield paddle, "grad", self.grad
        stand_ins = {name: functools.partial(self.attend, name) for name in FUSED} | {"rms_norm": self.normalise}
        for name, write in stand_ins.items():
            yield paddle._C_ops, name, functools.partial(self.low.call, name, write) if self.low else write
        yield paddle._C_ops, "c_identity", lambda x, *_: paddle.assign(x)  # a copy too; programs know no gradient of it
        yield paddle, "reshape_", paddle.reshape  # programs refuse to reshape a view in place
        # One process's share stands for all processes' shares: programs have no collectives of --sequence-parallel.
        yield ScatterOp, "apply", lambda x: x[: x.shape[0] // self.mp]
        yield ReduceScatterOp, "apply", lambda x: paddle.assign(x[: x.shape[0] // self.mp])
        for gather in (GatherOp, AllGatherOp):
            yield gather, "apply", lambda x: paddle.concat([x] * self.mp)
        yield losses, "ParallelCrossEntropy", lambda **options: functools.partial(F.cross_entropy, reduction="none")
        for function in vars(losses).values():
            if isinstance(function, type) and issubclass(function, PyLayer) and function is not PyLayer:
                yield function, "apply", functools.partial(self.write_out, function)
        for module in {sys.modules[type(layer).__module__] for layer in self.model.sublayers(include_self=True)}:
            if hasattr(module, "recompute"):
                yield module, "recompute", self.mark_recomputed

    def last(self) -> int:
        """The last operator written down."""
        return self.main.global_block().ops[-1].id()

    def mark_recomputed(self, function: Callable, *arguments: Any, use_reentrant: bool = True, **others: Any) -> Any:
        """In place of paddle.distributed.fleet.recompute: `recompute` below has what it does."""
        before = self.last()
        result = function(*arguments, **others)
        self.recomputed.append((before, self.last()))
        self.kept |= {each.id for each in arguments if isinstance(each, paddle.pir.Value)}
        return result

    def write_out(self, function: type[PyLayer], *arguments: Any) -> paddle.pir.Value:
        """In place of a PyLayer's `apply`: a program has no operator for it, so that both its passes are written down.

        Sums of the inputs stand for its result, so that the program asks for gradients of these inputs. The operators
        of its backward pass are moved later to where these gradients are computed.
        """
        saved: list[Any] = []
        context = SimpleNamespace(save_for_backward=lambda *each: saved.extend(each), saved_tensor=lambda: saved)
        arguments = tuple(to_value(each) if isinstance(each, paddle.Tensor) else each for each in arguments)
        function.forward(context, *arguments)
        marks = [self.last()]
        gradients = function.backward(context, paddle.ones([]))
        marks.append(self.last())
        values = [each for each in arguments if isinstance(each, paddle.pir.Value)]
        pairs = {x.id: by_x.id for x, by_x in zip(values, gradients, strict=True) if by_x is not None}
        self.written_out.append((marks, pairs))
        return sum(x.sum(dtype="float32") for x in values if x.id in pairs)

    def attend(self, name: str, query: Any, key: Any, value: Any, *others: Any) -> tuple:
        """In place of a fused attention kernel: programs refuse it where it has no kernels.

        A sum of the inputs, with a gradient by each of them, stands for it until `fuse`.
        """
        result, rest = self.stand_for(query, key, value)
        read = [each.id for each in (query, key, value, *others) if isinstance(each, paddle.pir.Value)]
        rows, width, heads, _ = query.shape
        self.fused[result.id] = name, rest.id, read, 4 * rows * heads * -(-width // 128) * 128
        return result, *[None] * (FUSED[name] - 1)

    def normalise(self, x: Any, weight: Any, *_: Any) -> tuple:
        """In place of the fused RMSNorm, as `attend`. It keeps a float32 number for each row (RmsNormInferMeta)."""
        result, rest = self.stand_for(x, weight)
        self.fused[result.id] = "rms_norm", rest.id, [x.id, weight.id], 4 * math.prod(x.shape[:-1])
        return result, None

    def stand_for(self, like: Any, *others: Any) -> tuple[Any, Any]:
        """A value of the shape and dtype of `like` with a gradient by each input, and what the others are in it."""
        with self.low.auto_cast(enable=False) if self.low else contextlib.nullcontext():
            rest = sum(each.sum() for each in others)
            return like + rest, rest

    def grad(self, outputs: Any, inputs: list, given: list | None = None) -> list:
        """In place of paddle.grad. Until it returns, the caller's variables and their graph hold their values."""
        before = self.last()
        held = {each.id for each in sys._getframe(1).f_locals.values() if isinstance(each, paddle.pir.Value)}
        result = grad(as_list(outputs), inputs, given)
        self.inner.append((before, self.last(), held))
        return result

    def read(self) -> tuple[list[Operator], dict[str, int], set[str], dict[int, int], dict[str, list[str]]]:
        """The operators, the bytes of each value, which have an entry for each word, and operators' positions by id.

        A vector of tensors is its members. The last result has their names by a value's id.
        """
        members: dict[str, list[str]] = {}
        sizes: dict[str, int] = {}
        wide, positions, operators = set(), {}, []
        for each in self.main.global_block().ops:
            sources = [value for value in each.operands_source() if value.initialized()]
            inputs, reads = [], []
            for value in sources:
                inputs += members[value.id]
                reads += [] if each.is_no_need_buffer(value) else members[value.id]
            results = [value for value in each.results() if "NULL" not in str(value.type())]
            if each.name() == "builtin.combine":
                members[results[0].id], results = inputs, []
            elif each.name() == "builtin.split":
                members |= {value.id: [name] for value, name in zip(each.results(), inputs, strict=True)}
                results = []
            outputs = []
            for value in results:
                types = value.type().as_vec_type().as_list() if value.is_combine() else [value]
                members[value.id] = [value.id, *(f"{value.id}.{i}" for i in range(1, len(types)))]
                for name, kind in zip(members[value.id], types, strict=True):
                    dtype = self.low.told(kind.dtype) if self.low else kind.dtype
                    sizes[name] = math.prod(kind.shape) * core.size_of_dtype(dtype)
                    if len(kind.shape) and kind.shape[-1] == self.vocabulary:
                        wide.add(name)
                outputs += members[value.id]
            if not each.name().startswith("builtin."):
                operators.append(Operator(each.name().rpartition(".")[2], inputs, outputs, reads))
            positions[each.id()] = len(operators) - 1
        return operators, sizes, wide, positions, members


def as_value(name: str, tensor: Any) -> Any:
    """An input of the program like the tensor."""
    if isinstance(tensor, attention.Samples):
        samples = attention.Samples(tensor.lengths, "cpu")
        samples.ends = paddle.static.data(name, attention.sample_ends(tensor.lengths).shape, "int32")
        return samples
    return paddle.static.data(name, tensor.shape, tensor.dtype)


def as_list(value: Any) -> list:
    """The list itself, or one with this value."""
    return [*value] if isinstance(value, (list, tuple)) else [value]


def fuse(program: Program, fused: dict[str, tuple[str, str, list[str], int]]) -> Program:
    """Puts fused attention and RMSNorms in place of what stands for them.

    Attention's gradient reads the inputs, the result and the float32 logarithms of the softmaxes' sums, whose rows are
    padded to a multiple of 128 (FlashAttnInferMeta in paddle/phi/infermeta/ternary.cc). RMSNorm's reads the inputs and
    the roots (`rms_norm_grad` in backward.yaml).
    """
    operators, sizes = [], program.sizes.copy()
    gradients = {
        rest: (name, [*read, *[result] * (name in FUSED), f"{result}.sums"])
        for result, (name, rest, read, _) in fused.items()
    }
    for each in program.operators:
        result = each.outputs[0] if each.outputs else ""
        if each.name == "add" and result in fused:
            name, _, read, size = fused[result]
            sizes[f"{result}.sums"] = size
            each = Operator(name, read, [result, f"{result}.sums"], read)
        elif each.name == "add_grad" and each.inputs[1] in gradients:
            name, read = gradients[each.inputs[1]]
            each = each._replace(name=f"{name}_grad", inputs=[*each.inputs, *read], reads=[*each.reads, *read])
        operators.append(each)
    return program._replace(operators=operators, sizes=sizes)


def hold(program: Program, begin: int, end: int, names: set[str]) -> Program:
    """Lets values live until operator `end`, or a tensor is set there, with what the operators from `begin` on read.

    No operator overwrites them.
    """
    operators = [*program.operators]
    for i in range(begin, end + 1):
        operators[i] = operators[i]._replace(name=operators[i].name.replace("softmax_grad", "softmax_grad_of_kept"))
    names = names.union(*(each.reads for each in operators[begin : end + 1]))
    setting = (i for i, each in enumerate(operators[end : end + 8], end) if each.name.startswith("set_value"))
    last = next(setting, end)
    operators[last] = operators[last]._replace(reads=[*operators[last].reads, *names])
    return program._replace(operators=operators)


def move_backward(program: Program, begin: int, end: int, gradients: dict[str, str]) -> Program:
    """Moves `write_out`'s backward pass, operators `begin` to `end`, to where the first of its gradients is computed.

    `gradients` has the gradient of each input.
    """
    nothing = Operator("nothing", [], [], [])
    moved = program.operators[begin:end]
    operators = [*program.operators[:begin], *[nothing] * len(moved), *program.operators[end : program.backward]]
    for each in program.operators[program.backward :]:
        if each.name == "sum_grad" and each.inputs[0] in gradients:
            operators += moved
            moved = []
            source = [gradients[each.inputs[0]]]
            operators.append(Operator("share_data", source, each.outputs, source))
        else:
            operators.append(each)
    return program._replace(operators=operators)


def recompute(program: Program, begin: int, end: int) -> Program:
    """Repeats the operators `begin` to `end` of the forward pass where the backward pass first reads what they made.

    What later operators of the forward pass read of it is not made again. Paddle keeps a layer's inputs and, once it is
    computed again, what its gradients read (`_recompute_without_reentrant`).
    """
    forward, backward = program.operators[: program.backward], program.operators[program.backward :]
    made = {name for each in forward[begin:end] for name in each.outputs}
    inner = made - {name for each in forward[end:] for name in each.inputs}
    again = {name: f"{name}'" for name in made}
    first = next((i for i, each in enumerate(backward) if inner.intersection(each.reads)), None)
    if first is None:
        return program

    def rename(names: list[str], which: set[str]) -> list[str]:
        return [again[name] if name in which else name for name in names]

    copies = [
        Operator(each.name, *(rename(names, made) for names in (each.inputs, each.outputs, each.reads)))
        for each in forward[begin:end]
    ]
    backward = [each._replace(inputs=rename(each.inputs, inner), reads=rename(each.reads, inner)) for each in backward]
    sizes = program.sizes | {again[name]: program.sizes[name] for name in made}
    return program._replace(operators=[*forward, *backward[:first], *copies, *backward[first:]], sizes=sizes)


def owners(program: Program) -> tuple[dict[str, str], set[str]]:
    """By value the one whose memory it is in: itself, unless it is a view or overwrites another.

    Reshaping what is transposed or expanded copies it (paddle/phi/kernels/stride/reshape_kernel.cc).
    """
    owner: dict[str, str] = {}
    strided: set[str] = set()
    for each in program.operators:
        source = each.inputs[0] if each.inputs else None
        for i, name in enumerate(each.outputs):
            same = [x for x in each.inputs if program.sizes[x] == program.sizes[name]]
            if source and (each.name in VIEWS or (each.name.endswith("_") and i == 0)):
                original = source
            elif each.name in IN_PLACE and i == 0 and same:
                original = same[-1]
            else:
                original = name
            if original in strided and each.name in RESHAPING:
                original = name
            elif each.name in ("transpose", "transpose_grad", "expand") or (original in strided and original != name):
                strided.add(name)
            owner[name] = owner.get(original, original)
    return owner, strided


def bytes_of(tensor: Any) -> int:
    """The bytes of a tensor, a value or a type."""
    return math.prod(tensor.shape) * core.size_of_dtype(tensor.dtype)


class Trace(NamedTuple):
    """Passes of a model of a few layers: by operator the bytes while it runs, those after the forward pass, tables."""

    moments: list[Moment[dict[str, int]]]
    kept: dict[str, int]
    tables: dict[str, int]


def summarise(shares: Shares, few: Trace, many: Trace, more: int) -> Memory:
    """The moment at which all kinds together are largest, from what few layers hold, one more, and so many more."""
    held = plus(shares.held(), grow(few.tables, many.tables, more))
    # Where a layer more takes something away, the two operators are alike but not of the same place.
    moments = [
        (phase, plus(held, grow(one, other, more)))
        for phase, one, other in pairs(few.moments, many.moments)
        if all(other[kind] >= size for kind, size in one.items())
    ]
    after = grow(few.moments[-1].held, many.moments[-1].held, more)
    update = {kind: after[kind] for kind in ("logits_and_loss", "activations")} | shares.in_update()
    moments.append(("optimizer", at_update := plus(held, update)))
    moment, parts = max(moments, key=lambda each: sum(each[1].values()))
    kept = grow(few.kept, many.kept, more)
    return Memory(
        peak=sum(parts.values()),
        parts=parts,
        held=held,
        kept=kept["activations"],
        accumulated=at_update["gradients"],
        moment=moment,
    )


def grow(few: dict[str, int], many: dict[str, int], more: int) -> dict[str, int]:
    """The bytes of so many layers more than few have. `many` are those of one more."""
    return {kind: size + more * (many[kind] - size) for kind, size in few.items()}


def plus(*amounts: dict[str, int]) -> dict[str, int]:
    """The sums by kind."""
    return {kind: sum(each.get(kind, 0) for each in amounts) for kind in PARTS}


class Life(NamedTuple):
    """Bytes that are held from one operator of a program to another one, both included.

    Beside the kinds of PARTS there are some that count for some setups alone, see `timeline`: `new_gradient`, while it
    is computed; `gathered`, weights that an operator reads and the next one will; `copied`, what a layer made of them;
    `tied`, a weight that two layers read, between its two gradients.
    """

    kind: str
    size: int
    first: int
    last: int


def lives(program: Program) -> Iterator[Life]:
    """What the operators of a program hold. Gradients are held from when they are complete."""
    owner, strided = owners(program)
    sizes, end = program.sizes, len(program.operators)
    born: dict[str, int] = {}
    dies: dict[str, int] = {}
    for i, each in enumerate(program.operators):
        for name in each.outputs:
            born.setdefault(owner[name], i)
        for name in (*each.outputs, *each.reads):
            dies[owner.get(name, name)] = i
    gradients, outputs, kept, wide = (
        {owner.get(name, name) for name in names}
        for names in (program.gradients, program.outputs, program.kept, program.wide)
    )
    for name in born.keys() - program.weights:
        birth, size = born[name], sizes[name]
        if name in gradients:
            yield Life("gradients", size, birth, end - 1)
            yield Life("new_gradient", size, birth, birth)
        elif name in wide or program.loss <= birth < program.backward:
            yield Life("logits_and_loss", size, birth, end - 1 if name in outputs else dies[name])
        else:
            last = end - 1 if name in outputs | kept else dies[name]
            saved = name.endswith("'") or birth < program.backward <= last
            yield Life("activations" if saved else "workspace", size, birth, last)
    # A pass's outputs are held until the next one has its own, its graph until the next loss.
    if program.loss:
        yield from (Life("logits_and_loss", sizes[name], 0, program.loss - 1) for name in outputs)
    yield from (Life("activations", sizes[name], 0, program.backward - 1) for name in kept - outputs)
    for i, each in enumerate(program.operators):
        if each.name not in VIEWS | RESHAPING:  # most kernels read a copy of what is strided (data_transform.cc)
            yield from (Life("workspace", sizes[name], i, i) for name in strided.intersection(each.reads))
        if each.name.startswith("set_value"):  # the kernel copies the slice first
            yield Life("workspace", sizes[each.inputs[1]], i, i)
        if each.name in FLASH_GRADIENTS:
            yield Life("workspace", 2 * sizes[each.inputs[0]], i, i)
    yield from gathers(program)


def gathers(program: Program) -> Iterator[Life]:
    """What ZeRO 3 gathers: a weight where it is read, and the next one meanwhile; then it copies what the layer made.

    `ForwardPreHooks` and `ForwardPostHooks`. The order is the backward pass's own. A tied weight, and the zeros for its
    gradient, stay until both gradients are there.
    """
    sizes, end = program.sizes, len(program.operators)
    uses = [(i, name) for i, each in enumerate(program.operators) for name in program.parameters & {*each.inputs}]
    before = [name for i, name in uses if i < program.backward]
    tied = {name for name in before if before.count(name) > 1}
    for name in tied:
        if there := [i for i, used in uses if used == name and i >= program.backward]:
            yield Life("tied", sizes[name], there[0], there[-1])
    for (i, name), (_, following) in itertools.pairwise([*uses, (end, "")]):
        if i >= program.backward and name in tied:
            continue
        yield Life("gathered", sizes[name], i, i)
        if following not in ("", name):
            yield Life("gathered", sizes[following], i, i)
        if i < program.backward:
            yield from (Life("copied", sizes[made], i, i) for made in program.operators[i].outputs)


def timeline(program: Program, shares: Shares) -> list[dict[str, int]]:
    """The bytes by kind while each operator runs, beyond those held between two steps."""
    end = len(program.operators)
    changes = [dict.fromkeys(KINDS, 0) for _ in range(end + 1)]
    gathered, copied = [0] * end, [0] * end

    def live(kind: str, size: int, first: int, last: int) -> None:
        changes[first][kind] += size
        changes[last + 1][kind] -= size

    for kind, size, first, last in lives(program):
        sliced = shares.cut(size) < size
        if kind == "gradients":
            if not shares.adds_up:
                live(kind, shares.cut(size), first + sliced, last)
        elif kind == "new_gradient":
            if shares.adds_up or sliced:  # ZeRO 3 has made zeros before (`_create_params_grad`)
                live("workspace", size * (1 + sliced), first, last)
        elif kind == "gathered":
            gathered[first] += size * sliced
        elif kind == "copied":
            copied[first] += size * (shares.split.zero == 3)
        elif kind == "tied":
            live("workspace", 2 * size * sliced, first, last)
        else:
            live(kind, size, first, last)
    for i, most in enumerate(map(max, gathered, copied)):
        live("workspace", most, i, i)
    live("communication_buffers", shares.in_passes(), 0, end - 1)
    if shares.adds_up and not shares.held()["gradients"]:
        live("gradients", shares.gradients, 0, end - 1)
    now, moments = dict.fromkeys(KINDS, 0), []
    for change in changes[:end]:
        now = {kind: now[kind] + change[kind] for kind in KINDS}
        moments.append(now)
    return moments
