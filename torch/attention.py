"""Which attention kernel PyTorch runs: the separate ones of `eager`, or torch's scaled_dot_product_attention.

The rows of a batch are padded at their end, so that causal attention alone keeps every token from the padding after it.
The fused kernels are given no mask but that: with one, the flash kernels could not run.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from transformers import masking_utils
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from tunebench.checkpoint import Checkpoint
from tunebench.flags import Flags


def implementation(flags: Flags, checkpoint: Checkpoint) -> str:
    """What `from_pretrained` is to be told. Of Bloom transformers has the eager attention only: see `fuse`."""
    eager = flags.attention == "eager" or checkpoint.config["model_type"] == "bloom"
    return "eager" if eager else "sdpa"


def fuse(flags: Flags, model: torch.nn.Module) -> None:
    """Lets a model's attention run as one kernel: the one that torch picks, or the flash kernel and no other."""
    if flags.attention == "eager":
        return
    if model.config.model_type == "bloom":
        # Flash kernels for GPUs take no additive bias, so that torch is left its choice among those that do.
        model.transformer.build_alibi_tensor = causal_alibi
        for block in model.transformer.h:
            block.self_attention.forward = functools.partial(attend_with_alibi, block.self_attention)
        return
    model.register_forward_pre_hook(leave_out_mask, with_kwargs=True)
    # Without a mask transformers looks for packed rows, of which there are none, and waits for the device each time.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if flags.attention == "flash":
        # Despite the name these switches count on CPUs too. Where the flash kernel cannot run, it is an error now.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)


def leave_out_mask(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook for the model: transformers takes no mask for a causal one."""
    return args, kwargs | {"attention_mask": None}


def causal_alibi(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Bloom's bias of each key by its position, and minus infinity for the keys after a query: (heads, width, width).

    One for all rows: where padding would make a difference, a key is after each query that counts.
    """
    width = attention_mask.shape[1]
    alibi = build_alibi_tensor(torch.ones_like(attention_mask[:1]), num_heads, dtype)  # (heads, 1, width)
    later = torch.ones(width, width, dtype=torch.bool, device=alibi.device).triu(1)
    return alibi.expand(-1, width, -1).masked_fill(later, float("-inf"))


def attend_with_alibi(
    self: BloomAttention, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """BloomAttention's forward in one kernel; `alibi` is `causal_alibi`'s, of the heads that this process has."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))  # (batch, heads, width, head size) each
    bias = alibi.to(query.dtype).unsqueeze(0)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return self.dense(context.transpose(1, 2).flatten(2)) + residual, None
