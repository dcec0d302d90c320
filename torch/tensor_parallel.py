"""Tensor parallelism on plain tensors: each process multiplies its own slices of the weights.

transformers slices the weights by bytes while it loads them. It also computes with DTensors, whose Python takes longer
than the products of a small layer. The styles here take their place under the same names, so that peft's adapters have
them too. They compute with each process's own tensors, and communicate where the mathematics needs it:

- layers that are cut by their outputs sum the gradient of their input in the backward pass, once for one input;
- a layer that is cut by its inputs, or an embedding that is cut by its rows, sums its output in the forward pass;
- the loss sums over the slices of the logits.

With --sequence-parallel each process has some tokens of each row between these layers. Then the first kind of layer
gathers the tokens of its input, and the second kind sums and cuts. A gather and such a sum send as many bytes as a sum.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    EmbeddingParallel,
    RowwiseParallel,
)

from tunebench.plan import IGNORED

Exchange = Callable[[torch.Tensor, ProcessGroup], torch.Tensor]
# Of one tensor. The names are torch's since 2.13, or those before.
ALL_GATHER = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
REDUCE_SCATTER = getattr(torch.distributed, "reduce_scatter_single", torch.distributed.reduce_scatter_tensor)


def register_styles(by_tokens: bool) -> None:
    """Makes transformers and peft use the styles of this file. `by_tokens`: with --sequence-parallel."""
    for name, style in {
        "colwise": CutByOutputs(),
        "colwise_gather_output": CutByOutputs(output_layouts=Replicate()),
        "rowwise": CutByInputs(by_tokens),
        "rowwise_split_input": CutByInputs(by_tokens, input_layouts=Replicate()),
        "embedding_rowwise": CutByRows(),
    }.items():
        ALL_PARALLEL_STYLES.register(name, style)


class CutByOutputs(ColwiseParallel):
    """A linear layer of which each process has some outputs. `Replicate` as output layout gathers them.

    Its input's gradient is the process's part: `join_layers` has the parts summed.
    """

    def install_forward(self, module: torch.nn.Linear, mesh: DeviceMesh) -> torch.nn.Module:
        """Replaces the forward function: from (…, inputs) to (…, own outputs) or (…, outputs)."""
        group, gathers = group_of(mesh), not isinstance(self.output_layouts, Shard)

        def multiply(whole: torch.Tensor) -> torch.Tensor:
            bias = None if module.bias is None else module.bias.to_local()
            own = F.linear(whole, module.weight.to_local(), bias)
            return Gather.apply(own, module.out_features, group) if gathers else own

        module.forward = multiply
        return module


class CutByInputs(RowwiseParallel):
    """A linear layer of which each process has some inputs. `Replicate` as input layout cuts a whole input first.

    `by_tokens`: each process has the output of its share of the tokens.
    """

    def __init__(self, by_tokens: bool, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.by_tokens = by_tokens

    def install_forward(self, module: torch.nn.Linear, mesh: DeviceMesh) -> torch.nn.Module:
        """Replaces the forward function: from (…, own inputs) or (…, inputs) to (…, outputs).

        By tokens it is from (rows, width, …) to (rows, own width, outputs).
        """
        group, cuts = group_of(mesh), not isinstance(self.input_layouts, Shard)
        add_up = SumAndCutTokens if self.by_tokens else Sum

        def multiply(given: torch.Tensor) -> torch.Tensor:
            own = Cut.apply(given, group) if cuts else given
            output = add_up.apply(F.linear(own, module.weight.to_local()), group)
            return output if module.bias is None else output + module.bias.to_local().to(output.dtype)

        module.forward = multiply
        return module


class CutByRows(EmbeddingParallel):
    """An embedding of which each process has some tokens' rows."""

    def install_forward(self, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
        """Replaces the forward function: from (…) token ids to (…, width)."""
        group = group_of(mesh)

        def look_up(token_ids: torch.Tensor) -> torch.Tensor:
            first, last = own_part(module.num_embeddings, group)
            others = (token_ids < first) | (token_ids >= last)
            rows = F.embedding((token_ids - first).masked_fill(others, 0), module.weight.to_local())
            return Sum.apply(rows.masked_fill_(others.unsqueeze(-1), 0), group)

        module.forward = look_up
        return module


def join_layers(model: torch.nn.Module, layers: Sequence[torch.nn.Module], mesh: DeviceMesh, by_tokens: bool) -> None:
    """Has the gradients of the inputs of layers cut by their outputs summed, once for the layers of one module.

    Such layers have one input. The head's is summed by itself. LoRA's A of such a layer then has a part of its gradient
    on each process: its parameter gets the attribute `is_partial`.

    `by_tokens`: between the modules of `layers`, the model's decoder layers, each process has some tokens of each row.
    """
    group, head = group_of(mesh), model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: (SumGradient.apply(args[0], group), *args[1:]))
    for module in model.modules():
        if hasattr(module, "base_layer") or isinstance(module, torch.nn.ModuleDict):
            continue  # an adapted layer, and its adapters: they are seen as the child of a module
        cut = [child for child in module.children() if child is not head and is_cut_by_outputs(child)]
        if cut:
            join = functools.partial(change_input, GatherTokens if by_tokens else SumGradient, group)
            module.register_forward_pre_hook(join, with_kwargs=True)
        for child in cut:
            for adapter in getattr(child, "lora_A", {}).values():
                adapter.weight.is_partial = True
    if not by_tokens:
        return
    layers[0].register_forward_pre_hook(functools.partial(change_input, CutTokens, group), with_kwargs=True)
    layers[-1].register_forward_hook(functools.partial(gather_output, group))


def is_cut_by_outputs(layer: torch.nn.Module) -> bool:
    """Whether each process has some outputs of a linear layer, or of the one within an adapted layer."""
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, torch.nn.Linear) or not isinstance(layer.weight, DTensor):
        return False
    return any(isinstance(place, Shard) and place.dim == 0 for place in layer.weight.placements)


def change_input(
    change: type[torch.autograd.Function],
    group: ProcessGroup,
    module: torch.nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook for layers, and their attention and feed-forward modules: the first argument, `hidden_states`,
    goes through the function `change`.
    """
    if args:
        return (change.apply(args[0], group), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change.apply(kwargs["hidden_states"], group)}


def gather_output(group: ProcessGroup, module: torch.nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook for the last layer: all tokens of its output, which some families have in a tuple."""
    if isinstance(output, tuple):
        return GatherOutput.apply(output[0], group), *output[1:]
    return GatherOutput.apply(output, group)


class Sum(torch.autograd.Function):
    """Sums the processes' tensors, in place. Each process has the whole gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        """The sum, of the tensor's shape."""
        ctx.mark_dirty(tensor)
        torch.distributed.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """By the process's own tensor."""
        return gradient, None


class SumGradient(torch.autograd.Function):
    """Leaves a tensor that all processes have, and sums its gradient, of which each process finds a part."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        """The tensor."""
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """By the tensor. A linear layer has made the gradient for this alone, so that it is summed in place."""
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Gather(torch.autograd.Function):
    """Puts the processes' slices of the last dimension together. The last ones may be shorter, or empty."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, width: int, group: ProcessGroup) -> torch.Tensor:
        """From (…, own width) to (…, width)."""
        ctx.group, ctx.width = group, width
        return gathered(own, width, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """By the own slice: each process has the whole gradient."""
        first, last = own_part(ctx.width, ctx.group)
        return gradient[..., first:last], None, None


class Cut(torch.autograd.Function):
    """Takes the process's slice of the last dimension of a tensor that all processes have."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        """From (…, width) to (…, own width)."""
        ctx.group, ctx.width = group, whole.shape[-1]
        first, last = own_part(ctx.width, group)
        return whole[..., first:last]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """By the whole tensor: each process has found the gradient of its slice."""
        return gathered(gradient, ctx.width, ctx.group), None


class SumOfSlicedLosses(torch.autograd.Function):
    """cross_entropy(logits, labels, reduction="sum") where each process has a slice of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        """A scalar, from float32 (n, own vocabulary) and (n,). Labels that are IGNORED do not count."""
        group = group_of(mesh)
        # Beside the largest logits goes the size of the slices, since the last ones may be shorter.
        largest = logits.amax(dim=-1)
        largest, longest = maxima = torch.stack([largest, torch.full_like(largest, logits.shape[-1])])
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=group)
        largest, longest = largest.unsqueeze(-1), longest.long()
        powers = (logits - largest).exp_()
        own_labels = labels - torch.distributed.get_rank(group) * longest
        own = (own_labels >= 0) & (own_labels < logits.shape[-1])
        own_labels = own_labels.masked_fill(~own, 0).unsqueeze(-1)
        scores = (logits.gather(1, own_labels) - largest).squeeze(-1).masked_fill(~own, 0)
        sums, scores = totals = torch.stack([powers.sum(dim=-1), scores])
        torch.distributed.all_reduce(totals, group=group)
        counts = labels != IGNORED
        ctx.save_for_backward(powers, sums, own_labels, own & counts, counts)
        return (sums.log() - scores).masked_fill(~counts, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """By the logits: (probabilities - 1 at the label) · gradient."""
        powers, sums, own_labels, own, counts = ctx.saved_tensors
        by_logits = powers * (counts / sums * gradient).unsqueeze(-1)
        by_logits.scatter_add_(1, own_labels, -(own * gradient).unsqueeze(-1))
        return by_logits, None, None


def gathered(own: torch.Tensor, width: int, group: ProcessGroup) -> torch.Tensor:
    """The processes' slices (…, own width) together: (…, width). Collectives take slices of one size."""
    size = torch.distributed.get_world_size(group)
    longest = -(-width // size)
    if own.shape[-1] < longest:
        own = F.pad(own, (0, longest - own.shape[-1]))
    slices = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
    torch.distributed.all_gather(slices, own.contiguous(), group=group)
    return torch.cat(slices, dim=-1)[..., :width]


def gathered_tokens(own: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The processes' tokens (rows, own width, size) together: (rows, width, size)."""
    size = torch.distributed.get_world_size(group)
    rows, width, channels = own.shape
    parts = own.new_empty(size * rows, width, channels)
    ALL_GATHER(parts, own.contiguous(), group=group)
    return parts.unflatten(0, (size, rows)).transpose(0, 1).reshape(rows, size * width, channels)


def summed_tokens(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """This process's share (rows, own width, size) of the sum of the processes' tensors (rows, width, size)."""
    size = torch.distributed.get_world_size(group)
    rows, width, channels = tensor.shape
    parts = tensor.unflatten(1, (size, width // size)).transpose(0, 1).flatten(0, 1).contiguous()
    own = tensor.new_empty(rows, width // size, channels)
    REDUCE_SCATTER(own, parts, group=group)
    return own


def own_tokens(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """This process's share (rows, own width, size) of a tensor (rows, width, size), as a copy."""
    width = tensor.shape[1] // torch.distributed.get_world_size(group)
    return tensor.narrow(1, torch.distributed.get_rank(group) * width, width).contiguous()


def exchange(forth: Exchange, back: Exchange) -> type[torch.autograd.Function]:
    """A function that exchanges tokens by `forth` in the forward pass and gradients by `back` in the backward pass."""

    class OfTokens(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
            ctx.group = group
            return forth(tensor, group)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return back(gradient, ctx.group), None

    return OfTokens


# Each process finds a part of the gradient of the gathered tokens, and has its tokens' gradient of the sum.
GatherTokens = exchange(gathered_tokens, summed_tokens)
SumAndCutTokens = exchange(summed_tokens, gathered_tokens)
# For what all processes compute alike: each has the whole gradient of the gathered tokens.
CutTokens = exchange(own_tokens, gathered_tokens)
GatherOutput = exchange(gathered_tokens, own_tokens)


def own_part(width: int, group: ProcessGroup) -> tuple[int, int]:
    """Where this process's slice of a dimension starts and ends. DTensor cuts alike: the last slices may be shorter."""
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    longest = -(-width // size)
    return min(width, rank * longest), min(width, (rank + 1) * longest)


def group_of(mesh: DeviceMesh) -> ProcessGroup:
    """The tensor-parallel group of a mesh."""
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
