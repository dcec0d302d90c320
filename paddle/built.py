"""Reads back from a Paddle model's layers what it computes with, so that a silently ignored config is no result."""

import functools
import sys
from types import SimpleNamespace

import losses
import paddle
from library import DEGREE, FORMERS, peft

from tunebench.models.readback import PROBES, activation_name, only
from tunebench.record import Built

ATTENTIONS = ("LlamaAttention", "LLamaAttention", "Qwen2Attention", "SelfAttention", "BloomAttention")


def read(model: paddle.nn.Layer) -> Built:
    """The numbers of a built model, with or without adapters. A sliced model gives those of the whole."""
    model = model.model if isinstance(model, peft.LoRAModel) else model
    degree = getattr(model.config, DEGREE)
    norms = [layer for name, layer in named(model) if name.endswith(("RMSNorm", "LayerNorm"))]
    embedding, head, tied, transposed = embedding_and_head(model)
    attentions = [layer for name, layer in named(model) if name in ATTENTIONS]
    heads, key_value_heads, head_size = only(heads_of(layer, degree) for layer in attentions)
    angles, scale = rotary_of(model)
    return Built(
        layers=len(attentions),
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        vocabulary=only([whole(embedding.weight, degree)[0], whole(head, degree)[0 if transposed else 1]]),
        activation=only(activation_of(layer) for name, layer in named(model) if name.endswith("MLP")),
        norm_epsilon=only(epsilon_of(norm) for norm in norms),
        tied=tied,
        window=None,  # the libraries' models of these families have none, whatever their config says
        padding_row=padding_row_of(embedding),
        rotary=angles,
        rotary_scale=scale,
        alibi=alibi_of(model, heads),
    )


def named(model: paddle.nn.Layer) -> list[tuple[str, paddle.nn.Layer]]:
    """The layers with the names of their classes."""
    return [(type(layer).__name__, layer) for layer in model.sublayers()]


def embedding_and_head(model: paddle.nn.Layer) -> tuple[paddle.nn.Layer, paddle.Tensor, bool, bool]:
    """The embedding, the head's weight, whether they are one tensor, and whether the head's is (vocabulary, hidden)."""
    base = getattr(model, model.base_model_prefix)
    embedding = base.get_input_embeddings()
    head = base.output_layer if hasattr(base, "output_layer") else model.lm_head
    weight = head.decoder_weight if hasattr(head, "decoder_weight") else head.weight
    return embedding, weight, weight is embedding.weight, losses.is_transposed(head)


def padding_row_of(embedding: paddle.nn.Layer) -> int | None:
    """The row that gets no gradient. Paddle says -1 for none; tensor-parallel embeddings have none."""
    row = getattr(embedding, "_padding_idx", None)
    return None if row is None or row < 0 else row


def heads_of(attention: paddle.nn.Layer, degree: int) -> tuple[int, int, int]:
    """Heads, key-value heads and head size, by the shapes of the projections."""
    if hasattr(attention, "q_proj"):
        size = attention.head_dim
        queries, keys = (whole(layer.weight, degree)[1] for layer in (attention.q_proj, attention.k_proj))
        return queries // size, keys // size, size
    if hasattr(attention, "qkv_proj"):  # of each key-value head: its queries, its key and its value
        size, queries = attention.head_dim, attention.num_key_value_groups
        groups = whole(attention.qkv_proj.weight, degree)[1] // ((queries + 2) * size)
        return groups * queries, groups, size
    width = whole(attention.query_key_value.weight, degree)[1]
    if hasattr(attention, "head_dim"):  # Bloom's: q, k and v of one head after the other
        return (heads := width // (3 * attention.head_dim)), heads, attention.head_dim
    size = attention.hidden_size_per_attention_head
    groups = attention.num_multi_query_groups_per_partition * degree
    return width // size - 2 * groups, groups, size


def rotary_of(model: paddle.nn.Layer) -> tuple[list[float] | None, float | None]:
    """By how much position 1 turns each pair of numbers, in radians, and the factor that scales them."""
    tables = []
    for name, layer in named(model):
        if name in ATTENTIONS and hasattr(layer, "rotary_emb"):  # (1, positions, 1, head size), each angle twice
            cos, sin = layer.rotary_emb(paddle.ones([1]), seq_len=2)
            tables.append([half(table[0, 1, 0]) for table in (cos, sin)])
        elif name == "LlamaModel" and FORMERS:  # (1, positions, head size)
            cos, sin = layer.rotary_emb(paddle.ones([1]), paddle.arange(2)[None])
            tables.append([half(table[0, 1]) for table in (cos, sin)])
        elif name == "ChatGLMv2Model":
            rotary = layer.rotary_pos_emb  # its own function, but without the cast to low precision that follows
            table = type(rotary).forward_impl(SimpleNamespace(default_dtype="float32"), 2, rotary.dim)
            tables.append([table[1, :, 0], table[1, :, 1]])
    if not tables:
        return None, None
    cos, sin = (paddle.to_tensor(only(tuple(pair[i].tolist()) for pair in tables), "float64") for i in (0, 1))
    scale = (cos * cos + sin * sin).sqrt()
    if not paddle.allclose(scale, scale[0].expand_as(scale), rtol=1e-5):
        raise RuntimeError("the rotary embedding scales its numbers differently")
    return paddle.atan2(sin, cos).tolist(), scale.mean().item()


def half(table: paddle.Tensor) -> paddle.Tensor:
    """The angle of each pair. The table has each twice: as two halves."""
    first, second = paddle.split(table, 2)
    if not paddle.equal_all(first, second):
        raise RuntimeError("the rotary embedding does not turn pairs of numbers")
    return first


def alibi_of(model: paddle.nn.Layer, heads: int) -> list[float] | None:
    """What Bloom adds to the score of the key at position 1, by head."""
    for name, layer in named(model):
        if name == "BloomModel":
            build = sys.modules[type(layer).__module__].build_alibi_tensor
            return build(paddle.ones([1, 2]), heads, paddle.float32).reshape([heads, 2])[:, 1].tolist()
    return None


def activation_of(layer: paddle.nn.Layer) -> str:
    """The activation of a feed-forward layer, from its forward pass on some numbers without its matrix products."""
    probes = paddle.to_tensor(PROBES)
    if hasattr(layer, "gelu_impl"):
        return activation_name(layer.gelu_impl(probes).tolist())
    ones = paddle.ones_like(probes)
    plain = {"gate_proj": lambda x: x, "up_proj": lambda x: ones, "down_proj": lambda x: x}
    plain |= {"gate_up_fused_proj": lambda x: paddle.concat([x, ones])}
    plain |= {"dense_h_to_4h": lambda x: paddle.concat([x, ones]), "dense_4h_to_h": lambda x: x}
    names = ("act_fn", "fuse_swiglu", "fuse_attention_ffn", "fuse_up_gate")
    own = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    replaced = vars(layer).get("forward")  # --lean replaces it
    forward = replaced.func if isinstance(replaced, functools.partial) else type(layer).forward
    return activation_name(forward(SimpleNamespace(**plain, **own), probes).tolist())


def epsilon_of(norm: paddle.nn.Layer) -> float:
    """What a norm adds to the variance. The three kinds of norms name it differently."""
    return next(getattr(norm, name) for name in ("variance_epsilon", "epsilon", "_epsilon") if hasattr(norm, name))


def whole(weight: paddle.Tensor, degree: int) -> list[int]:
    """The shape of the whole weight. Tensor parallelism slices along one axis."""
    shape = list(weight.shape)
    if weight.is_distributed:
        shape[weight.split_axis] *= degree
    return shape
