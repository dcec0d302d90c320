"""setup.sh for real, on a small stand-in project: real interpreters, real pip, real interruptions."""

import os
import runpy
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT

pytestmark = pytest.mark.frameworks


@pytest.fixture
def project(tmp_path):
    """A folder with setup.sh and a few tiny packages to install."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    (tmp_path / "tunebench").mkdir()
    (tmp_path / "tunebench" / "__init__.py").write_text("")
    shutil.copy(ROOT / "tunebench" / "bootstrap.py", tmp_path / "tunebench")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools==84.2.1"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "tunebench"\nversion = "0"\n[project.optional-dependencies]\ntest = []\n'
        '[tool.setuptools]\npackages = ["tunebench"]\npackage-dir = { tunebench = "tunebench" }\n'
    )
    for name in ("torch", "paddle"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "requirements.txt").write_text("packaging==26.3\n")
        (tmp_path / name / "constraints.txt").write_text("packaging==26.3\n")
    return tmp_path


def setup(project, *arguments, **env):
    return subprocess.run(
        ["bash", project / "setup.sh", *arguments], capture_output=True, text=True, env=os.environ | env, timeout=300
    )


def test_makes_once_and_remakes_what_is_stale(project):
    made = setup(project, "torch")
    assert made.returncode == 0, made.stderr
    assert "making .venv/torch" in made.stdout
    python = project / ".venv/torch/bin/python"
    stamp = python.stat().st_ctime_ns
    marker = project / ".venv/torch/marker"
    marker.touch()

    again = setup(project, "torch")
    assert "is complete" in again.stdout
    assert "making" not in again.stdout
    assert marker.exists()
    assert python.stat().st_ctime_ns == stamp

    stamped = runpy.run_path(str(project / "tunebench/bootstrap.py"))["stamp"]
    before = stamped("torch")
    (project / "torch/constraints.txt").write_text("packaging==26.3\nsix==1.17.0\n")
    assert stamped("torch") != before
    (project / "torch/requirements.txt").write_text("packaging==26.3\nsix==1.17.0\n")
    assert "out of date" in setup(project, "torch").stdout
    assert not marker.exists()
    assert subprocess.run([python, "-c", "import six"], cwd="/").returncode == 0


def test_survives_being_killed(project):
    running = subprocess.Popen(
        ["bash", project / "setup.sh"], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (project / ".venv/paddle/bin/python").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert not (project / ".venv/paddle/complete").exists()
    after = setup(project, "paddle")
    assert after.returncode == 0, after.stderr
    assert "half-made" in after.stdout
    done = subprocess.run([project / ".venv/paddle/bin/python", "-c", "import packaging, tunebench"], cwd="/")
    assert done.returncode == 0


def test_one_that_cannot_be_made_is_named_and_the_other_is_there(project):
    (project / "paddle/requirements.txt").write_text("packaging==26.3\nsix==0.0.0\n")
    done = setup(project)
    assert done.returncode == 2
    assert "setup: pip could not install paddle's packages" in done.stderr
    assert not (project / ".venv/paddle/complete").exists()
    assert ".venv/torch is complete" in done.stdout
    (project / "paddle/requirements.txt").write_text("packaging==26.3\n")
    mended = setup(project, "torch", "torch", "paddle")
    assert mended.returncode == 0, mended.stderr
    assert mended.stdout.count(".venv/torch is complete") == 1
    assert "making .venv/torch" not in mended.stdout
    assert ".venv/paddle was left half-made" in mended.stdout


def test_refuses_in_one_line(project):
    for arguments, env, part in (
        (["jax"], {}, "unknown argument 'jax'"),
        ([], {"PYTHON": "/bin/false"}, "PYTHON=/bin/false is not a Python 3.11"),
    ):
        done = setup(project, *arguments, **env)
        assert done.returncode == 2
        assert part in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_names_the_versions_that_would_do_when_there_is_none(project):
    tools = project / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "mkdir", "flock", "head", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    script = (project / "setup.sh").read_text()
    (project / "setup.sh").write_text(script.replace("/usr/bin/python3.11 /usr/local/bin/python3.11", ""))
    done = setup(project, PATH=str(tools), PYTHON="")
    assert done.returncode == 2
    assert "found no Python 3.11" in done.stderr
    assert "uv python install 3.11" in done.stderr


def test_an_incomplete_environment_is_never_used(project):
    """A script in a checkout whose environment is half-made names the command instead of running in it."""
    for path in ("torch", "tunebench"):
        shutil.copytree(ROOT / path, project / path, dirs_exist_ok=True)
    python = project / ".venv/torch/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(shutil.which("python3"))
    done = subprocess.run(
        [
            "/usr/bin/env",
            "-i",
            shutil.which("python3", path=os.defpath) or "/usr/bin/python3",
            "-S",
            project / "torch/finetune_full.py",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "finetune_full.py: the environment .venv/torch is not complete; run: bash setup.sh torch"
    )


def test_an_interpreter_that_cannot_be_started_is_named(project):
    shutil.copytree(ROOT / "torch", project / "torch", dirs_exist_ok=True)
    shutil.copytree(ROOT / "tunebench", project / "tunebench", dirs_exist_ok=True)
    python = project / ".venv/torch/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(project / "gone")
    stamp = runpy.run_path(str(project / "tunebench/bootstrap.py"))["stamp"]("torch")
    (project / ".venv/torch/complete").write_text(f"{stamp}\ncpu\n")
    bare = ["/usr/bin/env", "-i", shutil.which("python3", path=os.defpath) or "/usr/bin/python3", "-S"]
    done = subprocess.run([*bare, project / "torch/finetune_full.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"finetune_full.py: {python} cannot be started ({project / 'gone'}: No such file or directory); "
        "let this user start it, or run: bash setup.sh torch"
    )
