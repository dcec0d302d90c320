"""Before a suite: run_all.sh --check and --rehearse, and a user's own interpreters."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pynvml
import pytest
from conftest import FRAMEWORKS, ROOT, assert_one_curve, refusal, train
from helpers import SUITE, ask_uv, finish_suite, start_suite

from tunebench import hardware
from tunebench.bootstrap import order_of
from tunebench.record import read_record
from tunebench.report.pairing import join
from tunebench.suite import check
from tunebench.suite.file import find_suite, plan_runs, read_suite
from tunebench.suite.rehearsal import rehearsal_changes, whole_minutes


@pytest.fixture
def mini(tmp_path):
    """A folder with a suite of its own."""
    (tmp_path / "mini.toml").write_text(SUITE)
    return tmp_path


@pytest.mark.frameworks
def test_a_check_says_what_each_run_needs(mini):
    printed = finish_suite(start_suite(mini, "--check"), 0)
    assert "ok     GPUs: none is visible; runs use the CPU" in printed
    for framework in FRAMEWORKS:
        assert f"ok     {framework}: " in printed
    assert printed.count("built for CPUs, finds 0 GPU(s), NCCL none") == 2
    assert "ok     runs: 4 would start, of 4" in printed
    assert printed.rstrip().splitlines()[-1].startswith("checked suite mini: 0 faults, ")
    assert not (mini / "results").exists(), "it starts none"


@pytest.mark.frameworks
def test_a_check_names_runs_that_would_not_start(mini):
    flags = 'flags = { dtype = "bf16", steps = 20, recompute = true }'
    (mini / "mini.toml").write_text(
        SUITE.replace("flags = { steps = 20, recompute = true }", flags)
        + '[[pair]]\nname = "thirds"\nscript = "finetune_full.py"\nflags = { mp = 3, bsz = 3 }\n'
    )
    printed = finish_suite(start_suite(mini, "--check"), 1)
    assert "note   lora/paddle: unsupported: " in printed
    assert "fault  thirds/paddle and 1 more: --mp 3 does not divide the model's " in printed
    assert "ok     runs: 3 would start, of 6" in printed
    assert "checked suite mini: 1 faults" in printed


ANSWERS = {
    "nvmlDeviceGetComputeRunningProcesses": [],
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetCurrentEccMode": 1,
    "nvmlDeviceGetEnforcedPowerLimit": 400_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": 400_000,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetMigMode": (0, 0),
}


@pytest.mark.parametrize(
    ("question", "answer", "line"),
    [
        (None, None, None),
        ("nvmlDeviceGetComputeRunningProcesses", [pynvml.c_nvmlProcessInfo_v2_t(pid=77)], "fault  GPU 0: in use by 1 "),
        ("nvmlDeviceGetTotalEccErrors", 2, "fault  GPU 0: 2 uncorrected memory errors"),
        ("nvmlDeviceGetCurrentEccMode", 0, "note   GPU 0: ECC is off"),
        (
            "nvmlDeviceGetEnforcedPowerLimit",
            300_000,
            "note   GPU 0: power limit 300 W, below the usual 400 W: nvidia-smi",
        ),
        (
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
            "fault  GPU 0: its clocks are held down now: thermal (hardware)",
        ),
        ("nvmlDeviceGetPersistenceMode", 0, "note   GPU 0: persistence mode is off"),
        ("nvmlDeviceGetMigMode", (1, 1), "note   GPU 0: is cut into slices (MIG)"),
    ],
)
def test_what_is_found_of_a_gpu(monkeypatch, question, answer, line):
    for name, usual in ANSWERS.items():
        value = answer if name == question else usual
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)
    found = [finding.line() for finding in check.check_gpu("GPU 0", None)]
    if line is None:
        assert found == []
    else:
        (only,) = found
        assert only.startswith(line)


@pytest.mark.parametrize(("names", "level"), [(["A", "A"], "ok"), (["A", "B"], "fault")])
def test_gpus_of_one_kind(monkeypatch, names, level):
    """Pretended GPUs that are linked by PCIe only."""
    unknown = dict.fromkeys(hardware.Accelerator.model_fields)
    gpus = [hardware.Accelerator(**(unknown | {"name": name})) for name in names]
    links = [["X", "PHB"], ["PHB", "X"]]
    machine = hardware.read_hardware().model_copy(
        update={"accelerators": gpus, "links": links, "driver": "580.65", "cuda": "13.0"}
    )
    found = [finding.line() for finding in check.check_gpus(machine)]
    assert found[0].startswith(f"{level:5}  GPUs: 2 x ")
    assert found[-1] == "note   links: no NVLink between 0-1 (PHB): runs on several GPUs will be slower"


@pytest.mark.frameworks
def test_a_rehearsal_runs_each_run_with_two_layers(mini):
    printed = finish_suite(start_suite(mini, "--rehearse", "--only=lora/*"), 0)
    folder = mini / "results" / "rehearsals" / "mini" / "lora"
    records = [read_record(folder / f"{side}-r1.json") for side in FRAMEWORKS]
    for record in records:
        assert (record.status, record.model.name, len(record.steps.seconds)) == ("ok", "llama-tiny-2-layers", 3)
        assert record.model.work.layers == 2
        assert record.setup.recompute, "a run keeps its own flags"
    *_, table = printed.split("### Rehearsal")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if "| ok " in line]
    assert rows == ["lora/paddle", "lora/torch"]
    assert "The whole suite would take about" in table
    assert not (mini / "results" / "mini").exists()
    tables = subprocess.run(
        [sys.executable, ROOT / "summarize.py", mini / "results"], capture_output=True, text=True, check=False
    )
    assert "no records in" in tables.stdout + tables.stderr, "a rehearsal is no result"


def test_what_a_whole_run_would_take(tmp_path):
    """Set-up takes 30 s, then 60 steps take 4 s each: 16 times the 0.25 s of 2 of 32 layers."""
    file = find_suite("a100x4")
    whole = plan_runs(file, read_suite(file), tmp_path, 1, "llama-7b-full-bsz8-zero3/*")
    flags = whole[0].flags
    assert rehearsal_changes(whole)["llama-7b-full-bsz8-zero3/torch"] == {
        "layers": 2,
        "steps": 3,
        "epochs": None,
        "warmup-steps": 1,
    }
    content = json.loads((ROOT / "tests" / "data" / "quick.jsonl").read_text().splitlines()[0])
    (tmp_path / "r.json").write_text(json.dumps(content))
    record = read_record(tmp_path / "r.json")
    count = len(record.steps.seconds)
    steps = record.steps.model_copy(update={"seconds": [0.25] * count})
    record = record.model_copy(update={"steps": steps, "setup_seconds": 30.0})
    assert whole_minutes(record, flags) == pytest.approx((30 + 60 * 4) / 60)
    cut = flags.model_copy(update={"layers": 8})
    assert whole_minutes(record, cut) == pytest.approx((30 + 60) / 60), "8 layers are all of this run's"


@pytest.fixture
def own(tmp_path):
    """A function that makes an interpreter of the user's own: with an environment's packages, or with none."""

    def make(packages: bool, framework: str = "torch"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "own"], check=True)
        (site,) = (tmp_path / "own").glob("lib/python*/site-packages")
        if packages:  # not tunebench: Python ignores .pth files of folders on its path
            (there,) = (ROOT / ".venv" / framework).glob("lib/python*/site-packages")
            (site / "others.pth").write_text(f"{there}\n")
        return tmp_path / "own" / "bin" / "python"

    return make


def refusal_with(python: object, *flags: str, framework: str = "torch") -> str:
    """Asserts that a script refused to run in the user's own interpreter; returns its line."""
    command = ["python3", ROOT / framework / "finetune_full.py", "--model=llama-tiny", *flags]
    environment = os.environ | {f"TUNEBENCH_{framework.upper()}": str(python)}
    return refusal(subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False))


OTHER_VERSIONS = {"transformers": "5.22.2", "peft": "0.20.0"}  # a minor release before the pinned ones


@pytest.mark.frameworks
@pytest.mark.parametrize("other", [{}, OTHER_VERSIONS], ids=["pinned versions", "other versions"])
def test_an_interpreter_of_the_users_own(own, alone, short, tmp_path, other):
    python, out = own(True), tmp_path / "r.json"
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    if other:
        ask_uv("install", "--quiet", "--no-deps", f"--target={site}", *(f"{k}=={v}" for k, v in other.items()))
    command = [
        "python3",
        ROOT / "torch" / "finetune_full.py",
        "--model=llama-tiny",
        *short,
        "--nproc=2",
        f"--out={out}",
    ]
    environment = os.environ | {"TUNEBENCH_TORCH": str(python)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(out)
    assert (record.status, record.devices) == ("ok", 2)
    pinned = alone("torch", "llama", "full")
    assert record.versions == pinned.versions | other
    assert_one_curve(record, pinned)
    if other:
        (row,) = join([train("paddle", "full", tmp_path / "p.json", "--model=llama-tiny", *short, "--nproc=2"), record])
        assert (row.refusal is None or "disturbed" in row.refusal, row.compared) == (True, "like for like")
    assert subprocess.run([python, "-c", "import tunebench"], capture_output=True, cwd="/").returncode == 1


@pytest.mark.frameworks
def test_a_record_of_other_packages_is_not_taken_for_a_run_s(own, mini):
    """A suite that is run again with another interpreter measures its runs with it."""
    python = own(True)
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    finish_suite(start_suite(mini, "--only=full/*"), 0)
    again = finish_suite(start_suite(mini, "--only=full/*", TUNEBENCH_TORCH=str(python)), 0)
    assert "runs: 2, done already: 2" in again  # the same packages by another path
    ask_uv("install", "--quiet", "--no-deps", f"--target={site}", "peft==0.20.0")
    changed = finish_suite(start_suite(mini, "--only=full/*", TUNEBENCH_TORCH=str(python)), 0)
    assert "runs: 2, done already: 1" in changed
    assert "full/torch r1: again, since the packages changed (peft)" in changed
    assert read_record(mini / "results" / "mini" / "full" / "torch-r1.json").versions["peft"] == "0.20.0"


@pytest.mark.frameworks
def test_an_interpreter_without_deepspeed_refuses_zero(own, mini):
    python = own(False)
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    (there,) = (ROOT / ".venv" / "torch").glob("lib/python*/site-packages")
    for package in there.iterdir():
        if not package.name.startswith("deepspeed") and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    needs = f"--zero needs deepspeed, which {python} lacks; install it there, or use --sharding fsdp, --nproc or --mp"
    assert refusal_with(python, "--zero=3") == f"finetune_full.py: {needs}"
    pair = '[[pair]]\nname = "zero"\nscript = "finetune_full.py"\nflags = { zero = 3, bsz = 2 }\n'
    (mini / "mini.toml").write_text(SUITE + pair)
    printed = finish_suite(start_suite(mini, "--check", TUNEBENCH_TORCH=str(python)), 1)
    assert f"fault  zero/torch: {needs}\n" in printed
    assert "ok     runs: 5 would start, of 6" in printed


@pytest.mark.frameworks
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_failed_import_leaves_a_record(own, short, tmp_path, nproc):
    """transformers is there by its metadata, and its import fails as that of a library without its own libraries."""
    python, out, fault = own(True), tmp_path / "r.json", "libtorch_cuda.so: cannot open shared object file"
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    code = f"try:\n raise ImportError({fault!r})\nexcept ImportError as e:\n raise RuntimeError('see above') from e"
    (site / "transformers.py").write_text(code)
    flags = ["--model=llama-tiny", *short, f"--nproc={nproc}", f"--out={out}"]
    command = ["python3", ROOT / "torch" / "finetune_full.py", *flags]
    environment = os.environ | {"TUNEBENCH_TORCH": str(python)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    record = read_record(out)
    assert (record.status, record.model.name) == ("failed", "llama-tiny")
    assert re.fullmatch(f"(rank [01]: )?an import failed: ImportError: {fault}", record.reason), record.reason
    assert f"ImportError: {fault}" in record.log
    assert record.log[-1] == "RuntimeError: see above"
    assert nproc > 1 or done.stderr == f"finetune_full.py: failed: {record.reason} (record: {out})\n"


def test_versions_are_compared_with_their_pre_releases():
    rising = ["2.9.0", "2.10.0a0+b4e4ee8", "2.10rc1", "2.10", "3.0.0.dev7", "3.0.0b3", "3.0.0b4", "3", "3.3.1+cu126"]
    rising.append("0.0.0")
    assert all(order_of(a) < order_of(b) for a, b in itertools.pairwise(rising))
    assert order_of("3.0.0b4.post20250101") == order_of("3.0.0b4")
    assert order_of("5.18") == order_of("5.18.0")


@pytest.mark.frameworks
def test_packages_that_are_too_old_are_named(own):
    """Made-up metadata, which comes first on the path: `--mp` needs a newer transformers than the rest."""

    def line_with(framework: str, package: str, version: str) -> str:
        python = own(True, framework)
        (site,) = python.parents[1].glob("lib/python*/site-packages")
        folder = site / f"{package}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        line = refusal_with(python, "--mp=2", framework=framework)
        shutil.rmtree(python.parents[1])
        return line.replace(str(python), "PYTHON")

    lines = [line_with("torch", "transformers", version) for version in ("5.1.9", "5.17.0")]
    assert lines == [
        "finetune_full.py: TUNEBENCH_TORCH=PYTHON lacks transformers>=5.2 (it has 5.1.9); install them there, or "
        "unset the variable",
        "finetune_full.py: --mp needs transformers 5.18.0 or newer, and PYTHON has 5.17.0",
    ]
    # PaddlePaddle 3.3.0 starts several processes only beside protobuf 6. PaddleNLP 3.0.0b3 has no LoRA for Bloom.
    lines = [line_with("paddle", *old) for old in (("paddlepaddle_gpu", "3.3.0"), ("paddlenlp", "3.0.0b3"))]
    lacks = ("paddlepaddle-gpu>=3.3.1 (it has 3.3.0)", "paddlenlp>=3.0.0b4 (it has 3.0.0b3)")
    assert lines == [
        f"finetune_full.py: TUNEBENCH_PADDLE=PYTHON lacks {each}; install them there, or unset the variable"
        for each in lacks
    ]


@pytest.mark.frameworks
def test_an_interpreter_that_lacks_packages_is_named(own, mini):
    python = own(False)
    line = refusal_with(python)
    assert line.startswith(f"finetune_full.py: TUNEBENCH_TORCH={python} lacks datasets, numpy, nvidia-ml-py==")
    wanted = "torch>=2.12.0a0, transformers>=5.2, peft>=0.19, accelerate>=1.12"
    assert line.endswith(f"{wanted}; install them there, or unset the variable")
    printed = finish_suite(start_suite(mini, "--check", TUNEBENCH_TORCH=str(python)), 1)
    lacks = f"gpus_seen.py: TUNEBENCH_TORCH={python} lacks datasets, "
    assert f"fault  torch: does not start in {python}: {lacks}" in printed
    assert "ok     runs: 2 would start, of 4" in printed
    assert refusal_with("/no/python") == (
        "finetune_full.py: TUNEBENCH_TORCH: /no/python cannot be started (/no/python: No such file or directory); "
        "name another Python, or unset it"
    )
