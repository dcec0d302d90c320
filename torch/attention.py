"""Which attention kernel PyTorch runs: the separate ones of `eager`, or torch's scaled_dot_product_attention.

The rows of a batch are padded at their end. With causal attention no token sees the padding after it, so the fused
kernels need no other mask. With another mask the flash kernels could not run. Attention to samples that stand end to
end (`--padding-free`) goes sample by sample.
"""

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from tunebench.flags import Flags
from tunebench.models.checkpoint import Checkpoint

# Names of attention functions in transformers, for the whole process; "eager" or "fused" is added to the second.
# transformers makes no mask for a name for which it has no mask function. It wants a package for a name with "flash".
CAUSAL, BY_SAMPLE = "causal", "by_sample_"


class Samples:
    """Where the samples of a padding-free micro-batch stand. The model hands this to its attention unread.

    It is no tuple and no dataclass: of those torch's compiler makes other code for each number of samples.
    """

    __slots__ = ("ends", "lengths", "longest")

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """`ends` is 0 and where each sample ends, int32, (samples + 1,), for kernels of variable length on GPUs."""
        self.lengths, self.longest = list(lengths), max(lengths)
        self.ends: torch.Tensor | None = None
        if device.type == "cuda":
            self.ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)


def implementation(flags: Flags, checkpoint: Checkpoint) -> str:
    """The attention function's name for `from_pretrained`. `use_one_kernel` replaces Bloom's attention afterwards."""
    if flags.padding_free and checkpoint.config["model_type"] != "bloom":
        kind = "eager" if flags.attention == "eager" else "fused"
        name = BY_SAMPLE + kind
        AttentionInterface.register(name, functools.partial(attend_by_sample, kind))
        return name
    if flags.attention == "eager":
        return "eager"
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    return CAUSAL


def use_one_kernel(flags: Flags, model: torch.nn.Module) -> None:
    """Makes a model's attention one kernel: the one that torch chooses, cuDNN's left out, or the flash kernel alone."""
    if flags.attention == "eager":
        return
    bloom = model.config.model_type == "bloom"
    # cuDNN makes a plan for each new shape, which takes longer than the attention itself. Widths change in each step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Despite their names these switches count on CPUs too. Where they leave no kernel that can run, torch raises.
    for allow in (torch.backends.cuda.enable_mem_efficient_sdp, torch.backends.cuda.enable_math_sdp):
        allow(bloom or flags.attention != "flash")
    if bloom:
        # torch's flash kernels for GPUs take no additive bias. torch chooses among the kernels that do.
        model.samples = None
        model.transformer.build_alibi_tensor = causal_alibi
        for block in model.transformer.h:
            block.self_attention.forward = functools.partial(attend_with_alibi, block.self_attention, model)
        model.register_forward_pre_hook(bind_samples, with_kwargs=True)


def attend_by_sample(
    kind: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    samples: Samples,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample: from (1, heads, tokens, head size) to (1, tokens, heads, head size).

    In low precision on a GPU torch's flash kernel takes all samples at once, also within compiled code. `eager` is the
    model's own function.
    """
    if kind == "eager" or samples.ends is None or value.dtype == torch.float32:
        return attend_one_by_one(kind, module, query, key, value, scaling, samples), None
    grouped = query.shape[1] != key.shape[1]
    # At O1 the rotary embedding leaves queries and keys in float32.
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    ends, longest = samples.ends, samples.longest
    how = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": grouped}  # (-1, 0): causal
    return varlen_attn(query, key, value, ends, ends, longest, longest, **how).unsqueeze(0), None


@torch.compiler.disable  # the compiler would make other code for other lengths
def attend_one_by_one(
    kind: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    samples: Samples,
) -> torch.Tensor:
    """As `attend_by_sample`, with a kernel of its own for each sample."""
    grouped, parts = query.shape[1] != key.shape[1], []
    for q, k, v in zip(*(x.split(samples.lengths, dim=2) for x in (query, key, value)), strict=True):
        if kind == "eager":
            later = torch.full((q.shape[2],) * 2, torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
            eager = sys.modules[type(module).__module__].eager_attention_forward
            parts.append(eager(module, q, k, v, later[None, None], scaling)[0])
        else:
            part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
            parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def bind_samples(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook of Bloom: binds the samples to the model, since its blocks get no unknown arguments.

    Bloom takes no positions. It calls `causal_alibi` only where it has a mask, and with the mask's width.
    """
    model.samples = kwargs.pop("samples", None)
    if model.samples:
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"][:, : model.samples.longest])
        del kwargs["position_ids"]
    return args, kwargs


def causal_alibi(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Bloom's bias of each key by its position, minus infinity for the keys after a query: (heads, width, width).

    One bias serves all rows. It leaves padding out of account: padded keys come after every query that counts.
    """
    width = attention_mask.shape[1]
    alibi = build_alibi_tensor(torch.ones_like(attention_mask[:1]), num_heads, dtype)  # (heads, 1, width)
    later = torch.ones(width, width, dtype=torch.bool, device=alibi.device).triu(1)
    return alibi.expand(-1, width, -1).masked_fill(later, float("-inf"))


@torch.compiler.disable  # as above
def attend_with_alibi(
    self: BloomAttention,
    model: torch.nn.Module,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """BloomAttention's forward in one kernel. `alibi` is `causal_alibi`'s, of the heads that this process has."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))  # (batch, heads, width, head size) each
    bias, parts = alibi.to(query.dtype).unsqueeze(0), []
    lengths = model.samples.lengths if model.samples else [query.shape[2]]
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        mask = bias[..., : q.shape[2], : q.shape[2]]
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))
    return self.dense(torch.cat(parts, dim=1).flatten(2)) + residual, None
