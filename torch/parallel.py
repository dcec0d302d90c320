"""How PyTorch splits a run over processes: DistributedDataParallel, DeepSpeed's ZeRO, FSDP2, tensor parallelism.

The functions stand in the order in which a script calls them. With one process none of them changes anything.
"""

import contextlib
import datetime
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import precision
import tensor_parallel
import torch
import torch.distributed
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tunebench.flags import Flags
from tunebench.hardware import check_gpus, gpu_indices
from tunebench.models.checkpoint import Checkpoint
from tunebench.recipe import MAX_GRAD_NORM, SMALLEST_BUCKET, WHOLE_IN_ZERO_3
from tunebench.world import World

# Rules for transformers' tensor parallelism where a family ships none. Bloom's query_key_value holds q, k and v of one
# head after the other, so that a slice of its rows is a slice of the heads.
TENSOR_PARALLEL_RULES: dict[str, Any] = {
    "bloom": {
        "transformer.word_embeddings": "embedding_rowwise",
        "transformer.h.*.self_attention.query_key_value": "colwise",
        "transformer.h.*.self_attention.dense": "rowwise",
        "transformer.h.*.mlp.dense_h_to_4h": "colwise",
        "transformer.h.*.mlp.dense_4h_to_h": "rowwise",
    },
}
REPLICATION_RULES: dict[str, Any] = {"bloom": {"transformer.h.*": "free_full_weight"}}


class Group(NamedTuple):
    """This process's place in the run. Ranks of a tensor-parallel group are neighbours; replicas count such groups."""

    device: torch.device
    rank: int
    world_size: int
    deepspeed: bool  # whether its engine runs the passes
    mp: int
    mesh: DeviceMesh | None  # (replicas, mp) with tensor parallelism, (replicas,) with FSDP2
    loss_scale: precision.LossScale

    @property
    def replica(self) -> int:
        """Which share of each global batch this process takes."""
        return self.rank // self.mp

    @property
    def replicas(self) -> int:
        """How many shares there are."""
        return self.world_size // self.mp


def join(flags: Flags, world: World) -> Group:
    """Takes this process's device and joins the other processes: with NCCL on GPUs, with gloo elsewhere."""
    gpu = torch.cuda.is_available()
    check_gpus("torch", gpu)
    device = torch.device("cuda", world.local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world.size > 1:
        # A collective's time limit is --timeout too, but counts from later on: the run's own limit comes first. The
        # defaults reach the groups that libraries make.
        limit = datetime.timedelta(seconds=flags.timeout)
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
        torch.distributed.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    return place_of(flags, device, world.rank)


def place_of(flags: Flags, device: torch.device, rank: int) -> Group:
    """The place of a process that has joined the others."""
    mesh = None
    if flags.mp > 1:
        mesh = init_device_mesh(device.type, (flags.replicas, flags.mp), mesh_dim_names=("dp", "tp"))
    elif flags.fsdp:  # transformers' replicas of --mp have a dimension "fsdp" of one process
        mesh = init_device_mesh(device.type, (flags.replicas,), mesh_dim_names=("zero",))
    return Group(device, rank, flags.world_size, flags.deepspeed, flags.mp, mesh, precision.LossScale(flags))


@contextlib.contextmanager
def loading_arguments(flags: Flags, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """Yields the arguments of `from_pretrained` with which each process loads only its share of the weights.

    Call `from_pretrained` inside: transformers finds ZeRO 3's configuration by a weak reference.
    """
    kept = None
    if flags.zero == 3 and flags.deepspeed:
        from transformers.integrations import HfDeepSpeedConfig

        import_deepspeed()
        kept = HfDeepSpeedConfig(zero_config(flags, checkpoint.config["hidden_size"]))
    yield sharding_arguments(flags, checkpoint)
    del kept


def sharding_arguments(flags: Flags, checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of `from_pretrained` that ask for tensor parallelism, and for its replicas."""
    if flags.mp == 1:
        return {}
    from transformers.distributed import DistributedConfig

    tensor_parallel.register_styles(flags.sequence_parallel)
    family = checkpoint.config["model_type"]
    # Each process has a slice of the logits: `losses` sums over the slices.
    rules: dict[str, Any] = {"tp_plan": TENSOR_PARALLEL_RULES.get(family, {}) | {"lm_head": "colwise"}}
    if flags.replicas > 1:
        rules |= {"dp_replicate_size": flags.replicas, "fsdp_plan": REPLICATION_RULES.get(family)}
    return {"distributed_config": DistributedConfig(tp_size=flags.mp, **rules)}


def take_heads(model: torch.nn.Module, group: Group) -> None:
    """Tells Bloom's attention which heads this process has; llama's derives it from the width of its slice."""
    if group.mp == 1 or model.config.model_type != "bloom":
        return
    heads, own = model.config.n_head, model.config.n_head // group.mp
    first = group.rank % group.mp * own

    def take_alibi(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        alibi = kwargs["alibi"]  # (batch * heads, 1, width)
        alibi = alibi.unflatten(0, (-1, heads))[:, first : first + own].flatten(0, 1)
        return args, kwargs | {"alibi": alibi}

    for block in model.transformer.h:
        block.self_attention.num_heads = own
        block.self_attention.register_forward_pre_hook(take_alibi, with_kwargs=True)


def fill(parameter: torch.nn.Parameter, values: Callable[[tuple[int, int]], np.ndarray], group: Group) -> None:
    """Sets a linear layer's weight, or this process's slice of it, from `values` of its whole shape: (out, in)."""
    whole = torch.from_numpy(values(tuple(parameter.shape))).to(parameter.device)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.data.copy_(whole)


def optimizer_groups(trainable: Sequence[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters by device mesh: one call of a fused optimizer takes tensors of one mesh."""
    kinds: dict[DeviceMesh | None, list[torch.nn.Parameter]] = {}
    for parameter in trainable:
        kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": members} for members in kinds.values()]


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers, by transformers' names of their classes. FSDP2 makes subclasses, also for replicas of --mp."""
    names = {*model._no_split_modules}
    return [module for module in model.modules() if names.intersection(each.__name__ for each in type(module).__mro__)]


def place(flags: Flags, model: torch.nn.Module, group: Group) -> torch.nn.Module:
    """The model on this process's device: whole, or with FSDP2 the slices of its weights.

    FSDP2 takes one layer after the other to the device. Stage 3 gives a layer's weights up after each pass, stage 2
    after the backward pass alone. So do both with what is in no layer and gathered at once: the backward pass begins
    with it. Stage 2 leaves frozen weights whole, as DeepSpeed does.
    """
    if not flags.fsdp:
        return model.to(group.device)
    whole = {p for p in model.parameters() if not p.requires_grad} if flags.zero == 2 else set()
    for parameter in whole:
        parameter.data = parameter.data.to(group.device)
    for module in [*layers_of(model), model]:
        policy = precision.gathered_precision(flags, module)
        gathers_twice = flags.zero == 3 and module is not model
        fully_shard(
            module, mesh=group.mesh, reshard_after_forward=gathers_twice, mp_policy=policy, ignored_params=whole
        )
    return model


def count(parameters: Iterable[torch.nn.Parameter], group: Group) -> int:
    """The number of weights of the whole parameters, sharded or not."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def wrap(
    flags: Flags, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> tuple[torch.nn.Module, Any]:
    """The model and the optimizer as the loop uses them."""
    if group.deepspeed:
        deepspeed = import_deepspeed()
        config = zero_config(flags, model.config.hidden_size)
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if group.loss_scale.enabled:
            optimizer.override_loss_scale(group.loss_scale.value)
        return engine, optimizer
    optimizer = precision.MasterWeights(optimizer)
    if group.mp > 1:
        layers = layers_of(model)
        tensor_parallel.join_layers(model, layers, group.mesh, flags.sequence_parallel)
        if flags.sequence_parallel:  # each process finds the gradients of its tokens
            for parameter in itertools.chain.from_iterable(layer.parameters() for layer in layers):
                if not is_sliced(parameter):
                    parameter.is_partial = True
    if group.mp == 1 and group.replicas > 1 and not flags.fsdp:
        # The buffers are constants. Paddle does not broadcast them in each forward pass.
        return DistributedDataParallel(model, forward_sync_buffers=False), optimizer
    return model, optimizer  # loading has made the model replicate its tensor-parallel groups


def zero_config(flags: Flags, hidden: int) -> dict[str, Any]:
    """DeepSpeed's configuration. The sizes are those that transformers' Trainer derives from `hidden` for "auto".

    A bucket has at least SMALLEST_BUCKET elements. With smaller ones a tiny model would send each matrix alone.
    """
    bucket = max(hidden * hidden, SMALLEST_BUCKET)
    stage = {"stage": flags.zero, "reduce_bucket_size": bucket}
    if flags.overlap:
        stage["overlap_comm"] = True  # DeepSpeed's default in stage 3
    if flags.zero == 3:
        stage |= {
            "stage3_prefetch_bucket_size": int(0.9 * bucket),
            "stage3_param_persistence_threshold": WHOLE_IN_ZERO_3 * hidden,
        }
    return {
        "train_micro_batch_size_per_gpu": flags.micro_bsz,
        "gradient_accumulation_steps": flags.accumulation,
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_optimization": stage,
        # torch's AdamW, as in every other setup. DeepSpeed would compile its own ones first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device in each pass and step
        **precision.zero_precision(flags),
    }


def sync_gradients(model: torch.nn.Module, last: bool, group: Group) -> None:
    """Says before a pass whether it sends gradients: only the last one of a step, but ZeRO 2 and 3 send in each."""
    if group.deepspeed:
        model.set_gradient_accumulation_boundary(last)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif group.mp > 1 and group.replicas > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last)
                break  # the outermost one passes it on


def backward(model: torch.nn.Module, loss: torch.Tensor, group: Group) -> None:
    """Adds the gradients of a share's loss, times the replicas: wrappers average, a global batch's loss is a sum."""
    loss = loss * group.replicas
    if group.deepspeed:
        model.backward(loss, scale_wrt_gas=False)
    else:
        (loss * group.loss_scale.value).backward()


def update(
    model: torch.nn.Module, optimizer: Any, trainable: Sequence[torch.nn.Parameter], group: Group
) -> torch.Tensor | float:
    """Clips, steps and clears the gradients; their global norm before clipping, a scalar.

    A step of fp16 whose gradients overflowed is skipped: its norm is not finite.
    """
    if group.deepspeed:
        model.step()
        if group.loss_scale.enabled:
            group.loss_scale.update(not model.was_step_applied())
            optimizer.override_loss_scale(group.loss_scale.value)
        return model.get_global_grad_norm() if model.was_step_applied() else math.inf
    sum_partial_gradients(trainable, group)
    average_adapters(trainable, group)
    norm = clip_gradients(optimizer.take_gradients(), group)
    overflow = group.loss_scale.enabled and not math.isfinite(norm)  # for fp16 alone this waits for the device
    if not overflow:
        optimizer.step()
    group.loss_scale.update(overflow)
    optimizer.zero_grad()
    return norm


def sum_partial_gradients(trainable: Sequence[torch.nn.Parameter], group: Group) -> None:
    """Sums the gradients of which each process of a tensor-parallel group has found a part."""
    parts = [local(p.grad) for p in trainable if hasattr(p, "is_partial")]
    if parts:
        flat = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(flat, group=group.mesh.get_group("tp"))
        for part, whole in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(whole.view_as(part))


def average_adapters(trainable: Sequence[torch.nn.Parameter], group: Group) -> None:
    """Averages LoRA's gradients over the replicas of a tensor-parallel group.

    The adapters joined the model after loading had made it replicate.
    """
    if group.mp == 1 or group.replicas == 1:
        return
    left = [p for p in trainable if "dp_replicate" not in mesh_names(p)]
    over = group.mesh.get_group("dp")
    pending = [torch.distributed.all_reduce(local(p.grad), group=over, async_op=True) for p in left]
    for parameter, work in zip(left, pending, strict=True):
        work.wait()
        local(parameter.grad).div_(group.replicas)


def clip_gradients(trainable: Sequence[torch.nn.Parameter], group: Group) -> torch.Tensor:
    """Scales the gradients to a global norm of at most 1, in place, and takes the loss scale out of them.

    Returns the norm before clipping, a scalar. Unlike torch.nn.utils.clip_grad_norm_ it takes norms of rows first and
    goes on in float64. The other's float32 sums of an embedding's gradient are off by more than 1e-4 on a CPU
    (tests/scripts/test_numerics.py shows it). The slices of a tensor-parallel group, or of FSDP2, count together. A
    tensor that each process of the group holds whole counts once.
    """
    gradients = [local(p.grad) for p in trainable]
    rows = [torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients]
    norms = [torch.linalg.vector_norm(norms, dtype=torch.float64) for norms in rows]
    if group.mesh is not None:
        sliced = [is_sliced(p.grad) for p in trainable]
        own = torch.stack([torch.zeros_like(norms[0]), *itertools.compress(norms, sliced)])
        total = torch.linalg.vector_norm(own).square()
        torch.distributed.all_reduce(total, group=group.mesh.get_group("tp" if group.mp > 1 else "zero"))
        norms = [total.sqrt(), *(norm for norm, is_one in zip(norms, sliced, strict=True) if not is_one)]
    norm = torch.linalg.vector_norm(torch.stack(norms)).float() / group.loss_scale.value
    torch._foreach_mul_(gradients, torch.clamp(MAX_GRAD_NORM / (norm + 1e-6), max=1.0) / group.loss_scale.value)
    return norm


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sliced(tensor: torch.Tensor) -> bool:
    """Whether the processes of a tensor-parallel group, or all with FSDP2, hold a slice each."""
    names = mesh_names(tensor)
    return any(
        name in ("tp", "zero") and not placement.is_replicate()
        for name, placement in zip(names, tensor.placements if names else (), strict=True)
    )


def mesh_names(tensor: torch.Tensor) -> tuple[str, ...]:
    """The dimensions of the mesh over which a tensor is spread."""
    return tensor.device_mesh.mesh_dim_names if isinstance(tensor, DTensor) else ()


def sum_over_replicas(losses: Sequence[torch.Tensor], group: Group) -> list[float]:
    """The losses of all steps, each summed over the shares of its global batch."""
    total = torch.stack([torch.as_tensor(loss) for loss in losses])
    if group.world_size > 1:
        torch.distributed.all_reduce(total)
        total /= group.mp  # each of a tensor-parallel group has the loss of the whole share
    return total.tolist()


def gather(value: int, group: Group) -> list[int]:
    """Each process's value, by rank."""
    values = [torch.tensor([value], device=group.device) for _ in range(group.world_size)]
    if group.world_size > 1:
        torch.distributed.all_gather(values, torch.tensor([value], device=group.device))
    return [int(each) for each in values]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Each process's value, by rank: objects that can be pickled."""
    values = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def import_deepspeed() -> Any:
    """DeepSpeed, for the device that torch has.

    It neither looks for its own kernels nor compiles them. None is used here: the optimizer is torch's.
    """
    gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
    indices = gpu_indices() if gpu and "CUDA_VISIBLE_DEVICES" in os.environ else []
    if indices and None not in indices:
        # DeepSpeed understands indices alone. CUDA itself has read the variable when `join` took the device.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, indices))
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls older names of torch's collectives. Each call of a step would print a warning.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed
