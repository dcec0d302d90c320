"""The library that has Paddle's models here: PaddleNLP, or PaddleFormers, to which its training moved in 2026.

Where an environment has both, it is PaddleNLP. Their modules for models and adapters are alike. What differs in few
words stands here.
"""

import functools
import importlib.util
from typing import Any

import paddle
from paddle.distributed.fleet.utils import recompute

from tunebench.flags import Flags

FORMERS = importlib.util.find_spec("paddlenlp") is None
if FORMERS:
    from paddleformers import peft, transformers
else:
    from paddlenlp import peft, transformers

__all__ = ["DEGREE", "FORMERS", "WIDTH", "lora_fields", "peft", "recompute_layers", "transformers"]
# Fields of configs: into how many slices weights are cut, and tokens in a row of a micro-batch.
DEGREE = "tensor_model_parallel_size" if FORMERS else "tensor_parallel_degree"
WIDTH = "max_sequence_length" if FORMERS else "seq_length"


def lora_fields(flags: Flags) -> dict[str, Any]:
    """The fields of LoRAConfig that the libraries do not share."""
    return {DEGREE: flags.mp} | ({} if FORMERS else {"use_quick_lora": flags.quick_lora})


def recompute_layers(model: paddle.nn.Layer) -> None:
    """Lets each decoder layer compute its activations again for the backward pass.

    PaddleFormers' own call starts a backward pass within the backward pass. Data parallelism takes it for a second one
    and fails. PaddleNLP's call does not.
    """
    if FORMERS:
        model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
        model.config.recompute_num_layers = 1
        again = functools.partial(recompute, use_reentrant=False)
        vars(getattr(model, model.base_model_prefix))["recompute_training"] = again
    else:
        model.config.recompute = True
        model.recompute_enable()
