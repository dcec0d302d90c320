"""The loss of a micro-batch: from all logits, or, with `--head labels`, from the head where there are labels."""

import functools
from typing import Any

import paddle
import paddle.nn.functional as F
import parallel
from library import FORMERS
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel import ParallelCrossEntropy

from tunebench.flags import Flags
from tunebench.plan import IGNORED
from tunebench.recipe import MOST_LOGITS, POSITIONS


def total(flags: Flags, outputs: Any, labels: paddle.Tensor, group: parallel.Group) -> paddle.Tensor:
    """The sum of the token losses over the positions that have a label, a scalar; logits may be sliced by --mp."""
    if flags.head == "labels":
        return outputs  # `sum_in_head` has made the model's forward pass end with this sum
    logits, labels = outputs[0].flatten(0, 1), labels.flatten()
    if logits.size <= MOST_LOGITS:
        return sum_of_losses(logits, labels, group)
    return SumInStretches.apply(logits, labels, group)


def sum_of_losses(logits: paddle.Tensor, labels: paddle.Tensor, group: parallel.Group) -> paddle.Tensor:
    """The sum of the token losses in float32, a scalar, from (n, vocabulary or its slice) and (n,)."""
    logits = logits.astype("float32")
    if group.mp == 1:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return ParallelCrossEntropy(ignore_index=IGNORED)(logits, labels.unsqueeze(-1)).sum()


class SumInStretches(PyLayer):
    """`sum_of_losses` of more logits than a GPU has room for in float32.

    Both passes take a stretch of positions at a time. The backward pass computes the stretch's losses again, so that
    each gradient is scaled in float32 before it is cast, as it is without stretches.
    """

    @staticmethod
    def forward(ctx, logits: paddle.Tensor, labels: paddle.Tensor, group: parallel.Group) -> paddle.Tensor:
        """A scalar, from (n, vocabulary or its slice) and (n,)."""
        ctx.save_for_backward(logits, labels)
        ctx.group = group
        return sum(sum_of_losses(logits[stretch], labels[stretch], group) for stretch in stretches(logits))

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        """By logits."""
        logits, labels = ctx.saved_tensor()
        by_logits = paddle.empty_like(logits)
        for stretch in stretches(logits):
            some = logits[stretch].detach()
            some.stop_gradient = False
            with paddle.enable_grad():
                loss = sum_of_losses(some, labels[stretch], ctx.group)
            [by_logits[stretch]] = paddle.grad(loss, [some], [gradient])
        return by_logits, None


def stretches(logits: paddle.Tensor) -> list[slice]:
    """Slices of positions with at most `MOST_LOGITS` logits each, or one position."""
    positions, vocabulary = logits.shape
    rows = max(1, MOST_LOGITS // vocabulary)
    return [slice(first, first + rows) for first in range(0, positions, rows)]


def sum_in_head(flags: Flags, model: paddle.nn.Layer) -> None:
    """With --head labels makes a model's forward pass give the sum of the token losses in place of logits."""
    if flags.head == "labels":
        # vars: PaddleNLP's __setattr__ would add arguments to a function of this name.
        vars(model)["forward"] = functools.partial(forward_to_loss, model)
        model.lm_head.forward = functools.partial(forward_head_to_loss, model.lm_head)


def forward_to_loss(
    model: paddle.nn.Layer, labelled: paddle.Tensor, targets: paddle.Tensor, **inputs: Any
) -> paddle.Tensor:
    """The model's forward pass: a scalar.

    `labelled` are the positions in the flattened batch that have a label, and `targets` these labels, each (n,).
    It calls the head as a layer, so that ZeRO 3 gathers the head's weight.
    """
    return model.lm_head(getattr(model, model.base_model_prefix)(**inputs)[0], labelled, targets)


def forward_head_to_loss(
    head: paddle.nn.Layer, hidden: paddle.Tensor, labelled: paddle.Tensor, targets: paddle.Tensor
) -> paddle.Tensor:
    """The head's forward pass: a scalar, from (rows, width, hidden)."""
    weight = head.decoder_weight if hasattr(head, "decoder_weight") else head.weight
    return SumOfLosses.apply(hidden.flatten(0, 1).index_select(labelled), weight, targets, is_transposed(head))


def is_transposed(head: paddle.nn.Layer) -> bool:
    """Whether the head's weight is (vocabulary, hidden).

    A tied weight is the embedding's. Bloom's is always tied; other configs may ask for it. PaddleFormers has it always.
    """
    return hasattr(head, "decoder_weight") or getattr(head, "transpose_y", FORMERS)


class SumOfLosses(PyLayer):
    """cross_entropy(hidden @ weight, labels, reduction="sum").

    The forward pass computes the gradients by hidden and by weight too. The backward pass scales them. So each stretch
    of logits is used up before the next one is made, and no logit is computed twice. Liger Kernel's
    FusedLinearCrossEntropy does the same.
    """

    @staticmethod
    def forward(
        ctx, hidden: paddle.Tensor, weight: paddle.Tensor, labels: paddle.Tensor, transposed: bool
    ) -> paddle.Tensor:
        """A scalar, from (n, hidden), (hidden, vocabulary) or its transpose, and (n,)."""
        total, by_hidden = paddle.zeros([]), []
        frozen, weight = weight.stop_gradient, weight.detach()
        weight.stop_gradient = frozen
        by_weight = None if frozen else paddle.zeros_like(weight, dtype="float32")
        for first in range(0, len(hidden), POSITIONS):
            stretch = slice(first, first + POSITIONS)
            some = hidden[stretch].detach()
            some.stop_gradient = False
            with paddle.enable_grad():
                logits = paddle.matmul(some, weight, transpose_y=transposed).astype("float32")
                loss = F.cross_entropy(logits, labels[stretch], reduction="sum")
            gradient, *rest = paddle.grad(loss, [some, weight][: 2 - frozen])
            by_hidden.append(gradient)
            for gradient in rest:
                by_weight.add_(gradient.astype("float32"))
            total += loss.detach()
        ctx.save_for_backward(paddle.concat(by_hidden), by_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """By hidden and by weight."""
        by_hidden, by_weight = ctx.saved_tensor()
        if by_weight is not None:
            by_weight = (by_weight * gradient).astype(ctx.dtype)
        return by_hidden * gradient.astype(by_hidden.dtype), by_weight, None
