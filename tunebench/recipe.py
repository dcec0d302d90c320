"""Settings that both sides share: AdamW's, the frameworks' own defaults; clipping; fp16's loss scale; ZeRO 3."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01  # of every trainable parameter
MAX_GRAD_NORM = 1.0  # of all gradients together
# fp16's dynamic loss scale: halved when a gradient overflows, doubled after so many steps without. The defaults of
# torch.amp.GradScaler; Paddle's and DeepSpeed's differ.
LOSS_SCALE = 2**16
LOSS_SCALE_GROWS_AFTER = 2000
# ZeRO 3 holds whole what has at most so many elements, times the hidden size: as transformers' Trainer has it.
WHOLE_IN_ZERO_3 = 10
