"""Measures what MKL_DEBUG_CPU_TYPE does to each framework's matrix product: GFLOP/s and ratios, in alternating order.

python benchmarks/matmul.py [--rounds 3] [--size 1024]
"""

import argparse
import os
import pathlib
import runpy
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["maths_settings"]()
# Framework, size.
CODE = """
import sys
from tunebench.hardware import product_rate
framework, size = sys.argv[1], int(sys.argv[2])
library = __import__(framework)
make = library.randn if framework == "torch" else lambda *shape: library.randn(shape)
print(product_rate(make(size, size), make(size, size), products=10) / 1e9)
"""


def gflops(framework: str, size: int, kernel: str | None) -> float:
    """The GFLOP/s of a new process with the scripts' threads. `kernel` is the variable's value, None for unset."""
    environment = os.environ | SETTINGS | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MKL_DEBUG_CPU_TYPE", None)
    if kernel:
        environment["MKL_DEBUG_CPU_TYPE"] = kernel
    python = ROOT / ".venv" / framework / "bin" / "python"
    command = [python, "-P", "-c", CODE, framework, str(size)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Prints the medians over the rounds, and their ratios to the unset variable."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args()
    kernels = list(dict.fromkeys((None, "5", SETTINGS.get("MKL_DEBUG_CPU_TYPE") or "5")))
    for framework in ("paddle", "torch"):
        rates = {kernel: [] for kernel in kernels}
        for round_ in range(options.rounds):
            for kernel in kernels if round_ % 2 == 0 else reversed(kernels):
                rates[kernel].append(gflops(framework, options.size, kernel))
        plain, *others = (statistics.median(rates[kernel]) for kernel in kernels)
        print(f"{framework}: {plain:.0f} GFLOP/s as installed", end="")
        for kernel, rate in zip(kernels[1:], others, strict=True):
            print(f", {rate:.0f} with MKL_DEBUG_CPU_TYPE={kernel}: {rate / plain:.2f}×", end="")
        print()


if __name__ == "__main__":
    main()
