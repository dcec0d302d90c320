"""AdamW's settings, the same on both sides: the frameworks' own defaults; and where gradients are clipped."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01  # of every trainable parameter
MAX_GRAD_NORM = 1.0  # of all gradients together
