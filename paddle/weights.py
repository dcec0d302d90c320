"""Loads a Hugging Face checkpoint into a PaddleNLP model, by PaddleNLP's own name mappings.

PaddleNLP's `convert_from_torch=True` does the same but leaves a second copy of the weights in the folder and
only warns when a weight is missing. Here a missing or unused weight is an error.
"""

import paddle
from safetensors import safe_open

from tunebench.checkpoint import Checkpoint, canonical_name


def load(model: paddle.nn.Layer, checkpoint: Checkpoint) -> None:
    """Sets every weight of `model` from the checkpoint, one tensor in memory at a time, in the model's dtype.

    A tensor-parallel model takes this rank's slice of each. Raises RuntimeError when a weight of either has no
    counterpart in the other.
    """
    targets = {m.source_name: (m.target_name, m.action) for m in type(model)._get_name_mappings(model.config)}
    state = model.state_dict()
    slices = {}
    if model.config.tensor_parallel_degree > 1:
        slices = model.get_tensor_parallel_convert_actions(model.config, state)
    left = {name for name in state if not name.endswith("lm_head.decoder_weight")}  # Bloom's head is its embedding
    for file in checkpoint.files:
        with safe_open(file, framework="paddle") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (safe_open is no dictionary)
                source = canonical_name(stored, checkpoint.config)
                if source == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings"):
                    continue
                if source.endswith("rotary_emb.inv_freq"):  # computed from the config on both sides
                    continue
                if source not in targets:
                    raise RuntimeError(f"{file.name}: {type(model).__name__} has no place for {stored}")
                name, action = targets[source]
                value = tensors.get_tensor(stored).astype(state[name].dtype)
                value = value.T if action == "transpose" else value
                state[name].set_value(slices[name](value.numpy()) if name in slices else value)
                left.discard(name)
    if left:
        raise RuntimeError(f"{checkpoint.folder}: no weight for {', '.join(sorted(left))}")
