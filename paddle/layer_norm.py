"""Corrects the gradient of a LayerNorm whose scale is frozen, on CPU. Never used on a GPU.

Paddle's CPU kernel takes the scale into the input's gradient only when the scale itself wants a gradient
(`if (d_scale)` in paddle/phi/kernels/cpu/layer_norm_grad_kernel.cc, still so in 3.3.1); the GPU kernel always does.
LoRA on Bloom, whose norms are frozen LayerNorms, would train on wrong gradients.
"""

import paddle


def mend_frozen_scales(model: paddle.nn.Layer) -> None:
    """Lets every LayerNorm scale take a gradient. The optimizer, which does not hold them, leaves them as they are.

    Call it after the trainable parameters are listed. Costs the scales' gradients: one more product and column sum
    per norm in the backward pass.
    """
    if paddle.get_device() != "cpu":
        return
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, paddle.nn.LayerNorm) and layer.weight is not None:
            layer.weight.stop_gradient = False
