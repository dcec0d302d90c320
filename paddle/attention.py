"""Which attention kernel Paddle runs: the separate ones of `eager`, or paddle's scaled_dot_product_attention.

The rows of a batch are padded at their end. With causal attention no token sees the padding after it, so the fused
kernels need no other mask. Attention to samples that stand end to end (`--padding-free`) goes sample by sample, or, in
low precision on a GPU, by flashmask. `sdpa` and `flash` call the same function. On a GPU that function takes Paddle's
flash kernel wherever the kernel can run. A run of `flash` without it fails.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from library import FORMERS, transformers

from tunebench.flags import Flags

if FORMERS:
    from paddleformers.nn.attention.interface import AttentionInterface

OF_SAMPLES = "samples_end_to_end"  # PaddleFormers looks attention up by name; this is ours


class Samples:
    """Where the samples of a padding-free micro-batch stand.

    The libraries hand this to their attention unread, as `attn_mask_startend_row_indices`, and then make no mask.
    """

    __slots__ = ("ends", "lengths")

    def __init__(self, lengths: Sequence[int], device: str) -> None:
        """`ends` is `sample_ends`, for flashmask on GPUs."""
        self.lengths = list(lengths)
        self.ends = None if device == "cpu" else paddle.to_tensor(sample_ends(lengths), place=device)


def configure(flags: Flags, config: transformers.PretrainedConfig) -> None:
    """Names in a model's config the attention to build. For ChatGLMv2 `use_one_kernel` chooses it."""
    if FORMERS:
        kernel = "eager" if flags.attention == "eager" else "sdpa"
        if flags.padding_free:
            register_for_samples(flags, kernel)
        config._attn_implementation = OF_SAMPLES if flags.padding_free else kernel
        return
    config.use_flash_attention = flags.attention != "eager" and config.model_type != "chatglm_v2"
    # PaddleNLP's variable, spelled so: with it Llama and Qwen2 leave their mask out.
    os.environ["USE_CASUAL_MASK"] = str(config.use_flash_attention)


def register_for_samples(flags: Flags, kernel: str) -> None:
    """Adds to PaddleFormers' attention one for samples that stand end to end, by the name OF_SAMPLES."""
    if takes_flashmask(flags):
        function = functools.partial(formers_by_flashmask, AttentionInterface()["flashmask"])
    else:
        function = functools.partial(formers_by_sample, AttentionInterface()[kernel], kernel == "sdpa")
    AttentionInterface.register(OF_SAMPLES, function)


def takes_flashmask(flags: Flags) -> bool:
    """Whether one kernel takes all samples. It is for GPUs and low precision."""
    return paddle.get_device() != "cpu" and flags.attention != "eager" and flags.dtype != "fp32"


def takes_mask(flags: Flags) -> bool:
    """Whether the model is given a mask of padding. PaddleFormers' fused attention is causal without it."""
    return flags.attention == "eager" or not FORMERS


def use_one_kernel(flags: Flags, model: paddle.nn.Layer) -> None:
    """Makes ChatGLMv2's attention one kernel. Where samples stand end to end, attention goes sample by sample.

    PaddleNLP's own `use_flash_attention` mixes up the rows of ChatGLMv2's batch. It reshapes a result of
    (batch, width, …) to (width, batch, …) where it should transpose it.
    """
    if flags.padding_free and not FORMERS:  # PaddleFormers looks its function up by the name that `configure` gave
        function = attend_by_flashmask if takes_flashmask(flags) else attend_by_sample
        for layer in getattr(model, model.base_model_prefix).layers:
            layer.self_attn.attn_func = functools.partial(function, layer.self_attn.attn_func)
    if flags.attention == "eager" or model.config.model_type != "chatglm_v2":
        return
    for layer in model.chatglm_v2.encoder.layers:
        attention = layer.self_attention.core_attention
        attention.forward = functools.partial(attend, attention)


def sample_ends(lengths: Sequence[int]) -> np.ndarray:
    """For each key the first query after its sample, int32, (1, tokens): flashmask's `startend_row_indices`.

    From that query on flashmask hides the key. Being causal, it also hides the key from the queries before it.
    """
    return np.repeat(np.cumsum(lengths, dtype=np.int32), lengths)[None]


def attend_by_sample(
    attend: Callable[..., paddle.Tensor],
    query: paddle.Tensor,
    config: transformers.PretrainedConfig,
    key: paddle.Tensor,
    value: paddle.Tensor,
    mask: None,
    *rest: Any,
    attn_mask_startend_row_indices: Samples,
    **others: Any,
) -> paddle.Tensor:
    """PaddleNLP's attention to each sample alone, which is causal without a mask.

    From (1, tokens, heads, head size) to (1, tokens, hidden), with --sequence-parallel to (tokens, hidden).
    """
    samples = zip(*(x.split(attn_mask_startend_row_indices.lengths, axis=1) for x in (query, key, value)), strict=True)
    axis = 0 if config.sequence_parallel else 1
    return paddle.concat([attend(q, config, k, v, None, *rest, **others) for q, k, v in samples], axis)


def attend_by_flashmask(
    attend: Callable[..., paddle.Tensor],
    query: paddle.Tensor,
    config: transformers.PretrainedConfig,
    key: paddle.Tensor,
    value: paddle.Tensor,
    *rest: Any,
    attn_mask_startend_row_indices: Samples,
    **others: Any,
) -> paddle.Tensor:
    """PaddleNLP's call of flashmask, one kernel for all samples."""
    query, key = (x.astype(value.dtype) for x in (query, key))  # at O1 the rotary embedding leaves them in float32
    others["attn_mask_startend_row_indices"] = attn_mask_startend_row_indices.ends
    return attend(query, config, key, value, *rest, **others)


def formers_by_sample(
    attend: Callable[..., tuple[paddle.Tensor, Any]],
    causal: bool,
    layer: paddle.nn.Layer,
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    attention_mask: None,
    attn_mask_startend_row_indices: Samples,
    **others: Any,
) -> tuple[paddle.Tensor, None]:
    """PaddleFormers' attention to each sample alone: from (1, heads, tokens, head size) to (1, tokens, hidden).

    `causal`: `attend` is causal without a mask. If not, it is given one, as PaddleNLP's makes it.
    """
    parts = []
    split = (x.split(attn_mask_startend_row_indices.lengths, axis=2) for x in (query, key, value))
    for length, *sample in zip(attn_mask_startend_row_indices.lengths, *split, strict=True):
        mask = None if causal else causal_mask(length, query.dtype)
        parts.append(attend(layer, *sample, attention_mask=mask, **others)[0])
    return paddle.concat(parts, axis=1), None


def causal_mask(length: int, dtype: paddle.dtype) -> paddle.Tensor:
    """What is added to the scores of one sample, (1, 1, length, length): it hides later keys."""
    return paddle.triu(paddle.full([1, 1, length, length], paddle.finfo(dtype).min, dtype), 1)


def formers_by_flashmask(
    attend: Callable[..., tuple[paddle.Tensor, Any]],
    *inputs: Any,
    attn_mask_startend_row_indices: Samples,
    **others: Any,
) -> tuple[paddle.Tensor, Any]:
    """PaddleFormers' call of flashmask, one kernel for all samples. It takes the indices as (1, 1, tokens)."""
    ends = attn_mask_startend_row_indices.ends.unsqueeze(1)
    return attend(*inputs, attn_mask_startend_row_indices=ends, **others)


def attend(
    self: paddle.nn.Layer, query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, mask: paddle.Tensor
) -> paddle.Tensor:
    """CoreAttention's forward in one kernel: from (width, batch, heads, head size) to (width, batch, hidden).

    With --sequence-parallel the result is (width · batch, hidden).
    """
    # At O1 the float32 table of positions makes queries and keys float32. Fused kernels take inputs of one dtype.
    query, key, value = (x.transpose([1, 0, 2, 3]).astype(value.dtype) for x in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    context = context.transpose([1, 0, 2, 3]).flatten(2)
    return context.flatten(0, 1) if self.config.sequence_parallel else context
