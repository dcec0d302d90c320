"""Records which kernels PyTorch calls, so that a silently ignored flag is no result."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm")  # of activations with weights; those of attention are `bmm`
SOFTMAX = ("_softmax", "_safe_softmax")


class Witness(TorchDispatchMode):
    """Notes each matrix product's dtype and each attention kernel, below autograd and autocast.

    `weights` are noted by `see_weights`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[str] = set()
        self.matmuls: set[str] = set()
        self.attention: set[str] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operator.name().removeprefix("aten::").partition(".")[0]
        if name in PRODUCTS:
            self.matmuls.add(name_of(args[1].dtype))
        elif name in SOFTMAX or "attention" in name or "attn" in name:
            self.attention.add(name.removeprefix("_"))
        return operator(*args, **(kwargs or {}))

    def see_weights(self, module: torch.nn.Module, _: Any) -> None:
        """Notes the dtypes of a module's own weights as its forward pass begins: with FSDP2 those that it gathered."""
        self.weights |= {name_of(p.dtype) for p in module.parameters(recurse=False)}


def watch(model: torch.nn.Module, check: Callable[[set[str], set[str], set[str]], None]) -> None:
    """Calls `check` with the weights' dtypes, the matrix products' and the attention kernels of the first forward pass.

    The first step pays for it. That pass runs without --compile: kernels of compiled code cannot be seen. So does the
    backward pass that follows, since with --recompute it must repeat what the forward pass has run.
    """
    witness = Witness()

    def begin(*_: Any) -> None:
        torch.compiler.set_stance("force_eager")
        witness.__enter__()
        hooks.append(register_module_forward_pre_hook(witness.see_weights))

    def end(*_: Any) -> None:
        witness.__exit__(None, None, None)
        for hook in hooks:
            hook.remove()
        hooks[:] = [model.register_forward_pre_hook(compile_from_now_on)]
        check(witness.weights, witness.matmuls, witness.attention)

    def compile_from_now_on(*_: Any) -> None:
        torch.compiler.set_stance("default")
        hooks.pop().remove()

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]


def name_of(dtype: torch.dtype) -> str:
    """A dtype without the framework's name, such as float32."""
    return str(dtype).removeprefix("torch.")
