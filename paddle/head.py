"""The model's head: logits at every position, or losses straight from it where there are labels (`--head labels`)."""

import functools
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from tunebench.flags import Flags
from tunebench.plan import MicroBatch

POSITIONS = 1024  # of which logits are held at once
FUSED: list[paddle.nn.Layer] = []
EXPECTED: list[paddle.Tensor] = []  # of the pass under way: which positions have a label, and the labels


def fuse(flags: Flags, model: paddle.nn.Layer) -> None:
    """Lets the head give the sum of the token losses in place of logits."""
    if flags.head == "labels":
        layer = model.lm_head
        layer.forward = functools.partial(sum_of_losses, layer)
        FUSED.append(layer)


def expect(batch: MicroBatch) -> None:
    """Names the labels of the pass to come, where a head asks for them."""
    if FUSED:
        EXPECTED[:] = (paddle.to_tensor(x) for x in (batch.labelled, batch.labels.flat[batch.labelled]))


def sum_of_losses(layer: paddle.nn.Layer, hidden: paddle.Tensor, *_: Any, **__: Any) -> paddle.Tensor:
    """A scalar, from (rows, width, hidden)."""
    positions, labels = EXPECTED
    # A tied one is the embedding, (vocabulary, hidden): always Bloom's, and that of others where they say so.
    weight = layer.decoder_weight if hasattr(layer, "decoder_weight") else layer.weight
    tied = hasattr(layer, "decoder_weight") or layer.transpose_y
    return SumOfLosses.apply(hidden.flatten(0, 1).index_select(positions), weight, labels, tied)


class SumOfLosses(PyLayer):
    """cross_entropy(hidden @ weight, labels, reduction="sum"), whose gradients are made in the forward pass.

    So a stretch of logits is used up before the next one is made, and none is computed twice; the gradients wait for
    that of the sum. As in Liger Kernel's FusedLinearCrossEntropy.
    """

    @staticmethod
    def forward(ctx, hidden: paddle.Tensor, weight: paddle.Tensor, labels: paddle.Tensor, tied: bool) -> paddle.Tensor:
        """A scalar, from (n, hidden), (hidden, vocabulary) or, where it is tied, its transpose, and (n,)."""
        total, by_hidden = paddle.zeros([]), []
        frozen, weight = weight.stop_gradient, weight.detach()
        weight.stop_gradient = frozen
        by_weight = None if frozen else paddle.zeros_like(weight, dtype="float32")
        for first in range(0, len(hidden), POSITIONS):
            stretch = slice(first, first + POSITIONS)
            some = hidden[stretch].detach()
            some.stop_gradient = False
            with paddle.enable_grad():
                logits = paddle.matmul(some, weight, transpose_y=tied).astype("float32")
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
