"""Compares torch/tensor_parallel.py with one process, on slices of unequal width: a program for torch.distributed.run.

python -P -m torch.distributed.run --nproc-per-node=2 tests/sliced.py
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from tunebench.plan import IGNORED

WIDTH = 7  # of two processes the first has 4 and the second 3


def main() -> None:
    """Raises AssertionError where losses or gradients differ."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch"))
    import tensor_parallel

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    group = tensor_parallel.group_of(mesh)
    first, last = tensor_parallel.own_part(WIDTH, group)
    assert (first, last) == [(0, 4), (4, 7)][torch.distributed.get_rank()]
    torch.manual_seed(0)  # the same on both
    logits = (20 * torch.randn(5, WIDTH)).requires_grad_()
    labels = torch.tensor([0, 6, IGNORED, 3, 4])
    own = logits.detach()[:, first:last].clone().requires_grad_()

    whole = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    sliced = tensor_parallel.SumOfSlicedLosses.apply(own, labels, mesh)
    torch.testing.assert_close(sliced, whole)
    (3 * whole).backward()
    (3 * sliced).backward()
    torch.testing.assert_close(own.grad, logits.grad[:, first:last])
    assert not own.grad[2].any()

    own.grad = None
    gathered = tensor_parallel.Gather.apply(own, WIDTH, group)
    torch.testing.assert_close(gathered, logits.detach(), rtol=0, atol=0)
    cut = tensor_parallel.Cut.apply(2 * gathered, group)
    torch.testing.assert_close(cut, 2 * own, rtol=0, atol=0)
    cut.square().sum().backward()
    torch.testing.assert_close(own.grad, 8 * own.detach())

    def pass_through(own: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        whole = tensor_parallel.SumGradient.apply(whole, group).square()
        own = tensor_parallel.Cut.apply(tensor_parallel.Gather.apply(own, WIDTH, group) * whole, group)
        return tensor_parallel.Sum.apply(own.sin().sum(dim=-1), group)

    given = own.detach().requires_grad_(), logits.detach().requires_grad_()
    results = []
    # fullgraph: it raises where something could not be compiled. Inductor compiles what aot_eager shows.
    for function in (pass_through, torch.compile(pass_through, dynamic=True, fullgraph=True, backend="aot_eager")):
        output = function(*given)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), given)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
