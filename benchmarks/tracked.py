"""Runs a training script and counts the most bytes that its tensors hold at once, from the first step on.

    .venv/torch/bin/python -P benchmarks/tracked.py torch/finetune_full.py --model llama-tiny --out FILE

The record has them as its peak of memory. PyTorch has no counter of tensors on a CPU, so each operator's results are
noted, which takes time. Paddle's allocator counts itself. The script runs in this process: for runs of one process.
"""

import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load(script: Path) -> ModuleType:
    """Imports the script as a module, as if it were run."""
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def track_torch(script: Any) -> None:
    """Lets the script's peak be that of a ledger, which notes the memory of all tensors that operators return."""
    import torch
    from forecast import Ledger
    from torch.utils._pytree import tree_leaves

    class Tracked(Ledger):
        """Notes tensors that have data."""

        def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            result = operator(*args, **(kwargs or {}))
            self.clock += 1
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.note(tensor, "workspace")
            return result

    ledger = Tracked(set(), 1)

    def start() -> None:
        ledger.enter("step")
        for each in gc.get_objects():
            if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
                ledger.note(each, "weights")
        ledger.__enter__()

    def peak() -> int:
        ledger.__exit__(None, None, None)
        return sum(ledger.peak(0)[0].values())

    script.device.reset_peak_memory, script.device.peak_memory_bytes = start, peak


def track_paddle(script: Any) -> None:
    """Lets the script's peak be that of Paddle's allocator for the CPU."""
    from paddle.base import core

    script.device.reset_peak_memory = lambda: core.host_memory_stat_reset_peak_value("Allocated", 0)
    script.device.peak_memory_bytes = lambda: core.host_memory_stat_peak_value("Allocated", 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    script = load(ROOT / sys.argv[1])
    (track_torch if script.FRAMEWORK == "torch" else track_paddle)(script)
    with script.recorded(script.FRAMEWORK, script.METHOD, script.JOB) as run:
        script.main(run)
