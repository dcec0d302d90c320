"""Runs a training script and counts the bytes of tensors that each process holds at the last step.

    TUNEBENCH_PROBE=torch/finetune_full.py TUNEBENCH_BYTES=FOLDER python tests/bytes_held.py --model llama-tiny --zero 3

The script, its workers and the framework are the real ones; the flags are the script's. Only `parallel.backward` and
`parallel.update` are followed by a count at the last step. Each rank writes `FOLDER/RANK.json`, bytes by kind:

- `trainable`, `frozen`: the weights when the backward passes are done, `after` the same two once the step is done;
- `passes`: the gradients after each backward pass of the step; `gradients` are those that the optimizer gets;
- `states`: the optimizer's moments;
- `master`: further copies of weights that the optimizer keeps;
- `rest`: every other live tensor, such as logits, tables of positions and buffers of the communication;
- `private`: what this process has written to of mapped checkpoint files, `after` the step.

A tensor counts as all of its storage; what shares it counts once, and what is released counts nothing. A slice of a
mapped file counts as itself: `private` shows that the file's other pages are not this process's. Paddle does not tell
what a view is a view of, but `rest` is what its allocator has given out beyond the other kinds, so nothing is missed.
"""

import gc
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


def load(script: Path) -> ModuleType:
    """Imports the script as a module, as if it were run. A run of several processes starts them here."""
    sys.path[0] = str(script.parent)
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Spans = list[tuple[int, int]]  # memory ranges: first address, end address (exclusive)


class Mapping(NamedTuple):
    """A file that is mapped into this process's memory."""

    span: tuple[int, int]
    path: str
    private: int  # bytes that this process has written to and so holds a copy of


def mappings() -> list[Mapping]:
    """All mapped files, from /proc/self/smaps."""
    found: list[Mapping] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *fields = line.split(maxsplit=5)
        if not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
            found.append(Mapping((start, end), fields[4] if len(fields) > 4 else "", 0))
        elif first == "Anonymous:":
            found[-1] = found[-1]._replace(private=int(fields[0]) * 1024)
    return [mapping for mapping in found if mapping.path.startswith("/")]


def size(spans: Spans) -> int:
    """The bytes of these memory ranges. Overlaps count once."""
    total, last = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, last))
        last = max(last, end)
    return total


class Torch:
    """Finds the tensors of a PyTorch run."""

    def __init__(self) -> None:
        import held
        import torch

        self.torch = torch
        self.weights, self.gradients = held.weights, held.gradients
        self.states, self.masters = held.moments, held.masters

    def spans(self, tensors: Iterable[Any]) -> Spans:
        """The memory behind these tensors. Of a sharded tensor it is this process's shard."""
        mapped = [mapping.span for mapping in mappings() if mapping.path.endswith(".safetensors")]
        found = []
        for tensor in tensors:
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            if local.layout is not self.torch.strided or local.device.type == "meta" or not local.numel():
                continue
            start, reach = (
                local.data_ptr(),
                sum((n - 1) * step for n, step in zip(local.shape, local.stride(), strict=True)),
            )
            if any(first <= start < last for first, last in mapped):
                found.append((start, start + (reach + 1) * local.element_size()))
            else:
                storage = local.untyped_storage()
                found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return found

    def everything(self) -> int:
        """The bytes of all tensors that the garbage collector finds, and of their gradients."""
        gc.collect()
        alive = [each for each in gc.get_objects() if issubclass(type(each), self.torch.Tensor)]
        alive += [each.grad for each in alive if each.is_leaf and each.grad is not None]
        return size(self.spans(alive))


class Paddle:
    """Finds the tensors of a Paddle run."""

    def __init__(self) -> None:
        from paddle.base import core

        self.core = core

    def spans(self, tensors: Iterable[Any]) -> Spans:
        """The memory behind these tensors."""
        held = [each for each in tensors if each is not None and each._is_initialized()]
        return [(each.data_ptr(), each.data_ptr() + each.size * each.element_size()) for each in held]

    def weights(self, model: Any, trainable: bool) -> Iterator[Any]:
        """The weights. With sharding 3: this rank's slices (`fw_storage`) and the weights that are gathered now."""
        for parameter in model.parameters():
            if parameter.stop_gradient != trainable:
                yield parameter
                yield getattr(parameter, "fw_storage", None)

    def gradients(self, model: Any, optimizer: Any) -> Iterator[Any]:
        """The gradients: `grad` of the parameters, this rank's slices (`bw_storage`), buffers of sharding 2 and 3."""
        for parameter in model.parameters():
            yield parameter._grad_ivar()
            yield getattr(parameter, "bw_storage", None)
        for storages in getattr(model, "_grad_storages", {}).values():
            yield from (each.buffer for each in (storages.values() if isinstance(storages, dict) else [storages]))

    def states(self, optimizer: Any) -> Iterator[Any]:
        """The moments. The powers of the betas are left out."""
        accumulators = self.innermost(optimizer)._accumulators
        return (each for name in accumulators if "moment" in name for each in accumulators[name].values())

    def masters(self, optimizer: Any) -> list[Any]:
        """The float32 copies of weights of lower precision."""
        return list(self.innermost(optimizer)._master_weights.values())

    def innermost(self, optimizer: Any) -> Any:
        """The AdamW inside its wrappers."""
        for name in ("_inner_opt", "_optim"):
            inner = vars(optimizer).get(name, optimizer)
            if inner is not optimizer:  # sharding 3 sets `_optim` to the optimizer itself
                return self.innermost(inner)
        return optimizer

    def everything(self) -> int:
        """The bytes that Paddle's allocator counts as allocated."""
        gc.collect()
        return self.core.host_memory_stat_current_value("Allocated", 0)


class Probe:
    """Wraps the real `parallel.backward` and `parallel.update` and counts bytes around them."""

    def __init__(self, script: ModuleType, out: Path) -> None:
        self.finder = Torch() if script.FRAMEWORK == "torch" else Paddle()
        self.script, self.out, self.steps = script, out, 0
        self.passes: list[int] = []
        self.backward, self.update = script.parallel.backward, script.parallel.update
        script.parallel.backward, script.parallel.update = self.count_gradients, self.count_all

    def count_gradients(self, model: Any, loss: Any, group: Any) -> None:
        """Calls `parallel.backward` and counts the gradients held after it."""
        self.backward(model, loss, group)
        if self.steps == self.script.JOB.plan.steps - 1:
            # With DeepSpeed the engine's optimizer holds the gradients, otherwise the model does.
            gradients = self.finder.gradients(model, getattr(model, "optimizer", None))
            self.passes.append(size(self.finder.spans(gradients)))

    def count_all(self, model: Any, optimizer: Any, trainable: Any, group: Any) -> Any:
        """Counts all kinds, calls `parallel.update` and counts the weights again."""
        self.steps += 1
        if self.steps < self.script.JOB.plan.steps:
            return self.update(model, optimizer, trainable, group)
        kinds = {
            **self.weights(model),
            "gradients": self.finder.spans(self.finder.gradients(model, optimizer)),
            "states": self.finder.spans(self.finder.states(optimizer)),
            "master": self.finder.spans(self.finder.masters(optimizer)),
        }
        held: dict[str, Any] = {}
        counted: Spans = []
        for kind, spans in kinds.items():
            held[kind] = size(counted + spans) - size(counted)
            counted += spans
        held["rest"] = self.finder.everything() - size(counted)
        held["passes"] = self.passes
        norm = self.update(model, optimizer, trainable, group)
        held["after"] = {kind: size(spans) for kind, spans in self.weights(model).items()}
        held["after"]["private"] = sum(each.private for each in mappings() if each.path.endswith(".safetensors"))
        (self.out / f"{group.rank}.json").write_text(json.dumps(held))
        return norm

    def weights(self, model: Any) -> dict[str, Spans]:
        """The bytes of trainable and of frozen weights."""
        kinds = {"trainable": True, "frozen": False}
        return {kind: self.finder.spans(self.finder.weights(model, trains)) for kind, trains in kinds.items()}


if __name__ == "__main__":
    script = load(ROOT / os.environ["TUNEBENCH_PROBE"])
    Probe(script, Path(os.environ["TUNEBENCH_BYTES"]))
    with script.recorded(script.FRAMEWORK, script.METHOD, script.JOB) as run:
        script.main(run)
