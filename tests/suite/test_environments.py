"""How a suite has setup.sh make environments: with which arguments, stopped, and after a failure."""

import os
import time

import pytest

from tunebench.errors import BadInput
from tunebench.suite.environments import make_environments


def checkout(folder, then):
    """A folder whose setup.sh notes its arguments and its process."""
    (folder / "setup.sh").write_text(f'echo "$@" >"{folder}/given"; echo $$ >"{folder}/process"; {then}\n')
    return folder


@pytest.mark.parametrize(("cpu", "given"), [(True, "swift torch --cpu\n"), (False, "swift torch\n")])
def test_setup_gets_the_names(tmp_path, cpu, given):
    assert make_environments(checkout(tmp_path, "exit 0"), ["swift", "torch"], cpu, stopped=lambda: False)
    assert (tmp_path / "given").read_text() == given


def test_a_signal_ends_set_up(tmp_path, capsys):
    started = tmp_path / "process"
    root = checkout(tmp_path, "sleep 300")
    assert not make_environments(root, ["swift"], cpu=False, stopped=lambda: started.exists() and started.read_text())
    assert "interrupted during set-up; the same command goes on" in capsys.readouterr().out
    deadline = time.monotonic() + 10
    while (path := f"/proc/{started.read_text().strip()}") and os.path.exists(path):  # noqa: PTH110
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failed_set_up_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"setup\.sh failed for swift, torch \(its messages are above\)"):
        make_environments(checkout(tmp_path, "exit 3"), ["swift", "torch"], cpu=False, stopped=lambda: False)
