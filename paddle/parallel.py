"""How Paddle splits a run over processes: fleet's data and tensor parallelism, and its sharding (ZeRO).

The functions stand in the order in which a script calls them. With one process none of them changes anything.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import library
import numpy as np
import paddle
import precision
from paddle import distributed
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group as ProcessGroup
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage2 import GroupShardedStage2
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage3 import GroupShardedStage3, _release_param
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients_with_group
from paddle.distributed.fleet.utils.sequence_parallel_utils import is_sequence_parallel_parameter
from paddle.distributed.sharding import group_sharded_parallel
from paddle.nn.clip import ClipGradBase, _squared_l2_norm

from tunebench.flags import Flags
from tunebench.hardware import check_gpus
from tunebench.recipe import MAX_GRAD_NORM, WHOLE_IN_ZERO_3
from tunebench.world import World

SHARDING_LEVELS = {2: "os_g", 3: "p_g_os"}  # as Paddle names what is sharded


class Clip(ClipGradBase):
    """For an optimizer: scales the gradients to a global norm of at most 1, in place, and keeps the norm before that.

    It is paddle.nn.ClipGradByGlobalNorm, with the same kernel, and keeps the norm, a scalar, in `norm`. Paddle's own
    classes for several processes count other gradients, or sum with a less exact kernel. On a CPU that kernel is off by
    more than 1e-4 for an embedding's gradient (tests/scripts/test_numerics.py shows it).
    """

    def __init__(self, zero: int, sharers: ProcessGroup | None) -> None:
        """`sharers` are the processes that hold the other slices of this one's sliced weights."""
        super().__init__()
        self.zero, self.sharers = zero, sharers
        self.norm: paddle.Tensor | None = None

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads: list[tuple[paddle.Tensor, paddle.Tensor]]) -> list:
        # In float32: in float16 the sum of squares overflows where no gradient does.
        squares = [_squared_l2_norm(in_float32(gradient)) for _, gradient in params_grads]
        if self.sharers is not None:
            shared = [self.is_shared(parameter) for parameter, _ in params_grads]
            own = [square for square, is_shared in zip(squares, shared, strict=True) if is_shared]
            total = paddle.add_n([paddle.zeros([]), *own])
            distributed.all_reduce(total, group=self.sharers)
            squares = [total, *(square for square, is_shared in zip(squares, shared, strict=True) if not is_shared)]
        self.norm = paddle.sqrt(paddle.add_n(squares))
        scale = paddle.clip(MAX_GRAD_NORM / (self.norm + 1e-6), max=1.0)
        for _, gradient in params_grads:
            gradient.multiply_(scale.astype(gradient.dtype))
        return params_grads

    def is_shared(self, parameter: paddle.Tensor) -> bool:
        """Whether the sharers hold other slices or other parameters; else they hold this same one."""
        if self.zero == 3:
            return not hasattr(parameter, "unslice")
        return self.zero > 0 or parameter.is_distributed


def in_float32(tensor: paddle.Tensor) -> paddle.Tensor:
    """The tensor itself if it is float32, else a cast copy."""
    return tensor if tensor.dtype == paddle.float32 else tensor.astype("float32")


class Group(NamedTuple):
    """This process's place in the run. Ranks of a tensor-parallel group are neighbours; replicas count such groups."""

    device: str
    rank: int
    world_size: int
    zero: int
    mp: int
    clip: Clip
    loss_scale: paddle.amp.GradScaler

    @property
    def replica(self) -> int:
        """Which share of each global batch this process takes."""
        return self.rank // self.mp

    @property
    def replicas(self) -> int:
        """How many shares there are."""
        return self.world_size // self.mp

    @property
    def mp_rank(self) -> int:
        """Which slice of the weights this process holds."""
        return self.rank % self.mp


def join(flags: Flags, world: World) -> Group:
    """Takes this process's device and joins the other processes: with NCCL on GPUs, with gloo elsewhere."""
    gpu = paddle.device.cuda.device_count() > 0
    check_gpus("paddle", gpu)
    device = f"gpu:{world.local_rank}" if gpu else "cpu"
    paddle.set_device(device)
    sharers, loss_scale = None, precision.loss_scale(flags)
    if world.size > 1:
        os.environ["PADDLE_PG_TIMEOUT"] = str(math.ceil(flags.timeout * 1000))  # NCCL's
        if not gpu:
            import gloo

            gloo.install(flags.timeout)
        # Paddle's layer for it returns gradients of LoRA's frozen weights too, which autograd refuses. At O1 it would
        # multiply float32 by low precision.
        sums_beside = flags.overlap and not flags.lora_r and flags.amp != "O1"
        strategy = fleet.DistributedStrategy()
        strategy.hybrid_configs = {
            "dp_degree": 1 if flags.zero else flags.replicas,
            "sharding_degree": flags.replicas if flags.zero else 1,
            "mp_degree": flags.mp,
            "pp_degree": 1,
            "mp_configs": {
                "need_broadcast_data": False,  # all ranks of a tensor-parallel group read the same batch
                "mp_async_allreduce": sums_beside,
                "mp_skip_c_identity": sums_beside,
                "sp_async_reduce_scatter": sums_beside,
                "mp_fused_linear_param_grad_add": sums_beside and gpu,  # its kernel is for GPUs alone
            },
        }
        fleet.init(is_collective=True, strategy=strategy, log_level="WARNING")
        hcg = fleet.get_hybrid_communicate_group()
        if flags.zero:
            sharers = hcg.get_sharding_parallel_group()
        elif flags.mp > 1:
            sharers = hcg.get_model_parallel_group()
    return Group(device, world.rank, world.size, flags.zero, flags.mp, Clip(flags.zero, sharers), loss_scale)


def slicing(flags: Flags, group: Group) -> dict[str, Any]:
    """The fields of a model's config with which the library builds this process's slice."""
    if group.mp == 1:
        return {}
    return {
        library.DEGREE: group.mp,
        "tensor_parallel_rank": group.mp_rank,
        "tensor_parallel_output": True,  # logits stay sliced over the vocabulary, for `losses.total`
        "sequence_parallel": flags.sequence_parallel,
    }


def follow_width(flags: Flags, model: paddle.nn.Layer) -> None:
    """With --sequence-parallel tells the model's layers the width of each micro-batch.

    The libraries have all rows of one width. Their attention and head find the rows among the tokens by it.
    """
    if flags.sequence_parallel:
        told = [model.config, *(layer for layer in model.sublayers() if hasattr(layer, library.WIDTH))]
        model.get_input_embeddings().register_forward_pre_hook(functools.partial(tell_width, told))


def tell_width(told: list[Any], embedding: paddle.nn.Layer, inputs: tuple) -> None:
    """A hook of the embedding, which comes first and sees token ids (rows, width)."""
    for each in told:
        setattr(each, library.WIDTH, inputs[0].shape[1])


def fill(parameter: paddle.Tensor, values: Callable[[tuple[int, int]], np.ndarray], group: Group) -> None:
    """Sets a linear layer's weight, or this process's slice of it, from `values` of its whole shape: (out, in).

    Slices are of the inputs: LoRA's A is whole where the layer is cut along its outputs.
    """
    own, outputs = parameter.shape
    slices, index = (group.mp, group.mp_rank) if parameter.is_distributed else (1, 0)
    whole = values((outputs, own * slices))
    parameter.set_value(paddle.to_tensor(whole[:, index * own : (index + 1) * own].T).astype(parameter.dtype))


def count(parameters: Iterable[paddle.Tensor], group: Group) -> int:
    """The number of weights of the whole parameters, sliced or not. Call it before `wrap`."""
    return sum(p.size * (group.mp if p.is_distributed else 1) for p in parameters)


def wrap(
    flags: Flags, model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer, group: Group
) -> tuple[paddle.nn.Layer, Any]:
    """The model and the optimizer as the loop uses them. It adapts the group's loss scale to them, in place."""
    if group.world_size == 1:
        return model, optimizer
    if flags.zero < 2:
        fleet.distributed_scaler(group.loss_scale)  # changes it in place
        return fleet.distributed_model(model), fleet.distributed_optimizer(optimizer)
    segment_size = WHOLE_IN_ZERO_3 * model.config.hidden_size
    sharers = fleet.get_hybrid_communicate_group().get_sharding_parallel_group()
    model, optimizer, _ = group_sharded_parallel(  # changes the scaler in place
        model, optimizer, SHARDING_LEVELS[flags.zero], group.loss_scale, sharers, segment_size=segment_size
    )
    if flags.zero == 3:
        release_frozen_weights(model)
    elif flags.overlap:  # as PaddleNLP's Trainer has it, enable_stage2_overlap
        model._set_reduce_overlap(True)
        optimizer._set_broadcast_overlap(True, model)
    return model, optimizer


def release_frozen_weights(model: GroupShardedStage3) -> None:
    """Frees each frozen weight once the backward pass is done with it, as Paddle frees the trainable ones.

    Paddle gathers both for the backward pass. Afterwards it would hold all frozen weights of the model whole.
    """
    for layer in model.sublayers():
        frozen = frozen_slices(layer, include_sublayers=False)
        if frozen:
            layer.register_forward_pre_hook(lambda _, inputs, frozen=frozen: release_after(inputs[0], frozen, model))


def release_after(x: paddle.Tensor, weights: list[paddle.Tensor], model: GroupShardedStage3) -> None:
    """Releases the weights that are applied to `x` once its gradient is computed."""
    if not x.stop_gradient:
        x.register_hook(lambda _: release(weights, model))


def release(weights: list[paddle.Tensor], model: GroupShardedStage3) -> None:
    """Keeps only this rank's slices of the gathered ones among `weights`."""
    gathered = [weight for weight in weights if weight.status == "all"]
    for weight in gathered:
        weight.use_count = 1  # the one of this backward pass
    _release_param(gathered, model._param2buffer, model._rank, model._task_flow)


def frozen_slices(layer: paddle.nn.Layer, include_sublayers: bool) -> list[paddle.Tensor]:
    """The frozen weights of a layer that ZeRO 3 has sliced."""
    parameters = layer.parameters(include_sublayers=include_sublayers)
    return [p for p in parameters if p.stop_gradient and hasattr(p, "fw_storage")]


def sync_gradients(model: paddle.nn.Layer, last: bool, group: Group) -> None:
    """Says before a pass whether it sends gradients: only the last one of a step, but ZeRO 2 and 3 send in each.

    ZeRO 1, replicated tensor-parallel groups, and ZeRO 3 for the weights it holds whole send in `update` alone.
    """
    if isinstance(model, paddle.DataParallel):
        model.grad_need_sync = last


def backward(model: paddle.nn.Layer, loss: paddle.Tensor, group: Group) -> None:
    """Adds the gradients of a share's loss, times the replicas: wrappers average, a global batch's loss is a sum."""
    group.loss_scale.scale(loss * group.replicas).backward()
    if isinstance(model, GroupShardedStage2) and model._reduce_overlap:
        # The next pass adds to the buffers that are being reduced, and the loss scale's check reads them.
        model._sharding_optimizers[0]._comm_task.wait()
    if group.zero == 3:
        release(frozen_slices(model, include_sublayers=True), model)  # the layers whose input has no gradient


def update(model: paddle.nn.Layer, optimizer: Any, trainable: Sequence[paddle.Tensor], group: Group) -> paddle.Tensor:
    """Clips, steps and clears the gradients; their global norm before clipping, a scalar.

    A step of fp16 whose gradients overflowed is skipped: its norm is not finite.
    """
    sum_partial_gradients(trainable)
    group.loss_scale.step(optimizer)  # the optimizer clips by `group.clip` after the gradients are reduced
    group.loss_scale.update()
    if group.zero < 2:
        optimizer.clear_grad(set_to_zero=False)
    else:
        optimizer.clear_grad()  # keeps the buffer that holds its share of the gradients
    return group.clip.norm


def sum_partial_gradients(trainable: Sequence[paddle.Tensor]) -> None:
    """Sums the gradients of which each process of a tensor-parallel group has found a part (--sequence-parallel)."""
    parts = [p for p in trainable if is_sequence_parallel_parameter(p)]
    if parts:
        sharers = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        fused_allreduce_gradients_with_group(parts, sharers, scale=1.0)


def sum_over_replicas(losses: Sequence[paddle.Tensor], group: Group) -> list[float]:
    """The losses of all steps, each summed over the shares of its global batch."""
    total = paddle.stack(list(losses))
    if group.world_size > 1:
        distributed.all_reduce(total)
        total /= group.mp  # each of a tensor-parallel group has the loss of the whole share
    return total.tolist()


def gather(value: int, group: Group) -> list[int]:
    """Each process's value, by rank."""
    values = [paddle.to_tensor([value])]
    if group.world_size > 1:
        values = []
        distributed.all_gather(values, paddle.to_tensor([value]))
    return [int(each) for each in values]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Each process's value, by rank: objects that can be pickled."""
    values = [value]
    if group.world_size > 1:
        values = []
        distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all processes."""
    if distributed.is_initialized():
        distributed.barrier()
