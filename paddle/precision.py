"""Low precision in Paddle: autocast (O1), or weights in it with float32 master weights (O2); fp16's loss scale.

The master weights are AdamW's own, `multi_precision`.
"""

import contextlib

import paddle

from tunebench.flags import Flags
from tunebench.optimizer import LOSS_SCALE, LOSS_SCALE_GROWS_AFTER

# As PaddleNLP's Trainer has it: with weights in low precision an embedding's output is to be so too.
LOW_PRECISION_LOOKUP = {"lookup_table", "lookup_table_v2"}


def autocast(flags: Flags) -> contextlib.AbstractContextManager:
    """For the forward pass: casts the inputs of the operators that Paddle deems safe (O1), or of most (O2)."""
    return paddle.amp.auto_cast(
        enable=flags.amp is not None,
        custom_white_list=LOW_PRECISION_LOOKUP if flags.amp == "O2" else None,
        level=flags.amp or "O0",
        dtype=flags.compute_dtype if flags.amp else "float16",
    )


def loss_scale(flags: Flags) -> paddle.amp.GradScaler:
    """The dynamic loss scale of fp16; for all other dtypes it does nothing."""
    return paddle.amp.GradScaler(
        enable=flags.dtype == "fp16",
        init_loss_scaling=LOSS_SCALE,
        incr_every_n_steps=LOSS_SCALE_GROWS_AFTER,
        decr_every_n_nan_or_inf=1,
    )
