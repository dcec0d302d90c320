"""Properties of other machines: environment variables, locales, streams, home folders, users and host names."""

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FRAMEWORKS, HERE, ROOT, refusal, run_program
from helpers import record

from tunebench import bootstrap, hardware
from tunebench.errors import BadInput
from tunebench.files import only_one, write_atomically
from tunebench.flags import parse_flags
from tunebench.models.checkpoint import open_checkpoint
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import write_random
from tunebench.record import read_record
from tunebench.run.run import new_record_path
from tunebench.suite.resume import record_before, set_aside

OTHER_USER = 12345
BARE = next(p for p in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable) if Path(p).exists())
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SAMPLES = [{"instruction": f"say {word}", "output": f"{word}, {word}"} for word in ("one", "two", "three", "four")]


@pytest.fixture
def data(tmp_path):
    """A small file of samples in a folder with a name that is not ASCII."""
    file = tmp_path / "项目 é" / "数据.json"
    file.parent.mkdir()
    file.write_text(json.dumps(SAMPLES))
    return [f"--data={file}", "--model=llama-tiny", "--bsz=2", "--steps=2"]


def as_other_user(function):
    """Calls `function` as a user without rights; returns its result, or the error as text."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(OTHER_USER)
            os.setuid(OTHER_USER)
            said = str(function())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def opened_to_all(folder: Path) -> Path:
    """Lets every user enter the folders above `folder`; returns it."""
    for each in (folder, *folder.parents):
        if each != Path("/tmp") and each.stat().st_uid == os.geteuid() and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o055)
    return folder


def test_what_is_recorded_of_the_environment(monkeypatch):
    recorded = {"ATEN_CPU_CAPABILITY": "default", "LD_PRELOAD": "/x.so", "FLAGS_use_mkldnn": "1", "OMP_PROC_BIND": "1"}
    recorded |= dict.fromkeys(("ONEDNN_MAX_CPU_ISA", "TORCHDYNAMO_DISABLE", "GLIBC_TUNABLES", "NCCL_ALGO"), "x")
    recorded |= dict.fromkeys(("FLAGS_cudnn_dir", "TORCHINDUCTOR_FX_GRAPH_CACHE"), "0")  # switches, not paths
    recorded |= dict.fromkeys(("PYTORCH_ALLOC_CONF", "MALLOC_ARENA_MAX", "USE_CASUAL_MASK", "TRITON_DEBUG"), "x")
    left_out = (
        "TORCHELASTIC_RUN_ID",
        "FLAGS_selected_gpus",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_HOME",
        "PADDLE_TRAINER_ID",
    )
    left_out += (
        "PADDLE_BACKUP_ENV_PATH",
        "HF_TOKEN",
        "NVIDIA_API_KEY",
        "PADDLE_PASSWORD",
        "FLAGS_secret",
        "LANG",
        "OMPLIKE",
    )
    for name in (*recorded, *left_out):
        monkeypatch.setenv(name, recorded.get(name, "x"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/\udcff")  # a record holds valid text
    found = hardware.read_environment.__wrapped__()
    assert recorded.items() <= found.items()
    assert not set(left_out) & set(found)
    assert found["LD_LIBRARY_PATH"] == "/\\xff"


@pytest.mark.parametrize(("given", "threads"), [("", None), (" ", None), (" 2 ", "2"), ("4,2", "4"), ("03", "3")])
def test_numbers_of_threads(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    settings = bootstrap.maths_settings()
    assert (bootstrap.THREADS_LEFT_TO_US in settings) == (threads is None)
    assert settings["OMP_NUM_THREADS"] == settings["MKL_NUM_THREADS"] == (threads or str(bootstrap._usable_cores()))


@pytest.mark.parametrize("given", ["[]", "{", '{"a": 1}'])
def test_what_a_run_tells_its_workers_is_checked(monkeypatch, given):
    monkeypatch.setenv(hardware.RUN_ENVIRONMENT, given)
    with pytest.raises(BadInput, match="is what a run tells its own workers; unset it"):
        hardware.read_environment.__wrapped__()


def test_a_results_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    env = {"TUNEBENCH_RESULTS": str(tmp_path / "file")}
    for script in ("finetune_full.py", "finetune_lora.py"):
        line = refusal(run_program(f"{HERE}/{script}", "--model=llama-tiny", "--steps=2", env=env))
        assert f"TUNEBENCH_RESULTS: Not a directory: {tmp_path}/file/runs" in line


def test_a_number_of_threads_of_two_lines_is_refused_in_one():
    line = refusal(run_program("data/prepare.py", env={"OMP_NUM_THREADS": "2\nx"}))
    assert "OMP_NUM_THREADS=2 x is no number of threads" in line


@pytest.mark.parametrize("program", ["data/prepare.py", f"{HERE}/finetune_full.py", "summarize.py"])
def test_bad_input_ends_with_2_where_stderr_is_full(program):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, ROOT / program, "--model=x/y/z"], stderr=full, check=False, cwd="/")
    assert done.returncode == 2


@pytest.mark.parametrize("program", ["torch/finetune_lora.py", "paddle/finetune_full.py", "data/prepare.py"])
@pytest.mark.parametrize("given", ["0", "-1", "auto", "0,2", "2,0", "４", "99999"])
def test_no_numbers_of_threads_are_refused(program, given):
    line = refusal(run_program(program, env={"OMP_NUM_THREADS": given, "PYTHONIOENCODING": "utf-8"}))
    assert f"OMP_NUM_THREADS={given} is no number of threads; unset it, or give one of 1 to 4096" in line


@pytest.mark.frameworks
@pytest.mark.parametrize("python", [BARE, sys.executable])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(data, python, closed):
    command = shlex.join([python, str(ROOT / "data/prepare.py"), *data])
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "env",
    [
        C_LOCALE,
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"} | C_LOCALE,
        {"PYTHONOPTIMIZE": "2"},
    ],
    ids=["C", "latin-1", "ascii", "optimize"],
)
def test_any_locale_and_python(data, env):
    done = run_program("data/prepare.py", *data, env=env, check=True)
    assert done.stdout.startswith(("plan ", "tokenizing "))
    assert "数据" in done.stdout or "\\u6570" in done.stdout


def test_the_stamp_of_an_environment_is_that_of_any_locale(tmp_path):
    project = tmp_path / "项目"
    (project / "torch").mkdir(parents=True)
    locks = ("torch/requirements.txt", "torch/constraints.txt", "torch/cuda12.txt")
    for name in (*locks, "pyproject.toml", "tunebench/bootstrap.py"):
        write_atomically(project / name, (ROOT / name).read_bytes())
    code = "import runpy; print(runpy.run_path('tunebench/bootstrap.py')['stamp']('torch'))"
    stamps = {
        subprocess.check_output([sys.executable, "-c", code], cwd=project, env=os.environ | env)
        for env in ({"PYTHONUTF8": "1"}, C_LOCALE)
    }
    assert len(stamps) == 1


def test_pythonpath_brings_no_other_libraries(data, tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('another numpy')")
    run_program("data/prepare.py", *data, env={"PYTHONPATH": str(tmp_path)}, check=True)


def test_a_home_that_is_none_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("PPNLP_HOME", raising=False)
    own = tmp_path / f"home-{os.getuid()}"
    for home in ("/dev/null", "nowhere", str(tmp_path / "missing")):
        monkeypatch.setenv("HOME", home)
        assert bootstrap.home_settings(paddle=True) == {"HOME": str(own)}
        assert (own / ".paddlenlp" / "models").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bootstrap.home_settings(paddle=True) == {}
    monkeypatch.setenv("PPNLP_HOME", "/dev/null/x")
    assert bootstrap.home_settings(paddle=False) == {}
    assert bootstrap.home_settings(paddle=True) == {"PPNLP_HOME": str(own / ".paddlenlp")}


def test_a_home_of_someone_else_is_left_alone(monkeypatch, tmp_path):
    cache = opened_to_all(tmp_path) / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TUNEBENCH_CACHE", str(cache))
    for name in ("HF_HOME", "TRITON_HOME", "PF_HOME", "PPNLP_HOME"):
        monkeypatch.delenv(name, raising=False)
    own = cache / f"home-{OTHER_USER}"
    named = {"HF_HOME": own / "huggingface", "TRITON_HOME": own, "PF_HOME": own / ".paddleformers"}
    named["PPNLP_HOME"] = own / ".paddlenlp"
    said = as_other_user(lambda: bootstrap.home_settings(paddle=True))
    assert said == str({name: str(folder) for name, folder in named.items()})


def test_a_cache_is_readable_under_the_umask_and_a_file_that_is_not_is_called_that(tmp_path):
    opened_to_all(tmp_path)
    old = os.umask(0o022)
    try:
        write_random(tmp_path, PRESETS["llama-tiny"], seed=0)
        write_atomically(tmp_path / "plan", b"")
        weights = tmp_path / "model.safetensors"
        assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o644"}
        os.umask(0o027)
        write_atomically(tmp_path / "plan", b"")
        assert (tmp_path / "plan").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)
    assert as_other_user(lambda: len(open_checkpoint(tmp_path).files)) == "1"
    weights.chmod(0o600)
    said = as_other_user(lambda: open_checkpoint(tmp_path))
    assert said == f"BadInput: {weights}: Permission denied; let this user read it"


def test_the_lock_of_another_users_cache(monkeypatch, tmp_path):
    opened_to_all(tmp_path)
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path))

    def hold() -> str:
        with only_one("things"):
            return "held"

    assert as_other_user(hold) == "held"  # nobody made the file, and this user cannot
    assert hold() == "held"
    assert as_other_user(hold) == "held"
    said = as_other_user(lambda: write_atomically(tmp_path / "x", b""))
    assert (
        said
        == f"BadInput: {tmp_path / 'x'} cannot be written: Permission denied; let this user in there, and run it again"
    )


def test_names_of_files_up_to_the_limit(tmp_path):
    path = tmp_path / ("é" * 125 + ".json")
    write_atomically(path, b"x")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    model = tmp_path / ("模" * 85)
    model.mkdir()
    flags = parse_flags("full", [f"--model={model}/", "--steps=2"])
    assert flags.model_name == model.name
    assert len(os.fsencode(new_record_path("paddle", "lora", flags).name)) < 255


def test_folders_by_their_dots(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for model in (".", "./", "../mine"):
        assert parse_flags("full", [f"--model={model}"]).model_name == "mine"
    assert parse_flags("full", ["--model=.."]).model_name == tmp_path.name
    assert parse_flags("full", ["--model=me/it", "--weights=pretrained"]).model_name == "it"


def test_a_shell_of_slurms_gets_a_hint():
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    line = refusal(run_program("torch/finetune_full.py", env=step))
    assert line.endswith("SLURM_JOB_ID is not set; where srun did not start this script itself, unset SLURM_PROCID")
    step |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node7", "SLURM_LOCALID": "0"}
    ours, its = pty.openpty()
    line = refusal(run_program("paddle/finetune_full.py", env=step, stdin=its))
    assert "SLURM_PROCID says that this is one of 2 tasks, but it was started on a terminal; unset SLURM_PROCID" in line
    for end in (ours, its):
        os.close(end)


def test_what_need_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "series" / "a.json"
    argv = ["finetune_full.py", "--steps=30", f"--out={path}"]
    assert record_before(path, argv, 1, Path(sys.executable)) == (None, "")
    written = record(argv=argv, status="unsupported")
    written.write(path)
    assert record_before(path, [*argv[:-1], "--out=elsewhere"], 1, Path(sys.executable)) == (written, "")
    assert record_before(path, [*argv[:1], *argv[-1:]], 1, Path(sys.executable))[1] == "its flags changed"
    written.model_copy(update={"versions": written.versions | {"numpy": "1.0"}}).write(path)
    assert record_before(path, argv, 1, Path(sys.executable)) == (None, "the packages changed (numpy)")
    assert record_before(path, argv, 1, Path("/no/python"))[1] == ""  # it is refused when it is to start
    environment = written.hardware.environment | {"ATEN_CPU_CAPABILITY": "default"}
    then = written.hardware.model_copy(update={"environment": environment})
    written.model_copy(update={"hardware": then}).write(path)
    assert (
        record_before(path, argv, 1, Path(sys.executable))[1] == "the machine changed (environment.ATEN_CPU_CAPABILITY)"
    )
    written.model_copy(update={"git": written.git.model_copy(update={"revision": "0" * 40})}).write(path)
    assert record_before(path, argv, 1, Path(sys.executable))[1].startswith("the code is of another commit")
    assert (set_aside(path.parent, path) / "a.json").exists()
    assert not path.exists()


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_node_needs_no_name_and_records_what_the_user_had(data, tmp_path, framework):
    if os.geteuid() or subprocess.run(["unshare", "-u", "true"], check=False).returncode:
        pytest.skip("only root can give a host another name here (unshare -u)")
    out = tmp_path / "r.json"
    script = [sys.executable, str(ROOT / framework / "finetune_full.py"), *data, "--nproc=2", "--timeout=120"]
    env = {"HOME": "/dev/null", "ATEN_CPU_CAPABILITY": "avx2", "NCCL_DEBUG": "WARN", "FLAGS_api_token": "x"}
    done = subprocess.run(
        ["unshare", "-u", "bash", "-c", f"hostname no-such-host-q7 && exec {shlex.join([*script, f'--out={out}'])}"],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--warmup-steps 1 (the default 8 leaves none of 2 to time)" in done.stdout
    record = read_record(out)
    assert record.timed_from == 1
    given = {"ATEN_CPU_CAPABILITY": "avx2", "NCCL_DEBUG": "WARN"}
    threads = str(max(1, bootstrap._usable_cores() // 2))
    given |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NVIDIA_TF32_OVERRIDE": "0"}
    given |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    found = record.hardware.environment
    assert given.items() <= found.items()
    # None is set by a launcher or a framework.
    assert set(found) - set(given) <= set(os.environ) | {"MKL_DEBUG_CPU_TYPE"}
