"""AdamW's settings, the same on both sides: the frameworks' own defaults; gradient clipping; fp16's loss scale."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01  # of every trainable parameter
MAX_GRAD_NORM = 1.0  # of all gradients together
# fp16's dynamic loss scale: halved when a gradient overflows, doubled after so many steps without. The defaults of
# torch.amp.GradScaler; Paddle's and DeepSpeed's differ.
LOSS_SCALE = 2**16
LOSS_SCALE_GROWS_AFTER = 2000
