"""Which attention kernel PyTorch runs: the separate ones of `eager`, or torch's scaled_dot_product_attention.

The rows of a batch are padded at their end, so that causal attention alone keeps every token from the padding after it.
The fused kernels are given no mask but that: with one, the flash kernels could not run. Where samples stand end to end,
each of them is attended to on its own.
"""

import functools
import itertools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from tunebench.checkpoint import Checkpoint
from tunebench.flags import Flags
from tunebench.plan import MicroBatch

BY_SAMPLE = "by_sample"
LENGTHS: list[int] = []  # of the samples that stand end to end in the pass under way
ENDS: list[torch.Tensor] = []  # where they start (and the last one ends), for kernels of variable length


def implementation(flags: Flags, checkpoint: Checkpoint) -> str:
    """What `from_pretrained` is to be told. Of Bloom transformers has the eager attention only: see `fuse`."""
    bloom = checkpoint.config["model_type"] == "bloom"
    if flags.padding_free and not bloom:
        AttentionInterface.register(BY_SAMPLE, functools.partial(attend_by_sample, flags.attention))
        AttentionMaskInterface.register(BY_SAMPLE, lambda *_, **__: None)
        return BY_SAMPLE
    return "eager" if flags.attention == "eager" or bloom else "sdpa"


def fuse(flags: Flags, model: torch.nn.Module) -> None:
    """Lets a model's attention run as one kernel: the one that torch picks, or the flash kernel and no other."""
    # Without a mask transformers looks for packed rows, which it is not to handle, and waits for the device each time.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if flags.attention == "eager":
        return
    if model.config.model_type == "bloom":
        # Flash kernels for GPUs take no additive bias, so that torch is left its choice among those that do.
        model.transformer.build_alibi_tensor = causal_alibi
        for block in model.transformer.h:
            block.self_attention.forward = functools.partial(attend_with_alibi, block.self_attention)
        model.register_forward_pre_hook(mask_for_positions, with_kwargs=True)
        return
    model.register_forward_pre_hook(leave_out_mask, with_kwargs=True)
    if flags.attention == "flash":
        # Despite the name these switches count on CPUs too. Where the flash kernel cannot run, it is an error now.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)


def leave_out_mask(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook for the model: transformers takes no mask for a causal one."""
    return args, kwargs | {"attention_mask": None}


def mask_for_positions(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook for Bloom, which has no use for positions, and asks for `causal_alibi` only where there is a mask."""
    if kwargs.pop("position_ids", None) is not None:
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    return args, kwargs


def expect(batch: MicroBatch, device: torch.device) -> None:
    """Names the samples of the pass to come, where they stand end to end."""
    LENGTHS[:] = batch.lengths or ()
    if LENGTHS and device.type == "cuda":
        ENDS[:] = [torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32).to(device)]


@torch.compiler.disable  # it would make other code for other lengths
def attend_by_sample(
    attention: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample: from (1, heads, tokens, head size) to (1, tokens, heads, head size).

    In low precision on a GPU torch's flash kernel takes all samples at once; `eager` is transformers' own of the model.
    """
    grouped = query.shape[1] != key.shape[1]
    if attention != "eager" and query.is_cuda and value.dtype != torch.float32:
        # At O1 rotary embedding has left queries and keys in float32.
        query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        longest, (ends,) = max(LENGTHS), ENDS
        how = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": grouped}  # (-1, 0): causal
        return varlen_attn(query, key, value, ends, ends, longest, longest, **how).unsqueeze(0), None
    parts = []
    for q, k, v in zip(*(x.split(LENGTHS, dim=2) for x in (query, key, value)), strict=True):
        if attention == "eager":
            later = torch.full((q.shape[2],) * 2, torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
            eager = sys.modules[type(module).__module__].eager_attention_forward
            parts.append(eager(module, q, k, v, later[None, None], scaling)[0])
        else:
            part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
            parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def causal_alibi(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Bloom's bias of each key by its position, and minus infinity for the keys after a query: (heads, width, width).

    One for all rows: where padding would make a difference, a key is after each query that counts.
    """
    width = max(LENGTHS, default=attention_mask.shape[1])
    alibi = build_alibi_tensor(torch.ones_like(attention_mask[:1, :width]), num_heads, dtype)  # (heads, 1, width)
    later = torch.ones(width, width, dtype=torch.bool, device=alibi.device).triu(1)
    return alibi.expand(-1, width, -1).masked_fill(later, float("-inf"))


@torch.compiler.disable  # as above
def attend_with_alibi(
    self: BloomAttention, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """BloomAttention's forward in one kernel; `alibi` is `causal_alibi`'s, of the heads that this process has."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))  # (batch, heads, width, head size) each
    bias, parts = alibi.to(query.dtype).unsqueeze(0), []
    lengths = LENGTHS or [query.shape[2]]
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        mask = bias[..., : q.shape[2], : q.shape[2]]
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))
    return self.dense(torch.cat(parts, dim=1).flatten(2)) + residual, None
