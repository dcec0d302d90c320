"""Corrects the gradient of a LayerNorm whose scale is frozen, on CPU. Never used on a GPU.

Paddle's CPU kernel takes the scale into the input's gradient only when the scale itself wants a gradient
(`if (d_scale)` in paddle/phi/kernels/cpu/layer_norm_grad_kernel.cc, still so in 3.3.1); the GPU kernel always does.
LoRA on Bloom, whose norms are frozen LayerNorms, would train on wrong gradients.
"""

import paddle


def mend_frozen_scales(model: paddle.nn.Layer) -> None:
    """Lets each LayerNorm scale behind the first adapter take a gradient; nothing reads it, no optimizer holds it.

    Norms before the first adapter pass no gradient on. Call it after the trainable parameters are listed.
    """
    if paddle.get_device() != "cpu":
        return
    passes_gradients = False
    for layer in model.sublayers(include_self=True):  # in the order of execution
        passes_gradients |= any(not p.stop_gradient for p in layer.parameters(include_sublayers=False))
        if passes_gradients and isinstance(layer, paddle.nn.LayerNorm) and layer.weight is not None:
            layer.weight.stop_gradient = False
