"""Torch's step on a device that is not the CPU, without a GPU: all tensors meet on torch's `meta` device.

A meta tensor has no data. Reading one back raises, as a GPU would have to be waited for.
"""

import dataclasses

import pytest
from conftest import HERE

from tunebench.models.checkpoint import find_checkpoint
from tunebench.run.unsupported import not_offered

if HERE != "torch":
    pytest.skip("the meta device is torch's", allow_module_level=True)

import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAMILIES = ("llama", "bloom", "qwen2", "chatglm2", "llama-3.2-1b")
KINDS = (
    {},
    {"attention": "sdpa", "recompute": True},
    {"padding_free": True, "attention": "sdpa", "head": "labels"},
    {"dtype": "bf16", "amp": "O2"},
)


class OneDevice(TorchDispatchMode):
    """Raises where an operation gets a CPU tensor with elements to copy. CPU scalars are allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor) and value.device.type != "meta" and value.dim():
                raise AssertionError(f"{func} meets a tensor of {value.device}, shape {tuple(value.shape)}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def plain_adamw(monkeypatch):
    """Replaces the fused optimizer, which has no kernel for `meta`, by torch's plain one."""
    fused = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, **named: fused(*given, **named | {"fused": False}))


@pytest.fixture
def first_of_two(monkeypatch):
    """Makes this process the first of two whose collectives send nothing and return at once."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def assert_one_device(script, group, family, flags):
    """Builds the model on the group's device, trains one step there, and asserts that nothing is anywhere else."""
    model = script["build_model"](flags, find_checkpoint(f"{family}-tiny", "random", 0), group)
    held = [*model.named_parameters(), *model.named_buffers()]
    held += [(f"{name}.{key}", x) for name, m in model.named_modules() for key, x in vars(m).items()]
    for name, tensor in held:
        assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", f"{name} is on {tensor.device}"
    plan = dataclasses.replace(script["JOB"].plan, padding_free=flags.padding_free)
    (_, batch), *_ = plan.micro_batches(0, 1)
    inputs, labels = script["to_device"](flags, batch, group.device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = script["wrap"](flags, model, trainable, group)
    with OneDevice():
        outputs = model(**inputs)
        loss = script["losses"].total(flags, outputs, labels, group) / plan.label_tokens(0)
        script["parallel"].backward(model, loss, group)
    assert loss.device.type == "meta"
    assert {p.grad.device.type for p in trainable} == {"meta"}
    with OneDevice():
        norm = script["parallel"].update(model, optimizer, trainable, group)
    assert norm.device.type == "meta"


@pytest.mark.usefixtures("plain_adamw")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_meets_one_device_and_reads_nothing_back(scripts, family, method, kind):
    script = scripts[method]
    flags = script["JOB"].flags.model_copy(update=kind)
    group = script["parallel"].join(flags, script["JOB"].world)._replace(device=torch.device("meta"))
    assert_one_device(script, group, family, flags)


@pytest.mark.usefixtures("plain_adamw", "first_of_two")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_tensor_parallelism_meets_one_device_too(scripts, family, method):
    script = scripts[method]
    flags = script["JOB"].flags.model_copy(update={"mp": 2, "nproc": 2})
    if reason := not_offered("torch", method, flags, find_checkpoint(f"{family}-tiny", "random", 0)):
        assert (family, method) == ("chatglm2", "lora")
        pytest.skip(reason)
    group = script["parallel"].place_of(flags, torch.device("cpu"), 0)._replace(device=torch.device("meta"))
    assert_one_device(script, group, family, flags)


def test_a_tensor_that_stays_behind_is_seen():
    with pytest.raises(AssertionError, match="meets a tensor of cpu, shape \\(2,\\)"), OneDevice():
        torch.nn.functional.linear(torch.ones(2, 2, device="meta"), torch.ones(2, device="meta")) + torch.ones(2)
