"""Lets Paddle's fleet run over gloo. Only CPU runs of several processes install it; a GPU run never does.

Each function says what Paddle 3.3.1 lacks. The code around it is the code that a GPU runs.
"""

import ctypes
import math
import os
import socket
from pathlib import Path
from typing import Any

import paddle
import paddle.distributed
from paddle.base import core
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel.sharding import (
    group_sharded_optimizer_stage2,
    group_sharded_stage2,
    group_sharded_stage3,
    group_sharded_storage,
)
from paddle.distributed.sharding import group_sharded

# Parts of names that its library exports.
MANAGER = "3phi11distributed18CommContextManager"
MILLISECONDS = "NSt6chrono8durationIlSt5ratioILl1ELl1000EEEE"


def install(timeout: float) -> None:
    """Call it once, before fleet is initialised. A process waits `timeout` seconds for the others."""
    os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    separate_stores(timeout)
    complete_tensor_parallelism()
    admit_group_sharding()


def separate_stores(timeout: float) -> None:
    """Gives each process group a store of its own, with the time limit.

    Paddle's groups write their members' addresses under the same keys of one store. Groups of four and more processes
    overlap: then a process reads an address of another group, which refuses it.
    """
    create = core.ProcessGroupGloo.create
    stores: list[core.TCPStore] = []  # kept alive as long as their groups

    def create_with_store(store: core.TCPStore, rank: int, world_size: int, group_id: int = 0) -> core.ProcessGroupGloo:
        key = f"store of group {group_id}"
        if rank == 0:
            host = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
            # Bound, but not listening: meanwhile the system gives its port to no other process.
            with socket.socket() as reserved:
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                reserved.bind(("", 0))
                port = reserved.getsockname()[1]
                # 0: it does not wait for the others.
                stores.append(core.TCPStore(host, port, True, 0, math.ceil(timeout)))
            store.set(key, f"{host}:{port}")
        else:
            host, _, port = bytes(store.get(key)).decode().rpartition(":")
            stores.append(core.TCPStore(host, int(port), False, 0, math.ceil(timeout)))
        group = create(stores[-1], rank, world_size, group_id)
        set_timeout(group_id, rank, world_size, timeout)
        return group

    core.ProcessGroupGloo.create = staticmethod(create_with_store)


class String(ctypes.Structure):
    """A std::string of up to 15 characters."""

    _fields_ = (("characters", ctypes.c_void_p), ("length", ctypes.c_size_t), ("own", ctypes.c_char * 16))


def set_timeout(group_id: int, rank: int, size: int, seconds: float) -> None:
    """Sets how long a collective of a group waits. The default is 30 s, and Paddle has no option for it.

    Paddle's library exports the function that finds a group's communicator (three words: the vtable; rank and size;
    gloo's context) and the one that sets a context's limit. tests/run/test_ends.py shows that it holds.
    """
    library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libphi_core.so"))
    manager = ctypes.byref(ctypes.c_byte.in_dll(library, f"_ZZN{MANAGER}11GetInstanceEvE8instance"))
    text = str(group_id).encode()
    key = String(length=len(text), own=text)
    key.characters = ctypes.addressof(key) + String.own.offset
    get = library[f"_ZNK{MANAGER}3GetERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"]
    get.restype = ctypes.c_void_p
    communicator = get(manager, ctypes.byref(key))
    found = tuple((ctypes.c_int32 * 2).from_address(communicator + 8))
    if found != (rank, size):
        raise RuntimeError(f"Paddle's communicators are laid out in another way than in 3.3.1: {found}")
    context = ctypes.c_void_p.from_address(communicator + 16)
    library[f"_ZN4gloo7Context10setTimeoutE{MILLISECONDS}"](context, ctypes.c_int64(math.ceil(seconds * 1000)))


def complete_tensor_parallelism() -> None:
    """Adds the four operations of fleet's tensor-parallel layers that have no CPU kernel."""

    def all_reduce(group: core.ProcessGroupGloo, tensor: paddle.Tensor, operation: Any) -> None:
        group.all_reduce(tensor, operation, True).wait()

    core.ProcessGroupGloo.all_reduce_on_calc_stream = all_reduce
    paddle.distributed.stream.reduce_scatter = reduce_scatter
    paddle._C_ops.c_identity = lambda tensor, *_: paddle.assign(tensor)
    mp_ops._c_softmax_with_cross_entropy = cross_entropy


class Done:
    """A collective that has ended."""

    def wait(self) -> None:
        """Returns at once."""


def reduce_scatter(
    tensor: paddle.Tensor,
    whole: paddle.Tensor,
    op: Any = paddle.distributed.ReduceOp.SUM,
    group: paddle.distributed.communication.group.Group | None = None,
    sync_op: bool = True,
) -> Done:
    """Sets a tensor to this process's share, along the first dimension, of the sum of the processes' tensors."""
    whole = whole.clone()
    paddle.distributed.all_reduce(whole, op, group)
    paddle.assign(whole.chunk(group.nranks)[group.rank], tensor)
    return Done()


def cross_entropy(
    logits: paddle.Tensor,
    label: paddle.Tensor,
    group: paddle.distributed.communication.group.Group,
    return_softmax: bool = False,
    ignore_index: int = -100,
) -> paddle.Tensor:
    """The losses, (..., 1), of labels, (..., 1); each rank has a slice of the logits: (..., vocabulary / ranks).

    `return_softmax` is there for the signature: no model asks for it.
    """
    width = logits.shape[-1]
    local = label - group.rank * width
    own = (local >= 0) & (local < width)
    with paddle.no_grad():
        highest = logits.max(axis=-1, keepdim=True)
        paddle.distributed.all_reduce(highest, paddle.distributed.ReduceOp.MAX, group)
    shifted = logits - highest
    total = mp_ops._mp_allreduce(paddle.exp(shifted).sum(axis=-1, keepdim=True), group=group)
    at_label = paddle.take_along_axis(shifted, paddle.where(own, local, paddle.zeros_like(local)), axis=-1)
    at_label = mp_ops._mp_allreduce(paddle.where(own, at_label, paddle.zeros_like(at_label)), group=group)
    loss = paddle.log(total) - at_label
    return paddle.where(label != ignore_index, loss, paddle.zeros_like(loss))


class Pretending:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__ |= {"module": module} | replaced

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class NoGuard:
    """A device guard that leaves the device as it is."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def admit_group_sharding() -> None:
    """Makes the classes behind ZeRO 2 and 3 take their tensors for a GPU's. The tensors stay where they are.

    The classes refuse other devices by name, though each operation that they call has a CPU kernel.
    """
    sharding = (group_sharded_optimizer_stage2, group_sharded_stage2, group_sharded_stage3, group_sharded_storage)
    for module in (group_sharded, *sharding):
        module.paddle = Pretending(paddle, get_device=lambda: "gpu:0")
    for module in sharding:
        module.core = Pretending(core, is_compiled_with_cuda=lambda: True)
        module.device_guard = NoGuard
    # It copies a parameter to the CPU and frees the original. On a CPU the "copy" is the parameter itself.
    add_rank_params = group_sharded_storage.ParamStorage.add_rank_params
    group_sharded_storage.ParamStorage.add_rank_params = lambda self, params, align: add_rank_params(
        self, params, align, convert_gpu=False
    )
