"""Corrects the gradient of a LayerNorm whose scale is frozen, on CPU. Never used on a GPU.

Paddle's CPU kernel multiplies the input's gradient by the scale only where the scale itself asks for a gradient
(`if (d_scale)` in paddle/phi/kernels/cpu/layer_norm_grad_kernel.cc, still so in 3.3.1). The GPU kernel always does.
Bloom's norms are LayerNorms, which LoRA freezes: it would train on wrong gradients.
"""

import functools

import paddle
import paddle.nn.functional as F


def mend_frozen_scales(model: paddle.nn.Layer) -> None:
    """Lets each frozen LayerNorm ask for its scale's gradient. Nothing reads it, and the parameter stays frozen."""
    if paddle.get_device() != "cpu":
        return
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, paddle.nn.LayerNorm) and layer.weight is not None and layer.weight.stop_gradient:
            layer.forward = functools.partial(forward, layer)


def forward(layer: paddle.nn.LayerNorm, x: paddle.Tensor) -> paddle.Tensor:
    """The layer's own forward, with a copy of the scale that autograd takes for a trained one."""
    scale = layer.weight.detach()
    scale.stop_gradient = x.stop_gradient  # norms before the first adapter pass no gradient on
    return F.layer_norm(x, layer._normalized_shape, scale, layer.bias, layer._epsilon)
