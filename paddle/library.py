"""The library that has Paddle's models here: PaddleNLP, or PaddleFormers, to which its training moved in 2026.

Where an environment has both, it is PaddleNLP. Their modules for models and adapters are alike. What differs in few
words stands here.
"""

import importlib.util
from typing import Any

import paddle

from tunebench.flags import Flags

FORMERS = importlib.util.find_spec("paddlenlp") is None
if FORMERS:
    from paddleformers import peft, transformers
else:
    from paddlenlp import peft, transformers

__all__ = ["DEGREE", "FORMERS", "lora_fields", "peft", "recompute_layers", "transformers"]
DEGREE = "tensor_model_parallel_size" if FORMERS else "tensor_parallel_degree"  # the field of configs


def lora_fields(flags: Flags) -> dict[str, Any]:
    """The fields of LoRAConfig that the libraries do not share."""
    return {DEGREE: flags.mp} | ({} if FORMERS else {"use_quick_lora": flags.quick_lora})


def recompute_layers(model: paddle.nn.Layer) -> None:
    """Lets each decoder layer compute its activations again for the backward pass."""
    if FORMERS:
        model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
        model.config.recompute_num_layers = 1
    else:
        model.config.recompute = True
        model.recompute_enable()
