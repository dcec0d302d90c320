"""Records which kernels Paddle calls, so that a silently ignored flag is no result."""

from collections.abc import Callable
from typing import Any

import paddle
from paddle.base import core

# Parts of the names of matrix products: of activations with weights, and in most attention. ChatGLMv2's eager attention
# calls `bmm`, which autocast leaves in float32.
PRODUCTS = ("matmul", "linear", "gemm")
DTYPES = ("float16", "bfloat16", "float32")  # in the order of Paddle's counts, which end with all others


def watch(model: paddle.nn.Layer, check: Callable[[set[str], set[str], set[str]], None]) -> None:
    """Calls `check` with the weights' dtypes, the matrix products' and the attention kernels of the first forward pass.

    The counts are those that paddle.amp.debugging.collect_operator_stats prints. The first step pays for them.
    Rotary embeddings are left out: PaddleFormers' multiplies positions with frequencies, in float32 at any precision.
    """

    def begin(*_: Any) -> None:
        core.clear_low_precision_op_list()
        go_on()

    def go_on(*_: Any) -> None:
        paddle.set_flags({"FLAGS_low_precision_op_list": 1})

    def pause(*_: Any) -> None:
        paddle.set_flags({"FLAGS_low_precision_op_list": 0})

    def end(*_: Any) -> None:
        pause()
        for hook in hooks:
            hook.remove()
        matmuls, attention = set(), set()
        for name, counts in core.get_low_precision_op_list().items():
            if any(part in name for part in PRODUCTS):
                matmuls.update(dtype for dtype, n in zip(DTYPES, counts.split(","), strict=False) if n != "0")
            elif name == "softmax" or "attn" in name or "attention" in name:
                attention.add(name)
        check({name_of(p.dtype) for p in model.parameters()}, matmuls, attention)

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_post_hook(end)]
    for layer in model.sublayers():
        if type(layer).__name__.endswith("RotaryEmbedding"):
            hooks += [layer.register_forward_pre_hook(pause), layer.register_forward_post_hook(go_on)]


def name_of(dtype: paddle.dtype) -> str:
    """A dtype without the framework's name, such as float32."""
    return str(dtype).removeprefix("paddle.")
