"""Finds the tensors that a run holds between two operations: weights, gradients, master weights, moments."""

from collections.abc import Iterator
from typing import Any

import torch

# Attributes of DeepSpeed's optimizers, by what they hold.
GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")
MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


def weights(model: torch.nn.Module, trainable: bool) -> Iterator[torch.Tensor]:
    """The weights. With ZeRO 3: this rank's slices (`ds_tensor`) and the weights that are gathered now."""
    for parameter in model.parameters():
        if parameter.requires_grad == trainable:
            yield parameter.data
            if hasattr(parameter, "ds_tensor"):
                yield parameter.ds_tensor


def gradients(model: torch.nn.Module, optimizer: Any) -> Iterator[torch.Tensor]:
    """The gradients: DeepSpeed's buffers, or `grad` of the parameters without DeepSpeed."""
    for parameter in model.parameters():
        yield from tensors((parameter.grad, getattr(parameter, "grad_accum", None)))
    yield from tensors([getattr(optimizer, name, None) for name in GRADIENTS])
    yield from (p.grad for p in masters(optimizer) if p.grad is not None)


def moments(optimizer: Any) -> Iterator[torch.Tensor]:
    """The moments of the optimizer, unwrapped from DeepSpeed's. Scalars that count steps are left out."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return (each for state in inner.state.values() for each in tensors(state) if each.ndim)


def masters(optimizer: Any) -> list[torch.Tensor]:
    """The float32 master weights of DeepSpeed's optimizer or of precision.py."""
    pairs = [pair for pair in getattr(optimizer, "pairs", []) if pair[0] is not pair[1]]
    return list(tensors([getattr(optimizer, name, None) for name in MASTERS])) + [master for _, master in pairs]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)
