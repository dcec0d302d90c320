"""The model's config in transformers' terms."""

import transformers

from tunebench.checkpoint import Checkpoint

OWN = ("model_type", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "partial_rotary_factor")


def read_config(checkpoint: Checkpoint) -> transformers.PreTrainedConfig:
    """transformers' config of the checkpoint's model. Without a padding token every row of the embedding is trained."""
    config = checkpoint.config
    fields = {name: value for name, value in config.items() if name not in OWN}
    if config["model_type"] != "bloom":
        rotary = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        rotary["partial_rotary_factor"] = config["partial_rotary_factor"]
        fields["rope_parameters"] = rotary | (config["rope_scaling"] or {})
    return transformers.AutoConfig.for_model(config["model_type"], pad_token_id=None, **fields)
