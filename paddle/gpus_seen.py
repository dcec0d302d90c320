"""Prints what Paddle finds on this machine, as JSON: its version and build, the number of GPUs, and its packages."""

import json
import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"))["enter_environment"]("paddle")

import paddle

from tunebench.frameworks import FRAMEWORKS

cuda = paddle.version.cuda() if paddle.is_compiled_with_cuda() else None
nccl = paddle.version.nccl() if cuda else None
seen = {"version": paddle.__version__, "built_for": f"CUDA {cuda}" if cuda else "CPUs"}
seen["packages"] = FRAMEWORKS["paddle"].versions()
print(json.dumps(seen | {"gpus": paddle.device.cuda.device_count() if cuda else 0, "nccl": nccl}))
