"""setup.sh for real, on a small stand-in project: real interpreters, real uv, real interruptions."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import time
import zipfile

import psutil
import pytest
from conftest import ROOT
from helpers import ask_uv

pytestmark = pytest.mark.frameworks


@pytest.fixture
def project(tmp_path):
    """A folder with setup.sh and a few tiny packages to install."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    (tmp_path / "tunebench").mkdir()
    (tmp_path / "tunebench" / "__init__.py").write_text("")
    for name in ("bootstrap.py", "installed.py"):
        shutil.copy(ROOT / "tunebench" / name, tmp_path / "tunebench")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools==84.2.1"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "tunebench"\nversion = "0"\n[project.optional-dependencies]\ntest = []\n'
        '[tool.setuptools]\npackages = ["tunebench"]\npackage-dir = { tunebench = "tunebench" }\n'
    )
    for name in ("torch", "paddle"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "requirements.txt").write_text("packaging==26.3\n")
        (tmp_path / name / "constraints.txt").write_text("packaging==26.3\n")
    (tmp_path / "torch" / "cuda12.txt").write_text("cuda-toolkit==12.6.3\n")
    (tmp_path / ".venv").mkdir()
    if (ROOT / ".venv/uv").is_dir():
        (tmp_path / ".venv/uv").symlink_to(ROOT / ".venv/uv")
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


def test_a_long_install_says_how_it_gets_on(project):
    script = project / "setup.sh"
    script.write_text(script.read_text().replace("line_every=15", "line_every=0.2"))
    started = time.monotonic()
    made = setup(project, "torch")
    assert made.returncode == 0, made.stderr
    lines = re.findall(r"(?m)^setup: installing torch's packages: \d+ s so far(?:, (\d+) MB written)?$", made.stdout)
    assert 1 <= len(lines) <= (time.monotonic() - started) / 0.2
    assert lines[0], "the kernel counts what a process writes"
    assert "installing" not in setup(project, "torch").stdout


def test_no_line_outlives_an_interrupted_install(project):
    script = project / "setup.sh"
    script.write_text(script.read_text().replace("line_every=15", "line_every=0.1"))
    running = subprocess.Popen(["bash", script, "torch"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "installing torch's packages" not in running.stdout.readline():
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    interrupted = time.monotonic()
    running.communicate(timeout=60)  # until nothing holds its output
    assert running.returncode == 143
    assert time.monotonic() - interrupted < 10


def test_one_that_cannot_be_made_is_named_and_the_other_is_there(project):
    (project / "paddle/requirements.txt").write_text("packaging==26.3\nsix==0.0.0\n")
    done = setup(project)
    assert done.returncode == 2
    assert "setup: uv could not install paddle's packages" in done.stderr
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
        ([], {"PYTHON": "/bin/false"}, "PYTHON=/bin/false is no Python 3.11 or 3.12"),
        ([], {"TUNEBENCH_CUDA": "11"}, "TUNEBENCH_CUDA=11 is not offered; use 12 or 13"),
    ):
        done = setup(project, *arguments, **env)
        assert done.returncode == 2
        assert part in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_names_what_would_do_where_there_is_no_python(project):
    """There is neither uv nor Python. Then there is a uv that cannot fetch Python."""
    (project / ".venv/uv").unlink(missing_ok=True)
    (project / "tools").mkdir()
    for tool in ("bash", "dirname", "readlink", "mkdir", "flock", "head", "cat", "cut", "rm", "sed", "tr"):
        (project / "tools" / tool).symlink_to(shutil.which(tool))
    bare = {"PATH": str(project / "tools"), "PYTHON": "", "HOME": str(project)}
    done = setup(project, **bare)
    assert done.returncode == 2
    assert "found neither uv nor a Python with pip" in done.stderr
    assert "apt install python3-venv" in done.stderr
    (project / "tools" / "uv").write_text("#!/bin/bash\nexit 2\n")
    (project / "tools" / "uv").chmod(0o755)
    done = setup(project, **bare)
    assert done.returncode == 2
    assert "this machine has no Python 3.11 or 3.12: uv fetches 3.11" in done.stdout
    assert "install Python 3.11 or 3.12 (Debian 12: apt install python3.11;" in done.stderr


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


def tools(folder, **programs):
    """A folder with these shell scripts, to come first in PATH."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("driver", "build"),
    [
        ("595.71.05", "cuda13 from https://www.paddlepaddle.org.cn/packages/stable/cu130/, at most 8 GB"),
        ("580.65.06", "cuda13 from "),
        ("570.86.10", "cuda12 from https://www.paddlepaddle.org.cn/packages/stable/cu126/, at most 8 GB"),
        ("525.60.13", "cuda12 from "),
    ],
)
def test_the_driver_decides_the_build(project, driver, build):
    """Checks what uv is asked to install. Its indexes cannot be reached from every machine."""
    path = tools(project / "tools", nvidia_smi=f"echo {driver}")
    done = setup(project, "paddle", PATH=path, UV_OFFLINE="1", UV_NO_CACHE="1")
    assert build in done.stdout
    assert done.returncode == 2
    assert "setup: uv could not install paddle's packages" in done.stderr
    assert not (project / ".venv/paddle/complete").exists()
    said = (project / ".venv/paddle/requirements.txt").read_text()
    assert "packaging==26.3" in said


def test_cuda_12_has_wheels_of_its_own(project):
    (project / "torch/requirements.txt").write_text("torch==2.13.0\npackaging==26.3\n")
    lock = "cuda-toolkit==13.0.3.0\nnvidia-cublas==13.1.1.3\nnvidia-ml-py==13.615.71\npackaging==26.3\n"
    (project / "torch/constraints.txt").write_text(lock)
    path = tools(project / "tools", nvidia_smi="echo 550.54.15")
    done = setup(project, "torch", PATH=path, UV_OFFLINE="1", UV_NO_CACHE="1")
    assert "cuda12 from https://download.pytorch.org/whl/cu126" in done.stdout
    assert (project / ".venv/torch/requirements.txt").read_text() == "torch==2.13.0+cu126\npackaging==26.3\n"
    locked = (project / ".venv/torch/constraints.txt").read_text()
    assert locked == "nvidia-ml-py==13.615.71\npackaging==26.3\ncuda-toolkit==12.6.3\n"


def test_the_lock_for_cuda_12_holds(project):
    """Asks the index for what setup.sh would install. A wheel without code stands in for torch, which is elsewhere."""
    shutil.copytree(ROOT / "torch", project / "torch", dirs_exist_ok=True)
    setup(project, "torch", PATH=tools(project / "tools", nvidia_smi="echo 550.54.15"), UV_OFFLINE="1", UV_NO_CACHE="1")
    requirements, lock = (project / f".venv/torch/{kind}.txt" for kind in ("requirements", "constraints"))
    cuda = (ROOT / "torch/cuda12.txt").read_text().splitlines()
    needs = ["filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec", "triton==3.7.1"]
    needs += [line.lstrip("# ") for line in cuda if line.startswith("#    ") and "=" in line and "uv " not in line]
    assert len(needs) == 8 + 6
    metadata = ["Metadata-Version: 2.1", "Name: torch", "Version: 2.13.0+cu126"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(project / "torch-2.13.0+cu126-py3-none-any.whl", "w") as wheel:
        about = {"METADATA": metadata, "WHEEL": ["Wheel-Version: 1.0", "Tag: py3-none-any"], "RECORD": []}
        for file, lines in about.items():
            wheel.writestr(f"torch-2.13.0+cu126.dist-info/{file}", "\n".join(lines) + "\n")
    how = ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_28", "--no-annotate", "--no-header"]
    how += [f"--constraint={lock}", f"--find-links={project}"]
    needed = set(ask_uv("compile", "--quiet", requirements, *how).split())
    assert "torch==2.13.0+cu126" in needed
    assert needed - {"torch==2.13.0+cu126"} <= set(lock.read_text().split("\n"))
    assert {line for line in cuda if not line.startswith("#")} <= needed


@pytest.mark.parametrize(
    ("answer", "arguments", "line"),
    [
        (
            "echo 470.256.02",
            [],
            "NVIDIA driver 470.256.02 is too old: CUDA 12 needs 525, CUDA 13 needs 580; update the",
        ),
        ("echo '[N/A]'", [], "nvidia-smi names no driver version, but '[N/A]'; mend the driver, or use --cpu"),
    ],
)
def test_a_driver_that_runs_no_build_is_refused(project, answer, arguments, line):
    done = setup(project, "torch", *arguments, PATH=tools(project / "tools", nvidia_smi=answer))
    assert done.returncode == 2
    assert done.stderr.startswith(f"setup: {line}")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_machine_that_got_its_gpu_later_or_lost_it_is_told_so(project):
    assert setup(project, "torch").returncode == 0
    complete = project / ".venv/torch/complete"
    stamp = complete.read_text().splitlines()[0]
    path = tools(project / "tools", nvidia_smi="echo 550.54.15")
    for kind, where, part in (
        ("CPU", path, "cannot use this machine's NVIDIA GPU (driver 550.54.15), since it has a CPU build; run: rm -r "),
        (
            "CUDA 13.0",
            path,
            "has a build for CUDA 13.0, which needs driver 580, and this machine has driver 550.54.15; ",
        ),
        ("CUDA 13.0", os.environ["PATH"], "has a build for GPUs (CUDA 13.0), and no GPU is visible here"),
    ):
        complete.write_text(f"{stamp}\n{kind}\n")
        done = setup(project, "torch", PATH=where)
        assert done.returncode == 0
        assert f".venv/torch is complete ({kind})" in done.stdout
        assert part in done.stdout
    complete.write_text(f"{stamp}\nCPU\n")
    assert "cannot use" not in setup(project, "torch", "--cpu", PATH=path).stdout


@pytest.mark.parametrize("name", ["PIP_TARGET", "PIP_PREFIX", "PIP_USER"])
def test_settings_of_pip_do_not_divert_an_installation(project, name):
    value = "1" if name == "PIP_USER" else str(project / "elsewhere")
    done = setup(project, "torch", **{name: value})
    assert done.returncode == 0, done.stderr
    python = project / ".venv/torch/bin/python"
    assert subprocess.run([python, "-c", "import packaging, tunebench"], cwd="/").returncode == 0
    assert not (project / "elsewhere").exists()


def test_uv_is_installed_where_it_is_missing(project):
    (project / ".venv/uv").unlink(missing_ok=True)
    assert setup(project, "torch").returncode == 0
    assert (project / ".venv/uv/bin/uv").exists()


def test_a_package_that_cannot_be_imported_leaves_no_stamp(project):
    (project / "torch/requirements.txt").write_text("# imports: packaging no_such_module\npackaging==26.3\n")
    done = setup(project, "torch")
    assert done.returncode == 2
    assert "setup: no_such_module cannot be imported: ModuleNotFoundError: No module named" in done.stderr
    assert not (project / ".venv/torch/complete").exists()


@pytest.mark.parametrize("environment", ["torch", "paddle"])
def test_the_lock_holds_for_python_3_12_too(environment):
    """Asked of the index: there the same versions have wheels, but for three packages that have none for any Python."""
    lock = ROOT / environment / "constraints.txt"
    asked = [
        ROOT / environment / "requirements.txt",
        ROOT / "pyproject.toml",
        "--extra=page",
        "--extra=test",
        f"--constraint={lock}",
    ]
    how = ["--python-version=3.12", "--python-platform=x86_64-manylinux_2_28", "--no-annotate", "--no-header"]
    how += ["--only-binary=:all:", *(f"--no-binary={name}" for name in ("deepspeed", "jieba", "seqeval"))]
    needed = set(ask_uv("compile", "--quiet", *asked, *how).split())
    assert any(line.startswith("pytest==") for line in needed), needed
    assert needed <= set(lock.read_text().split("\n"))


def test_a_missing_library_is_named_with_its_package():
    explained = runpy.run_path(str(ROOT / "tunebench/installed.py"))["explained"]
    said = explained(ImportError("libgomp.so.1: cannot open shared object file: No such file or directory"))
    assert said.endswith("install it (Debian or Ubuntu: apt install libgomp1)")


@pytest.mark.parametrize("script", ["setup.sh", "run_all.sh"])
def test_sh_and_links_start_the_scripts_too(project, script):
    shutil.copy(ROOT / "run_all.sh", project)
    link = project / "tools"
    link.symlink_to(project / script)
    wrong = "jax" if script == "setup.sh" else "--help"
    by_sh = subprocess.run(["sh", project / script, wrong], capture_output=True, text=True)
    by_link = subprocess.run(["bash", link, wrong], capture_output=True, text=True)
    assert (by_sh.returncode, by_sh.stdout, by_sh.stderr) == (by_link.returncode, by_link.stdout, by_link.stderr)
    assert by_sh.returncode == (2 if script == "setup.sh" else 0)
    assert ("unknown argument 'jax'" in by_sh.stderr) or "--suite NAME" in by_sh.stdout


def test_a_signal_ends_set_up_at_once(project):
    """SIGTERM ends set-up and the program that it started, also through run_all.sh."""
    shutil.copy(ROOT / "run_all.sh", project)
    slow = tools(project / "tools", nvidia_smi="exit 9")
    (project / ".venv/uv").unlink(missing_ok=True)
    uv = project / ".venv/uv/bin"
    uv.mkdir(parents=True)
    started = project / "started"
    (uv / "uv").write_text(
        f'#!/bin/sh\ncase $1 in --version) echo "uv 0.13.9";; python) command -v python3;; '
        f'venv) for last; do :; done; mkdir -p "$last";; *) echo $$ >"{started}"; exec sleep 300;; esac\n'
    )
    (uv / "uv").chmod(0o755)
    running = subprocess.Popen(
        ["bash", project / "run_all.sh"],
        env=os.environ | {"PATH": slow},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not started.exists() or not started.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=20)
    assert running.returncode == 143, said
    assert b"run_all.sh: ended during set-up; the same command goes on" in said
    pid = int(started.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
