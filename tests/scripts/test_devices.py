"""Torch's step on a device that is not the CPU, without a GPU: all tensors meet on torch's `meta` device.

A meta tensor has no data. Reading one back raises, as a GPU would have to be waited for.
"""

import dataclasses

import pytest
from conftest import HERE

from tunebench.models.checkpoint import find_checkpoint

if HERE != "torch":
    pytest.skip("the meta device is torch's", allow_module_level=True)

import torch
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


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_meets_one_device_and_reads_nothing_back(script, monkeypatch, family, kind):
    """The fused optimizer, which has no kernel for `meta`, is replaced by torch's plain one."""
    fused = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, **named: fused(*given, **named | {"fused": False}))
    flags, _, plan, world = script["JOB"]
    flags = flags.model_copy(update=kind)
    if family == "bloom" and flags.padding_free:
        flags = flags.model_copy(update={"attention": "sdpa"})  # eager attention has no positions there
    group = script["parallel"].join(flags, world)._replace(device=torch.device("meta"))
    model = script["build_model"](flags, find_checkpoint(f"{family}-tiny", "random", 0), group)
    held = [*model.named_parameters(), *model.named_buffers()]
    held += [(f"{name}.{key}", x) for name, m in model.named_modules() for key, x in vars(m).items()]
    for name, tensor in held:
        assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", f"{name} is on {tensor.device}"
    (_, batch), *_ = dataclasses.replace(plan, padding_free=flags.padding_free).micro_batches(0, 1)
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


def test_a_tensor_that_stays_behind_is_seen():
    with pytest.raises(AssertionError, match="meets a tensor of cpu, shape \\(2,\\)"), OneDevice():
        torch.nn.functional.linear(torch.ones(2, 2, device="meta"), torch.ones(2, device="meta")) + torch.ones(2)
