"""RMSNorm in one kernel on a GPU (`--lean`), in place of the libraries' seven. Paddle has no such kernel for CPUs.

PaddleNLP's own `use_fused_rms_norm` needs a package, `fused_ln`, that PyPI does not have. Paddle's older
`fused_rms_norm_ext` has no kernel for float16; this one has (paddle/phi/kernels/gpu/rms_norm_cuda_kernel.cu).
"""

import functools

import built
import paddle
import paddle.nn.functional as F

from tunebench.flags import Flags

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "RMSNorm")  # the last one is ChatGLMv2's, and PaddleFormers'


def use_one_kernel(flags: Flags, model: paddle.nn.Layer) -> None:
    """Replaces the RMSNorms of Llama, Qwen2 and ChatGLMv2. Bloom's LayerNorms are one kernel already."""
    if not flags.lean or paddle.get_device() == "cpu" or model.config.model_type == "bloom":
        return
    for layer in norms_of(model):
        layer.forward = functools.partial(normalise, layer, built.epsilon_of(layer))


def norms_of(model: paddle.nn.Layer) -> list[paddle.nn.Layer]:
    """All RMSNorms. Raises RuntimeError where there are not two of each layer and the last one."""
    norms = [layer for name, layer in built.named(model) if name in NORMS]
    expected = 2 * model.config.num_hidden_layers + 1
    if len(norms) != expected:
        raise RuntimeError(f"--lean found {len(norms)} norms to replace, and the model has {expected}")
    return norms


def normalise(layer: paddle.nn.Layer, epsilon: float, x: paddle.Tensor) -> paddle.Tensor:
    """x / sqrt(mean(x²) + epsilon) · weight over the last axis, computed in float32."""
    return F.rms_norm(x, layer.weight.shape, layer.weight, epsilon)[0]
