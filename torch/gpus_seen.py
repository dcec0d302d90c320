"""Prints what torch finds on this machine, as JSON: its version and build, the number of GPUs, and its packages."""

import json
import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"))["enter_environment"]("torch")

import torch

from tunebench.frameworks import FRAMEWORKS

cuda = torch.version.cuda
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
seen = {"version": torch.__version__, "built_for": f"CUDA {cuda}" if cuda else "CPUs"}
seen["packages"] = FRAMEWORKS["torch"].versions()
print(json.dumps(seen | {"gpus": torch.cuda.device_count(), "nccl": nccl}))
