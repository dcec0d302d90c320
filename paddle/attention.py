"""Which attention kernel Paddle runs: the separate ones of `eager`, or paddle's scaled_dot_product_attention.

The rows of a batch are padded at their end, so that causal attention alone keeps every token from the padding after it.
The fused kernels are given no mask but that, as on the other side. Where samples stand end to end, each of them is
attended to on its own: sample by sample, or, in low precision on a GPU, by flashmask. `sdpa` and `flash` call the same:
on a GPU Paddle takes its flash kernel wherever that can run, and a run of `flash` where it did not fails.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddlenlp import transformers

from tunebench.flags import Flags
from tunebench.plan import MicroBatch

LENGTHS: list[int] = []  # of the samples that stand end to end in the pass under way
ENDS: list[paddle.Tensor] = []  # where the sample of each token ends, for flashmask


def configure(flags: Flags, config: transformers.PretrainedConfig) -> None:
    """Says in a model's config which attention to build; of ChatGLMv2 `fuse` does it."""
    config.use_flash_attention = flags.attention != "eager" and config.model_type != "chatglm_v2"
    if config.use_flash_attention:
        os.environ["USE_CASUAL_MASK"] = "True"  # PaddleNLP's, spelled so: Llama and Qwen2 then leave their mask out


def expect(batch: MicroBatch) -> None:
    """Names the samples of the pass to come, where they stand end to end."""
    LENGTHS[:] = batch.lengths or ()
    if LENGTHS and paddle.get_device() != "cpu":
        ENDS[:] = [paddle.to_tensor(ends(LENGTHS))]


def fuse(flags: Flags, model: paddle.nn.Layer) -> None:
    """Lets ChatGLMv2's attention run as one kernel, and that of the others sample by sample.

    PaddleNLP's own way, `use_flash_attention`, mixes up the rows of a batch: it reshapes a result of (batch, width, …)
    to (width, batch, …) where it should transpose it.
    """
    if flags.padding_free:
        flashmask = paddle.get_device() != "cpu" and flags.attention != "eager" and flags.dtype != "fp32"
        function = attend_by_flashmask if flashmask else attend_by_sample
        for layer in getattr(model, model.base_model_prefix).layers:
            layer.self_attn.attn_func = functools.partial(function, layer.self_attn.attn_func)
    if flags.attention == "eager" or model.config.model_type != "chatglm_v2":
        return
    for layer in model.chatglm_v2.encoder.layers:
        attention = layer.self_attention.core_attention
        attention.forward = functools.partial(attend, attention)


def ends(lengths: list[int]) -> np.ndarray:
    """For each key the first query after its sample, int32, (1, tokens): from there on flashmask hides it, and before
    the key itself, being causal."""
    return np.repeat(np.cumsum(lengths, dtype=np.int32), lengths)[None]


def attend_by_sample(
    attend: Callable[..., paddle.Tensor],
    query: paddle.Tensor,
    config: transformers.PretrainedConfig,
    key: paddle.Tensor,
    value: paddle.Tensor,
    mask: paddle.Tensor | None,
    *rest: Any,
    **others: Any,
) -> paddle.Tensor:
    """PaddleNLP's attention of each sample, which is causal without a mask: (1, tokens, heads, head size) each."""
    samples = zip(*(x.split(LENGTHS, axis=1) for x in (query, key, value)), strict=True)
    return paddle.concat([attend(q, config, k, v, None, *rest, **others) for q, k, v in samples], axis=1)


def attend_by_flashmask(
    attend: Callable[..., paddle.Tensor],
    query: paddle.Tensor,
    config: transformers.PretrainedConfig,
    key: paddle.Tensor,
    value: paddle.Tensor,
    mask: paddle.Tensor | None,
    *rest: Any,
    **others: Any,
) -> paddle.Tensor:
    """The same by PaddleNLP's call of flashmask, one kernel for all samples."""
    query, key = (x.astype(value.dtype) for x in (query, key))  # at O1 rotary embedding has left them in float32
    others["attn_mask_startend_row_indices"] = ENDS[0]
    return attend(query, config, key, value, None, *rest, **others)


def attend(
    self: paddle.nn.Layer, query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, mask: paddle.Tensor
) -> paddle.Tensor:
    """CoreAttention's forward in one kernel: from (width, batch, heads, head size) to (width, batch, hidden)."""
    # At O1 the table of positions, in float32, has made queries and keys so: no fused kernel takes them beside others.
    query, key, value = (x.transpose([1, 0, 2, 3]).astype(value.dtype) for x in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return context.transpose([1, 0, 2, 3]).flatten(2)
