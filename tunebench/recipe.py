"""Settings that both sides share: AdamW, clipping, fp16's loss scale, ZeRO 3. AdamW's are both frameworks' defaults."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01  # of every trainable parameter
MAX_GRAD_NORM = 1.0  # of all gradients together
# fp16's dynamic loss scale halves when a gradient overflows, and doubles after this many steps without an overflow.
# These are the defaults of torch.amp.GradScaler. Those of Paddle and DeepSpeed differ.
LOSS_SCALE = 2**16
LOSS_SCALE_GROWS_AFTER = 2000
# ZeRO 3 does not shard parameters of at most this times the hidden size elements. The factor is that of transformers'
# Trainer.
WHOLE_IN_ZERO_3 = 10
POSITIONS = 1024  # --head labels holds the logits of so many positions at once
MOST_LOGITS = 2**29  # --head all holds the float32 copy (2 GiB), its softmax and its gradient of so many logits at once
SMALLEST_BUCKET = 2**20  # gradients that DeepSpeed sends at once; Paddle's default is 2**23
