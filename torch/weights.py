"""Loads a Hugging Face checkpoint into a transformers model."""

from typing import Any

import torch
import transformers

from tunebench.models.checkpoint import Checkpoint

# Keys of the checkpoint's config that transformers names otherwise, and token ids, which are no part of the model.
NOT_PASSED = ("model_type", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "partial_rotary_factor")


def read_config(checkpoint: Checkpoint) -> transformers.PreTrainedConfig:
    """transformers' config of the checkpoint's model. Without a padding token every row of the embedding is trained."""
    config = checkpoint.config
    fields = {name: value for name, value in config.items() if name not in NOT_PASSED}
    if checkpoint.family.rotates:
        rotary = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        rotary["partial_rotary_factor"] = config["partial_rotary_factor"]
        fields["rope_parameters"] = rotary | (config["rope_scaling"] or {})
    return transformers.AutoConfig.for_model(config["model_type"], pad_token_id=None, **fields)


def load(config: transformers.PreTrainedConfig, checkpoint: Checkpoint, **how: Any) -> torch.nn.Module:
    """The model of `config` with the checkpoint's weights. `how` are further arguments of `from_pretrained`."""
    with checkpoint.weights_alone() as folder:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            generation_config=transformers.GenerationConfig(),  # else transformers looks for one in the folder
            **how,
        )
