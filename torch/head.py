"""The model's head: logits at every position, or losses straight from it where there are labels (`--head labels`)."""

import functools

import torch
import torch.nn.functional as F

from tunebench.flags import Flags
from tunebench.plan import MicroBatch

POSITIONS = 1024  # of which logits are held at once
FUSED: list[torch.nn.Module] = []
EXPECTED: list[torch.Tensor] = []  # of the pass under way: which positions have a label, and the labels


def fuse(flags: Flags, model: torch.nn.Module) -> None:
    """Lets the head give the sum of the token losses in place of logits."""
    if flags.head == "labels":
        layer = model.get_output_embeddings()
        layer.forward = functools.partial(sum_of_losses, layer)
        FUSED.append(layer)


def expect(batch: MicroBatch, device: torch.device) -> None:
    """Names the labels of the pass to come, where a head asks for them."""
    if FUSED:
        EXPECTED[:] = (torch.from_numpy(x).to(device) for x in (batch.labelled, batch.labels.flat[batch.labelled]))


def sum_of_losses(layer: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """A scalar, from (rows, width, hidden)."""
    positions, labels = EXPECTED
    return SumOfLosses.apply(hidden.flatten(0, 1).index_select(0, positions), layer.weight, labels)


class SumOfLosses(torch.autograd.Function):
    """cross_entropy(hidden @ weight.T, labels, reduction="sum"), whose gradients are made in the forward pass.

    So a stretch of logits is used up before the next one is made, and none is computed twice; the gradients wait for
    that of the sum. As in Liger Kernel's FusedLinearCrossEntropy.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A scalar, from (n, hidden), (vocabulary, hidden) and (n,)."""
        total, by_hidden = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        weight = weight.detach().requires_grad_(ctx.needs_input_grad[1])
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        for first in range(0, len(hidden), POSITIONS):
            stretch = slice(first, first + POSITIONS)
            some = hidden[stretch].detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(F.linear(some, weight).float(), labels[stretch], reduction="sum")
            by_hidden[stretch], *rest = torch.autograd.grad(loss, [some, weight][: 1 + weight.requires_grad])
            for gradient in rest:
                by_weight += gradient
            total += loss.detach()
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """By hidden and by weight."""
        by_hidden, by_weight = ctx.saved_tensors
        if by_weight is not None:
            by_weight = by_weight.mul_(gradient).to(ctx.dtype)
        return by_hidden * gradient, by_weight, None
