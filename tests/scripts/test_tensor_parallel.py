"""Torch's tensor parallelism on slices of unequal width; tests/scripts/test_parallel.py trains whole models with it."""

import subprocess

import pytest
from conftest import ROOT


@pytest.mark.frameworks
def test_slices_of_unequal_width_give_the_loss_and_the_gradients_of_the_whole():
    python = ROOT / ".venv" / "torch" / "bin" / "python"
    command = [
        python,
        "-P",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        ROOT / "tests/sliced.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
