"""Kernels for Llama on a CPU (`--lean`): the same mathematics in fewer and cheaper operations of Paddle's.

They take the place of layers of PaddleNLP's and of PaddleFormers' Llama.

On a CPU, Paddle's matrix products and its elementwise kernels of equal shapes run on all threads. Its broadcasts,
copies, reductions and activations run on one. So matrix products with ones sum and broadcast here, and a matrix product
swaps the halves for the rotary embedding. Attention keeps one layout, (heads, rows, head size), whose copies are fast.

tests/scripts/test_tuned.py and test_paddleformers.py compare losses and gradient norms with PaddleNLP's own.
"""

import functools
import math
from typing import Any, NamedTuple

import paddle
from library import FORMERS
from paddle import _C_ops
from paddle.autograd import PyLayer
from rms_norm import norms_of

from tunebench.flags import Flags

LOWEST = -1e30  # added to the scores of later keys


class Layout(NamedTuple):
    """A micro-batch: the lengths of its samples (or padded rows), end to end, and tensors that all layers share.

    `cos` and `sin` are the rotary tables, (heads, rows, head size). `later` has, by length, what is added to the scores
    of the samples that `cut` gives: (heads, length, length), or for all samples at once where they are equally long.
    """

    lengths: list[int]
    cos: paddle.Tensor
    sin: paddle.Tensor
    later: dict[int, paddle.Tensor]


def replace_layers(flags: Flags, model: paddle.nn.Layer) -> None:
    """Replaces layers where these kernels apply: RMSNorm, SwiGLU, and Llama's attention without grouped queries."""
    if not flags.lean or paddle.get_device() != "cpu" or flags.mp > 1 or model.config.model_type != "llama":
        return
    for layer in norms_of(model):
        layer.forward = functools.partial(normalise, layer)
    if flags.fuse_projections:
        return
    llama = getattr(model, model.base_model_prefix)
    for layer in llama.layers:
        layer.mlp.forward = functools.partial(feed_forward, layer.mlp)
    config = model.config
    if config.num_attention_heads == config.num_key_value_heads:
        for layer in llama.layers:
            layer.self_attn.forward = functools.partial(attend_in_formers if FORMERS else attend, layer.self_attn)
        hook = functools.partial(put_layout_in, config.num_attention_heads)
        llama.register_forward_pre_hook(hook, with_kwargs=True)


def put_layout_in(
    heads: int, llama: paddle.nn.Layer, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook of the model without its head: puts a `Layout` in place of flashmask's input.

    The libraries hand that input to each layer, and then make no mask.
    """
    rows, width = (args[0] if args else kwargs["input_ids"]).shape
    samples = kwargs.get("attn_mask_startend_row_indices")
    lengths = samples.lengths if samples else [width] * rows
    layout = lay_out(*rotary_tables(llama, max(lengths)), heads, lengths)
    return args, kwargs | {"attn_mask_startend_row_indices": layout, "attention_mask": None}


@paddle.no_grad()
def rotary_tables(llama: paddle.nn.Layer, positions: int) -> list[paddle.Tensor]:
    """The cosines and the sines, each (positions or more, head size). PaddleNLP keeps those of all positions."""
    if FORMERS:
        tables = llama.rotary_emb(paddle.ones([1]), paddle.arange(positions)[None])
    else:
        rotary = llama.layers[0].self_attn.rotary_emb
        tables = rotary.cos_cached, rotary.sin_cached
    return [table.reshape([-1, table.shape[-1]]) for table in tables]


@paddle.no_grad()
def lay_out(cos: paddle.Tensor, sin: paddle.Tensor, heads: int, lengths: list[int]) -> Layout:
    """The layout of samples of these lengths, from tables (positions, head size)."""
    tables = (paddle.concat([table[:n] for n in lengths]).unsqueeze(0).tile([heads, 1, 1]) for table in (cos, sin))
    together = heads * len(lengths) if len(set(lengths)) == 1 else heads
    hidden = ((n, paddle.triu(paddle.full([n, n], LOWEST), 1)) for n in set(lengths))
    return Layout(lengths, *tables, {n: mask.unsqueeze(0).tile([together, 1, 1]) for n, mask in hidden})


def normalise(layer: paddle.nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """The forward pass of LlamaRMSNorm and PaddleFormers' RMSNorm."""
    return RMSNorm.apply(x, layer.weight, layer.variance_epsilon)


def feed_forward(layer: paddle.nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """The forward pass of LlamaMLP and PaddleFormers' MLP."""
    return layer.down_proj(SwiGLU.apply(layer.gate_proj(x), layer.up_proj(x)))


def attend(
    layer: paddle.nn.Layer,
    hidden_states: paddle.Tensor,
    *_: Any,
    attn_mask_startend_row_indices: Layout,
    **__: Any,
) -> paddle.Tensor:
    """LlamaAttention's forward, causal within each sample."""
    shape = hidden_states.shape
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (project(hidden_states).reshape([-1, shape[-1]]) for project in projections)
    return layer.o_proj(RotaryAttention.apply(q, k, v, layer.num_heads, attn_mask_startend_row_indices).reshape(shape))


def attend_in_formers(
    layer: paddle.nn.Layer, hidden_states: paddle.Tensor, **others: Any
) -> tuple[paddle.Tensor, None]:
    """LLamaAttention's forward, which gives the weights of attention too, or none."""
    return attend(layer, hidden_states, **others), None


class RMSNorm(PyLayer):
    """x / sqrt(mean(x²) + epsilon) · weight over the last axis."""

    @staticmethod
    def forward(ctx, x: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        """From (…, width) and (width,)."""
        shape, width = x.shape, x.shape[-1]
        x = x.reshape([-1, width])
        scale = paddle.rsqrt(paddle.matmul(x * x, ones(width, 1)).scale_(1 / width, epsilon))  # (rows, 1)
        normal = across(scale, width).multiply_(x)
        ctx.save_for_backward(normal, scale, weight)
        ctx.frozen = weight.stop_gradient
        return down(weight, len(x)).multiply_(normal).reshape(shape)

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """By x and by weight."""
        normal, scale, weight = ctx.saved_tensor()
        shape, width = gradient.shape, gradient.shape[-1]
        gradient = gradient.reshape([-1, width])
        product, rows = gradient * normal, len(gradient)
        by_weight = None if ctx.frozen else paddle.matmul(ones(1, rows), product).reshape([width])
        mean = paddle.matmul(product, weight.unsqueeze(-1)).scale_(1 / width)
        by_x = down(weight, rows).multiply_(gradient).subtract_(across(mean, width).multiply_(normal))
        return by_x.multiply_(across(scale, width)).reshape(shape), by_weight


class SwiGLU(PyLayer):
    """gate · sigmoid(gate) · up. sigmoid(x) is (1 + tanh(x / 2)) / 2: tanh takes half of sigmoid's time here."""

    @staticmethod
    def forward(ctx, gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
        """From two of one shape."""
        sigmoid = gate.scale(0.5).tanh_().scale_(0.5, 0.5)
        silu = gate * sigmoid
        ctx.save_for_backward(up, sigmoid, silu)
        return silu * up

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """By gate and by up."""
        up, sigmoid, silu = ctx.saved_tensor()
        by_gate = sigmoid.scale(-1.0, 1.0).multiply_(silu).add_(sigmoid)  # of silu
        return by_gate.multiply_(up).multiply_(gradient), gradient * silu


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
            scores = paddle.matmul(sample[0], sample[1], transpose_y=True).add_(layout.later[sample[0].shape[1]])
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


@functools.lru_cache(64)
def ones(*shape: int) -> paddle.Tensor:
    """Ones, to sum with."""
    return paddle.ones(shape)


def across(column: paddle.Tensor, width: int) -> paddle.Tensor:
    """(rows, 1) as (rows, width)."""
    return paddle.matmul(column, ones(1, width))


def down(row: paddle.Tensor, rows: int) -> paddle.Tensor:
    """(width,) as (rows, width)."""
    return paddle.matmul(ones(rows, 1), row.unsqueeze(0))


def by_head(x: paddle.Tensor, heads: int) -> paddle.Tensor:
    """From (rows, hidden) to (heads, rows, head size)."""
    return x.reshape([x.shape[0], heads, -1]).transpose([1, 0, 2]).contiguous()


def by_row(x: paddle.Tensor) -> paddle.Tensor:
    """From (heads, rows, head size) to (rows, hidden)."""
    return x.transpose([1, 0, 2]).contiguous().reshape([x.shape[1], -1])


def rotate(x: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """Rotary embedding."""
    return (x * layout.cos).add_(paddle.matmul(x, rotation_of_halves(x.shape[-1])).multiply_(layout.sin))


def rotate_back(x: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """Its transpose: the gradient."""
    return (x * layout.cos).add_(paddle.matmul(x * layout.sin, rotation_of_halves(x.shape[-1]), transpose_y=True))


@functools.cache
def rotation_of_halves(size: int) -> paddle.Tensor:
    """(size, size): a product with it puts the negated second half of the last axis before the first half."""
    one, none = paddle.eye(size // 2), paddle.zeros([size // 2, size // 2])
    return paddle.concat([paddle.concat([none, one], axis=1), paddle.concat([-one, none], axis=1)])


def cut(x: paddle.Tensor, layout: Layout) -> list[paddle.Tensor]:
    """The rows of each sample; those of equal length at once: (heads · samples, rows, head size)."""
    if len(set(layout.lengths)) == 1:
        return [x.reshape([-1, layout.lengths[0], x.shape[-1]])]
    return paddle.split(x, layout.lengths, axis=1)


def join(parts: list[paddle.Tensor], heads: int) -> paddle.Tensor:
    """Joins what `cut` gave: (heads, rows, head size)."""
    if len(parts) == 1:
        return parts[0].reshape([heads, -1, parts[0].shape[-1]])
    return paddle.concat(parts, axis=1)
