"""Leaner kernels for Llama on a CPU (`--lean`): the same mathematics in fewer and cheaper operations of Paddle's.

On a CPU most of Paddle's elementwise kernels and reductions run on one thread, its products on all: here sums are
products with ones, and rotary embedding and attention keep one layout, (heads, rows, head size), whose copies are fast.
tests/test_tuned.py compares losses and gradient norms with PaddleNLP's own.
"""

import functools
import math
from typing import Any, NamedTuple

import paddle
from paddle import _C_ops
from paddle.autograd import PyLayer

from tunebench.flags import Flags
from tunebench.plan import MicroBatch

LOWEST = -1e30  # what is added to the scores of later keys


class Layout(NamedTuple):
    """The pass under way: the lengths of its samples (or padded rows), end to end, and their rotary tables.

    `cos` and `sin` are (heads, rows, head size); the first half of `sin` has its sign turned.
    """

    lengths: list[int]
    cos: paddle.Tensor
    sin: paddle.Tensor


LAYOUT: list[Layout] = []


def fuse(flags: Flags, model: paddle.nn.Layer) -> None:
    """Takes these kernels where they apply: RMSNorm, and the attention of Llama without grouped queries."""
    if not flags.lean or paddle.get_device() != "cpu" or flags.mp > 1 or model.config.model_type != "llama":
        return
    for layer in model.sublayers():
        if type(layer).__name__ == "LlamaRMSNorm":
            layer.forward = functools.partial(normalise, layer)
    config = model.config
    if config.num_attention_heads == config.num_key_value_heads:
        layers = model.llama.layers
        for layer in layers:
            layer.self_attn.forward = functools.partial(attend, layer.self_attn)
        model.llama._prepare_decoder_attention_mask = lambda *_, **__: None
        rotary = layers[0].self_attn.rotary_emb
        tables = [table.reshape([-1, table.shape[-1]]) for table in (rotary.cos_cached, rotary.sin_cached)]
        EXPECT[:] = [functools.partial(lay_out, *tables, config.num_attention_heads)]


EXPECT: list[Any] = []  # what makes the layout of a pass, once a model asked for one


def expect(batch: MicroBatch) -> None:
    """Makes the layout of the pass to come."""
    for make in EXPECT:
        rows, width = batch.input_ids.shape
        LAYOUT[:] = [make(batch.lengths or [width] * rows)]


@paddle.no_grad()
def lay_out(cos: paddle.Tensor, sin: paddle.Tensor, heads: int, lengths: list[int]) -> Layout:
    """The layout of samples of these lengths, from tables (positions, head size)."""
    cos, sin = (paddle.concat([table[:n] for n in lengths]) for table in (cos, sin))
    half = sin.shape[-1] // 2
    sin = paddle.concat([-sin[:, :half], sin[:, half:]], axis=-1)
    return Layout(lengths, *(table.unsqueeze(0).tile([heads, 1, 1]) for table in (cos, sin)))


def normalise(layer: paddle.nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """LlamaRMSNorm's forward."""
    return RMSNorm.apply(x, layer.weight, layer.variance_epsilon)


def attend(layer: paddle.nn.Layer, hidden_states: paddle.Tensor, *_: Any, **__: Any) -> paddle.Tensor:
    """LlamaAttention's forward, causal within each sample."""
    shape = hidden_states.shape
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (project(hidden_states).reshape([-1, shape[-1]]) for project in projections)
    return layer.o_proj(RotaryAttention.apply(q, k, v, layer.num_heads, LAYOUT[0]).reshape(shape))


class RMSNorm(PyLayer):
    """x / sqrt(mean(x²) + epsilon) · weight over the last axis."""

    @staticmethod
    def forward(ctx, x: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        """From (…, width) and (width,)."""
        shape, width = x.shape, x.shape[-1]
        x = x.reshape([-1, width])
        scale = paddle.rsqrt(paddle.matmul(x * x, ones(width, 1)).scale_(1 / width, epsilon))  # (rows, 1)
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        ctx.frozen = weight.stop_gradient
        return (normal * weight).reshape(shape)

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """By x and by weight."""
        normal, scale, weight = ctx.saved_tensor()
        shape, width = gradient.shape, gradient.shape[-1]
        gradient = gradient.reshape([-1, width])
        product = gradient * normal
        by_weight = None if ctx.frozen else paddle.matmul(ones(1, product.shape[0]), product).reshape([width])
        mean = paddle.matmul(product, weight.unsqueeze(-1)).scale_(1 / width)
        by_x = (gradient * weight).subtract_(normal * mean).multiply_(scale)
        return by_x.reshape(shape), by_weight


class RotaryAttention(PyLayer):
    """Rotary embedding of queries and keys, and causal attention within each sample."""

    @staticmethod
    def forward(ctx, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, heads: int, layout: Layout) -> paddle.Tensor:
        """From (rows, hidden) each to (rows, hidden)."""
        q, k, v = (by_head(x, heads) for x in (q, k, v))
        ctx.heads, ctx.layout, ctx.factor = heads, layout, 1 / math.sqrt(q.shape[-1])
        q, k = rotate(q, layout).scale_(ctx.factor), rotate(k, layout)
        saved, parts = [], []
        for sample in zip(*(cut(x, layout) for x in (q, k, v)), strict=True):
            scores = paddle.matmul(sample[0], sample[1], transpose_y=True).add_(later(sample[0].shape[1]))
            weights = _C_ops.softmax(scores, -1)
            parts.append(paddle.matmul(weights, sample[2]))
            saved += [*sample, weights]
        ctx.save_for_backward(*saved)
        return by_row(join(parts, heads))

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        """By q, k and v."""
        heads, layout, saved = ctx.heads, ctx.layout, ctx.saved_tensor()
        parts = ([], [], [])
        for i, part in enumerate(cut(by_head(gradient, heads), layout)):
            q, k, v, weights = saved[4 * i : 4 * i + 4]
            parts[2].append(paddle.matmul(weights, part, transpose_x=True))
            by_scores = _C_ops.softmax_grad(weights, paddle.matmul(part, v, transpose_y=True), -1)
            parts[0].append(paddle.matmul(by_scores, k))
            parts[1].append(paddle.matmul(by_scores, q, transpose_x=True))
        q, k, v = (join(each, heads) for each in parts)
        return by_row(rotate_back(q.scale_(ctx.factor), layout)), by_row(rotate_back(k, layout)), by_row(v)


@functools.cache
def ones(*shape: int) -> paddle.Tensor:
    """Ones, to sum with."""
    return paddle.ones(shape)


@functools.cache
def later(size: int) -> paddle.Tensor:
    """What is added to scores, (size, size): of a key after the query so little that nothing is left of it."""
    return paddle.triu(paddle.full([size, size], LOWEST), 1)


def by_head(x: paddle.Tensor, heads: int) -> paddle.Tensor:
    """From (rows, hidden) to (heads, rows, head size)."""
    return x.reshape([x.shape[0], heads, -1]).transpose([1, 0, 2]).contiguous()


def by_row(x: paddle.Tensor) -> paddle.Tensor:
    """From (heads, rows, head size) to (rows, hidden)."""
    return x.transpose([1, 0, 2]).contiguous().reshape([x.shape[1], -1])


def rotate(x: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """Rotary embedding."""
    return (x * layout.cos).add_(swap_halves(x).multiply_(layout.sin))


def rotate_back(x: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """Its transpose: the gradient."""
    return (x * layout.cos).add_(swap_halves(x * layout.sin))


def swap_halves(x: paddle.Tensor) -> paddle.Tensor:
    """Of the last axis."""
    half = x.shape[-1] // 2
    return paddle.concat([x[:, :, half:], x[:, :, :half]], axis=-1)


def cut(x: paddle.Tensor, layout: Layout) -> list[paddle.Tensor]:
    """The rows of each sample; those of equal length at once: (heads · samples, rows, head size)."""
    if len(set(layout.lengths)) == 1:
        return [x.reshape([-1, layout.lengths[0], x.shape[-1]])]
    return paddle.split(x, layout.lengths, axis=1)


def join(parts: list[paddle.Tensor], heads: int) -> paddle.Tensor:
    """The samples in one again."""
    if len(parts) == 1:
        return parts[0].reshape([heads, -1, parts[0].shape[-1]])
    return paddle.concat(parts, axis=1)
