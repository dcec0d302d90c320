"""Reads back from a PyTorch model's modules what it computes with, so that a silently ignored config is no result."""

from types import SimpleNamespace

import torch

from tunebench.models.readback import PROBES, activation_name, only
from tunebench.record import Built


def read(model: torch.nn.Module) -> Built:
    """The numbers of a built model, with or without adapters. A sliced model gives those of the whole."""
    norms = [module for name, module in named(model) if name.endswith(("RMSNorm", "LayerNorm"))]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    attentions = [module for name, module in named(model) if name.endswith("Attention")]
    heads, key_value_heads, head_size = only(map(heads_of, attentions))
    angles, scale = rotary_of(model)
    return Built(
        layers=len(attentions),
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        vocabulary=only([shape_of(embedding.weight)[0], shape_of(head.weight)[0]]),
        activation=only(activation_of(module) for name, module in named(model) if name.endswith("MLP")),
        norm_epsilon=only(getattr(norm, "variance_epsilon", None) or norm.eps for norm in norms),
        tied=embedding.weight is head.weight,
        window=only(getattr(attention, "sliding_window", None) for attention in attentions),
        padding_row=embedding.padding_idx,
        rotary=angles,
        rotary_scale=scale,
        alibi=alibi_of(model, heads),
    )


def named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules with the names of their classes."""
    return [(type(module).__name__, module) for module in model.modules()]


def heads_of(attention: torch.nn.Module) -> tuple[int, int, int]:
    """Heads, key-value heads and head size, by the shapes of the projections."""
    if hasattr(attention, "query_key_value"):  # Bloom's: q, k and v of one head after the other
        heads = shape_of(attention.query_key_value.weight)[0] // (3 * attention.head_dim)
        return heads, heads, attention.head_dim
    widths = [shape_of(layer.weight)[0] for layer in (attention.q_proj, attention.k_proj)]
    return widths[0] // attention.head_dim, widths[1] // attention.head_dim, attention.head_dim


def rotary_of(model: torch.nn.Module) -> tuple[list[float] | None, float | None]:
    """By how much position 1 turns each pair of numbers, in radians, and the factor that scales them."""
    tables = []
    for name, module in named(model):
        if name.endswith("RotaryEmbedding"):
            device = module.inv_freq.device
            cos, sin = module(torch.ones(1, device=device), torch.ones(1, 1, dtype=torch.long, device=device))
            tables.append([half(table.flatten()) for table in (cos, sin)])
    if not tables:
        return None, None
    cos, sin = (torch.tensor(only(tuple(pair[i].tolist()) for pair in tables), dtype=torch.float64) for i in (0, 1))
    scale = torch.hypot(cos, sin)
    if not torch.allclose(scale, scale[0], rtol=1e-5):
        raise RuntimeError("the rotary embedding scales its numbers differently")
    return torch.atan2(sin, cos).tolist(), scale.mean().item()


def half(table: torch.Tensor) -> torch.Tensor:
    """The angle of each pair. The table has each twice: as two halves, or side by side."""
    pairs = len(table) // 2
    if torch.equal(table[:pairs], table[pairs:]):
        return table[:pairs]
    if torch.equal(table[0::2], table[1::2]):
        return table[0::2]
    raise RuntimeError("the rotary embedding does not turn pairs of numbers")


def alibi_of(model: torch.nn.Module, heads: int) -> list[float] | None:
    """What Bloom adds to the score of the key at position 1, by head."""
    for name, module in named(model):
        if name == "BloomModel":
            ones = torch.ones(1, 2, dtype=torch.long, device=module.word_embeddings_layernorm.weight.device)
            alibi = module.build_alibi_tensor(ones, heads, torch.float32)
            return alibi.reshape(heads, -1, 2)[:, -1, 1].tolist()
    return None


def activation_of(layer: torch.nn.Module) -> str:
    """The activation of a feed-forward layer, from its forward pass on some numbers without its matrix products."""
    probes = torch.tensor(PROBES)
    if hasattr(layer, "gelu_impl"):
        return activation_name(layer.gelu_impl(probes).tolist())
    ones = torch.ones_like(probes)
    plain = {"gate_proj": lambda x: x, "up_proj": lambda x: ones, "down_proj": lambda x: x}
    plain["gate_up_proj"] = lambda x: torch.cat([x, ones])
    own = {name: getattr(layer, name) for name in ("act_fn", "activation_fn") if hasattr(layer, name)}
    return activation_name(type(layer).forward(SimpleNamespace(**plain, **own), probes).tolist())


def shape_of(weight: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole weight, sharded or not."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
