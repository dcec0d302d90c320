"""Loads a Hugging Face checkpoint into a model of PaddleNLP or PaddleFormers.

PaddleNLP's `convert_from_torch=True` does the same for most families, but leaves a second copy of the weights in the
folder and only warns when a weight is missing. Here a missing or unused weight is an error.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import paddle
from library import DEGREE, FORMERS, transformers
from safetensors import safe_open

from tunebench.models.checkpoint import Checkpoint, canonical_name, is_computed
from tunebench.models.families import HEAD

# From the names of transformers' Glm to those of ChatGLMv2: the same architecture, but q, k and v in one matrix.
# PaddleNLP has no mapping for it.
GLM_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_proj": "self_attention.query_key_value",
    "self_attn.k_proj": "self_attention.query_key_value",
    "self_attn.v_proj": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
GLM_REST = {
    "model.embed_tokens": "chatglm_v2.embedding.word_embeddings",
    "model.norm": "chatglm_v2.encoder.final_layernorm",
    "lm_head": "chatglm_v2.output_layer",
}
CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "bloom": "BloomConfig"}
# Keys of the checkpoint's config that PaddleNLP names otherwise or derives, and token ids, no part of the model.
NOT_PASSED = ("model_type", "eos_token_id", "pad_token_id", "rope_scaling", "partial_rotary_factor", "head_dim")
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FUSED = {"qkv_proj": QKV, "gate_up_fused_proj": GATE_UP}  # with --fuse-projections: one weight, along its outputs
PARTS = {"query_key_value": QKV, **FUSED}


class Target(NamedTuple):
    """Where a tensor of the checkpoint goes. `part` is its own name where it is one of PARTS."""

    name: str
    transpose: bool
    part: str | None = None


def read_config(checkpoint: Checkpoint) -> transformers.PretrainedConfig:
    """The library's config of the checkpoint's model."""
    config = checkpoint.config
    if config["model_type"] == "glm":
        return transformers.ChatGLMv2Config(
            architectures=["ChatGLMv2ForCausalLM"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            kv_channels=config["head_dim"],
            multi_query_group_num=config["num_key_value_heads"],
            max_sequence_length=config["max_position_embeddings"],
            layernorm_epsilon=config["rms_norm_eps"],
            add_qkv_bias=True,
        )
    name = CONFIGS[config["model_type"]]
    make, architecture = getattr(transformers, name), name.replace("Config", "ForCausalLM")
    fields = {name: value for name, value in config.items() if name not in NOT_PASSED}
    scaling = config.get("rope_scaling")
    if FORMERS:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")} | (scaling or {})
        # Separate kernels, and an embedding of which every row is trained, as in PaddleNLP.
        fields |= {"fuse_rms_norm": False, "pad_token_id": None}
    elif scaling and scaling["rope_type"] == "linear":
        fields |= {"rope_scaling_type": "linear", "rope_scaling_factor": scaling["factor"]}
    elif scaling:
        fields["rope_scaling"] = scaling
    return make(architectures=[architecture], **fields)


def load(model: paddle.nn.Layer, checkpoint: Checkpoint) -> None:
    """Sets every weight of `model` from the checkpoint, one tensor in memory at a time, in the model's dtype.

    A tensor-parallel model takes this rank's slice of each. Raises RuntimeError when a weight of either has no
    counterpart in the other.
    """
    targets = name_targets(model, checkpoint.config)
    state = model.state_dict()
    slices: dict[str, Callable[[paddle.Tensor], paddle.Tensor]] = {}
    if getattr(model.config, DEGREE) > 1:
        slices = slices_by_axis(model) if FORMERS else model.get_tensor_parallel_convert_actions(model.config, state)
        slices = {name: cut for name, cut in slices.items() if name.split(".")[-2] not in FUSED}
    # A tied head is the embedding; ChatGLMv2's table of rotary frequencies is computed.
    tied = ("lm_head.decoder_weight", HEAD) if checkpoint.config["tie_word_embeddings"] else ()
    left = {name for name in state if not name.endswith((*tied, "rotary_pos_emb.inv_freq"))}
    parts: dict[str, dict[str, paddle.Tensor]] = {}
    for file in checkpoint.files:
        with safe_open(file, framework="paddle") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (safe_open is no dictionary)
                source = canonical_name(stored, checkpoint.config)
                if is_computed(source) or (source == HEAD and checkpoint.config["tie_word_embeddings"]):
                    continue
                if source not in targets:
                    raise RuntimeError(f"{file.name}: {type(model).__name__} has no place for {stored}")
                name, transpose, part = targets[source]
                value = tensors.get_tensor(stored).astype(state[name].dtype)
                value = value.T if transpose else value
                if part is not None:
                    found = parts.setdefault(name, {})
                    found[part] = value
                    module = name.split(".")[-2]
                    if len(found) < len(PARTS[module]):
                        continue
                    value = joined(model.config, module, [found[part] for part in PARTS[module]])
                    del parts[name]
                value = slices[name](value) if name in slices else value
                # set_value copies bytes and strides where the places differ, so a transposed view would stay one.
                state[name].set_value(value.contiguous())
                left.discard(name)
    if left:
        raise RuntimeError(f"{checkpoint.folder}: no weight for {', '.join(sorted(left))}")


def slices_by_axis(model: paddle.nn.Layer) -> dict[str, Callable[[paddle.Tensor], paddle.Tensor]]:
    """For each sliced parameter the function that cuts this process's slice out of the whole."""

    def cut(whole: paddle.Tensor, axis: int) -> paddle.Tensor:
        return whole.split(getattr(model.config, DEGREE), axis=axis)[model.config.tensor_parallel_rank]

    return {
        name: functools.partial(cut, axis=parameter.split_axis)
        for name, parameter in model.state_dict().items()
        if parameter.is_distributed
    }


def joined(config: transformers.PretrainedConfig, module: str, parts: list[paddle.Tensor]) -> paddle.Tensor:
    """The parts of a module's weight as one, (…, outputs): with --fuse-projections this process's slices of them.

    In `qkv_proj` each key-value head has its queries, its key and its value next to each other.
    """
    if module not in FUSED:
        return paddle.concat(parts, axis=-1)
    mp, groups = config.tensor_parallel_degree, 1
    if mp > 1:
        parts = [part.split(mp, axis=-1)[config.tensor_parallel_rank] for part in parts]
    if module == "qkv_proj":
        groups = config.num_key_value_heads // mp
    return paddle.concat([part.reshape([*part.shape[:-1], groups, -1]) for part in parts], axis=-1).flatten(-2)


def module_name(source: str, config: dict[str, Any]) -> str:
    """The library's name of the module `source` of the checkpoint, such as `o_proj`."""
    names = {here.rpartition(".")[2]: there.rpartition(".")[2] for here, there in GLM_LAYER.items()}
    return names[source] if config["model_type"] == "glm" else source


def name_targets(model: paddle.nn.Layer, config: dict[str, Any]) -> dict[str, Target]:
    """Where each tensor of the checkpoint goes, by its Hugging Face name. The mapping is the library's, but for Glm."""
    if FORMERS:
        transposed = type(model).transpose_weight_keys
        return {name: Target(name, name.split(".")[-2] in transposed) for name in model.state_dict()}
    if config["model_type"] != "glm":
        fused = model.config.fuse_attention_ffn  # and fuse_attention_qkv
        joined_in = {part: module for module, parts in FUSED.items() for part in parts if fused}
        targets = {}
        for mapping in type(model)._get_name_mappings(model.config):
            target = Target(mapping.target_name, mapping.action == "transpose")
            if module := joined_in.get(part := target.name.split(".")[-2]):
                target = Target(target.name.replace(part, module), target.transpose, part)
            targets[mapping.source_name] = target
        return targets
    targets = {}
    for source, name in GLM_REST.items():
        targets[f"{source}.weight"] = Target(f"{name}.weight", transpose=source == "lm_head")
    for layer in range(config["num_hidden_layers"]):
        for source, name in GLM_LAYER.items():
            part = source.removeprefix("self_attn.") if name.endswith("query_key_value") else None
            here, there = f"model.layers.{layer}.{source}", f"chatglm_v2.encoder.layers.{layer}.{name}"
            targets[f"{here}.weight"] = Target(f"{there}.weight", "norm" not in source, part)
            if part:
                targets[f"{here}.bias"] = Target(f"{there}.bias", transpose=False, part=part)
    return targets
