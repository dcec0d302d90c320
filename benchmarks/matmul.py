"""What MKL_DEBUG_CPU_TYPE=5 does to each framework's matrix product: alternating processes, GFLOP/s and their ratio.

python benchmarks/matmul.py [--rounds 3] [--size 2048]
"""

import argparse
import os
import pathlib
import runpy
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Framework, size.
CODE = """
import sys
from tunebench.hardware import best_product
framework, size = sys.argv[1], int(sys.argv[2])
library = __import__(framework)
make = library.randn if framework == "torch" else lambda *shape: library.randn(shape)
print(best_product(make(size, size), make(size, size)) / 1e9)
"""


def gflops(framework: str, size: int, kernel: str | None) -> float:
    """One fresh process's rate, with the scripts' threads, with or without the variable."""
    settings = runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["maths_settings"]()
    environment = os.environ | settings | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MKL_DEBUG_CPU_TYPE", None)
    if kernel:
        environment["MKL_DEBUG_CPU_TYPE"] = kernel
    python = ROOT / ".venv" / framework / "bin" / "python"
    command = [python, "-P", "-c", CODE, framework, str(size)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Prints the medians over the rounds and the ratio of the two settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=2048)
    options = parser.parse_args()
    for framework in ("paddle", "torch"):
        rates = {kernel: [] for kernel in (None, "5")}
        for round_ in range(options.rounds):
            for kernel in (None, "5") if round_ % 2 == 0 else ("5", None):
                rates[kernel].append(gflops(framework, options.size, kernel))
        plain, chosen = (statistics.median(rates[kernel]) for kernel in (None, "5"))
        print(f"{framework}: {plain:.0f} GFLOP/s as installed, {chosen:.0f} with the variable: {chosen / plain:.2f}×")


if __name__ == "__main__":
    main()
