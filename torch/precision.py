"""Low precision in PyTorch: autocast (O1), low-precision weights with float32 masters (O2), and fp16's loss scale.

Under ZeRO, DeepSpeed does what O2 adds: `zero_precision` configures it. FSDP2's slices are float32 masters, gathered in
low precision: `gathered_precision`.
"""

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from tunebench.flags import Flags
from tunebench.recipe import LOSS_SCALE, LOSS_SCALE_GROWS_AFTER


def autocast_forward(flags: Flags, model: torch.nn.Module, device: torch.device) -> None:
    """At O1 lets the model's forward pass cast the inputs of the operators that torch deems safe.

    The autocast is inside the model, since DeepSpeed disables one around its engine. DeepSpeed's own, `torch_autocast`,
    clips fp16's gradients before it takes the loss scale out of them.
    """
    if flags.amp == "O1":
        model.forward = torch.autocast(device.type, getattr(torch, flags.compute_dtype))(model.forward)


class MasterWeights:
    """An optimizer that updates float32 copies of low-precision weights, and then copies them into the weights.

    With weights in float32 it does what the optimizer does that it was given.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []  # each weight and its master
        for group in optimizer.param_groups:
            pairs = [
                (p, p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())) for p in group["params"]
            ]
            group["params"] = [master for _, master in pairs]
            self.pairs += pairs

    def take_gradients(self) -> list[torch.nn.Parameter]:
        """Moves the weights' gradients to the master weights, in float32, and returns the master weights."""
        for weight, master in self.pairs:
            if weight is not master:
                master.grad, weight.grad = weight.grad.float(), None
        return [master for _, master in self.pairs]

    def step(self) -> None:
        """Updates the master weights by their gradients, and copies them into the weights."""
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in self.pairs:
                if weight is not master:
                    weight.copy_(master)

    def zero_grad(self) -> None:
        """Frees the master weights' gradients."""
        self.optimizer.zero_grad()


class LossScale:
    """The dynamic loss scale of fp16, by the rule of torch.amp.GradScaler.

    It is 1 for all other dtypes, and at O2 with DeepSpeed, which has its own.
    GradScaler itself fails where tensor parallelism slices some gradients of a list and leaves others whole. It would
    also check again what the norm of all gradients shows.
    """

    def __init__(self, flags: Flags) -> None:
        self.enabled = flags.dtype == "fp16" and not (flags.deepspeed and flags.amp == "O2")
        self.value = LOSS_SCALE if self.enabled else 1.0
        self.steps = 0  # since it last changed

    def update(self, overflow: bool) -> None:
        """Halves the scale after an overflow, and doubles it after LOSS_SCALE_GROWS_AFTER steps without one."""
        self.steps = 0 if overflow else self.steps + 1
        if overflow:
            self.value /= 2
        elif self.steps == LOSS_SCALE_GROWS_AFTER:
            self.value, self.steps = self.value * 2, 0


def zero_precision(flags: Flags) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that asks for O2, with the same rule for the loss scale."""
    if flags.amp != "O2":
        return {}
    if flags.dtype == "bf16":
        # bf16 has float32's range. Looking for overflows makes stages 1 and 2 wait for the device in each step.
        return {"bf16": {"enabled": True, "check_grad_overflow": False}}
    scale = {"initial_scale_power": LOSS_SCALE.bit_length() - 1, "loss_scale_window": LOSS_SCALE_GROWS_AFTER}
    return {"fp16": {"enabled": True, "hysteresis": 1, **scale}}


def gathered_precision(flags: Flags, module: torch.nn.Module) -> MixedPrecisionPolicy:
    """Makes the trained weights float32 masters at O2, of which FSDP2 then gathers copies in low precision.

    Gradients are reduced in low precision, as DeepSpeed does. Frozen weights stay in low precision.
    """
    if flags.amp != "O2":
        return MixedPrecisionPolicy()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return MixedPrecisionPolicy(param_dtype=getattr(torch, flags.compute_dtype))
