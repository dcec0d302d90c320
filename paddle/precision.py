"""Low precision in Paddle: autocast (O1), low-precision weights with float32 masters (O2), and fp16's loss scale.

AdamW itself holds the master weights: `multi_precision`.
"""

from typing import Any

import paddle

from tunebench.flags import Flags
from tunebench.recipe import LOSS_SCALE, LOSS_SCALE_GROWS_AFTER

# As in PaddleNLP's Trainer: with low-precision weights the embedding's output is in low precision too.
LOW_PRECISION_LOOKUP = {"lookup_table", "lookup_table_v2"}


def autocast_forward(flags: Flags, model: paddle.nn.Layer) -> None:
    """Lets the model's forward pass cast the inputs of the operators that Paddle deems safe (O1), or of most (O2)."""
    if flags.amp is None:
        return
    forward, lookup = model.forward, LOW_PRECISION_LOOKUP if flags.amp == "O2" else None

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with paddle.amp.auto_cast(custom_white_list=lookup, level=flags.amp, dtype=flags.compute_dtype):
            return forward(*args, **kwargs)

    vars(model)["forward"] = autocast  # vars: PaddleNLP's __setattr__ would add arguments to a function of this name


def loss_scale(flags: Flags) -> paddle.amp.GradScaler:
    """The dynamic loss scale of fp16. For all other dtypes it does nothing."""
    return paddle.amp.GradScaler(
        enable=flags.dtype == "fp16",
        init_loss_scaling=LOSS_SCALE,
        incr_every_n_steps=LOSS_SCALE_GROWS_AFTER,
        decr_every_n_nan_or_inf=1,
    )
