"""The loss of a micro-batch: from all logits, or, with `--head labels`, from the head where there are labels."""

import functools
from typing import Any

import parallel
import tensor_parallel
import torch
import torch.nn.functional as F

from tunebench.flags import Flags
from tunebench.plan import IGNORED
from tunebench.recipe import MOST_LOGITS, POSITIONS


def total(flags: Flags, outputs: Any, labels: torch.Tensor, group: parallel.Group) -> torch.Tensor:
    """The sum of the token losses over the positions that have a label, a scalar; logits may be sliced by --mp."""
    if flags.head == "labels":
        return outputs  # `sum_in_head` has made the model's forward pass end with this sum
    logits, labels = outputs.logits.flatten(0, 1), labels.flatten()
    if logits.numel() <= MOST_LOGITS:
        return sum_of_losses(logits, labels, group)
    return SumInStretches.apply(logits, labels, group)


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor, group: parallel.Group) -> torch.Tensor:
    """The sum of the token losses in float32, a scalar, from (n, vocabulary or its slice) and (n,)."""
    logits = logits.float()
    if group.mp == 1:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return tensor_parallel.SumOfSlicedLosses.apply(logits, labels, group.mesh)


class SumInStretches(torch.autograd.Function):
    """`sum_of_losses` of more logits than a GPU has room for in float32.

    Both passes take a stretch of positions at a time. The backward pass computes the stretch's losses again, so that
    each gradient is scaled in float32 before it is cast, as it is without stretches.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, group: parallel.Group) -> torch.Tensor:
        """A scalar, from (n, vocabulary or its slice) and (n,)."""
        ctx.save_for_backward(logits, labels)
        ctx.group = group
        return sum(sum_of_losses(logits[stretch], labels[stretch], group) for stretch in stretches(logits))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """By logits."""
        logits, labels = ctx.saved_tensors
        by_logits = torch.empty_like(logits)
        for stretch in stretches(logits):
            some = logits[stretch].detach().requires_grad_()
            with torch.enable_grad():
                loss = sum_of_losses(some, labels[stretch], ctx.group)
            [by_logits[stretch]] = torch.autograd.grad(loss, some, gradient)
        return by_logits, None, None


def stretches(logits: torch.Tensor) -> list[slice]:
    """Slices of positions with at most `MOST_LOGITS` logits each, or one position."""
    positions, vocabulary = logits.shape
    rows = max(1, MOST_LOGITS // vocabulary)
    return [slice(first, first + rows) for first in range(0, positions, rows)]


def sum_in_head(flags: Flags, model: torch.nn.Module) -> None:
    """With --head labels makes a model's forward pass give the sum of the token losses in place of logits."""
    if flags.head == "labels":
        model.forward = functools.partial(forward_to_loss, model)
        head = model.get_output_embeddings()
        head.forward = functools.partial(forward_head_to_loss, head)


def forward_to_loss(
    model: torch.nn.Module, labelled: torch.Tensor, targets: torch.Tensor, **inputs: Any
) -> torch.Tensor:
    """The model's forward pass: a scalar.

    `labelled` are the positions in the flattened batch that have a label, and `targets` these labels, each (n,).
    It calls the head as a layer, so that ZeRO 3 gathers the head's weight.
    """
    return model.get_output_embeddings()(model.base_model(**inputs)[0], labelled, targets)


def forward_head_to_loss(
    head: torch.nn.Linear, hidden: torch.Tensor, labelled: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The head's forward pass: a scalar, from (rows, width, hidden)."""
    return SumOfLosses.apply(hidden.flatten(0, 1).index_select(0, labelled), head.weight, targets)


class SumOfLosses(torch.autograd.Function):
    """cross_entropy(hidden @ weight.T, labels, reduction="sum").

    The forward pass computes the gradients by hidden and by weight too. The backward pass scales them. So each stretch
    of logits is used up before the next one is made, and no logit is computed twice. Liger Kernel's
    FusedLinearCrossEntropy does the same.
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
