"""--calibrate: real records of this framework predict themselves and other runs; what cannot calibrate is refused."""

import json
import math

import pytest
from conftest import HERE, refusal, run_program

from tunebench.errors import BadInput
from tunebench.flags import parse_flags
from tunebench.forecast.calibrate import calibrated, known_runs, machine_of_records, rebuilt, time_factor
from tunebench.forecast.job import describe
from tunebench.forecast.machine import Traits, machine_of_kind
from tunebench.forecast.memory import PARTS, Memory, with_more
from tunebench.forecast.report import Answer
from tunebench.forecast.speed import WIDER
from tunebench.forecast.sweep import Sweep
from tunebench.record import read_record

OTHER = {"torch": "paddle", "paddle": "torch"}[HERE]


@pytest.fixture(scope="module")
def records(alone):
    """Real records of one process by method, as on a machine that nothing disturbs."""
    return {m: alone(HERE, "llama", m).model_copy(update={"conditions": None}) for m in ("full", "lora")}


@pytest.fixture
def written(records, tmp_path):
    """A function that writes a record, with changes, to a file."""

    def write(method="full", name="r.json", **changes):
        records[method].model_copy(update=changes).write(tmp_path / name)
        return tmp_path / name

    return write


def of_hardware(record, **changes):
    return {"hardware": record.hardware.model_copy(update=changes)}


def rate_of(machine, run):
    found = machine.speed(HERE, run.record.method, run.flags, run.checkpoint, run.plan)
    return found.effective_tokens_per_second


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_record_predicts_itself(written, method):
    (run,) = known_runs(HERE, written(method))
    machine = calibrated(HERE, [run])
    assert rate_of(machine, run) == pytest.approx(run.record.effective_tokens_per_second, rel=1e-9)
    assert machine.memory(run.tensors).peak == run.record.peak_memory_bytes[0]
    assert machine.calibration.counter == "resident memory"
    assert machine.calibration.resident_bytes > 10**8
    low, high = machine.interval(HERE, 100.0, run.flags, run.checkpoint.parameters)
    assert (100 / low, high / 100) == pytest.approx([machine.calibration.interval_factor] * 2)


def test_a_gpus_record_gives_its_kind_and_a_share(records, written):
    on_gpu = of_hardware(records["full"], device="NVIDIA H200")
    (run,) = known_runs(HERE, written(**on_gpu))
    peak = run.tensors.peak + int(0.05 * (run.tensors.peak - sum(run.tensors.held.values())))
    (run,) = known_runs(HERE, written(**on_gpu, peak_memory_bytes=[peak]))
    machine = calibrated(HERE, [run])
    assert (machine.name, machine.link_name) == ("h200", "nvlink4")
    assert machine.calibration.unseen_share == pytest.approx(0.05, rel=1e-3)
    assert machine.memory(run.tensors).peak == pytest.approx(peak, abs=2)
    assert rate_of(machine, run) == pytest.approx(run.record.effective_tokens_per_second, rel=1e-9)


def test_several_records_give_their_median(written):
    runs = [*known_runs(HERE, written("full", "full.json")), *known_runs(HERE, written("lora", "lora.json"))]
    both = known_runs(HERE, runs[0].file.parent)
    machine = calibrated(HERE, both)
    factors = [time_factor(run, calibrated(HERE, both)) for run in both]
    assert machine.calibration.records == 2
    assert sum(factors) / 2 == pytest.approx(1)  # the median of two is their mean
    offsets = [run.record.peak_memory_bytes[0] - run.tensors.peak for run in runs]
    assert machine.calibration.resident_bytes == pytest.approx(sum(offsets) / 2, abs=1)


def test_processes_share_a_cpu(written):
    machine = machine_of_records(HERE, written(), None, None)
    one, four = machine.each(1), machine.each(4)
    assert four.memory_bytes == one.memory_bytes // 4
    assert four.single_flops == pytest.approx(one.single_flops / 4)
    h100 = machine_of_kind("h100", None)
    assert h100.each(4) == h100.each(1)


def test_each_new_trait_widens_the_interval(written):
    machine = machine_of_records(HERE, written(), None, None)
    ((traits, parameters),) = machine.seen
    plain = Traits(1, 1, 0, fsdp=False, mp=1, low=False, compiled=False, lean=False, overlap=False, others=(False,) * 3)
    assert traits == plain
    flags = parse_flags(
        "full", ["--model=llama-tiny", "--plan", "--gpu=h100", "--dtype=bf16", "--nproc=1"], framework=HERE
    )
    half = math.log(machine.calibration.interval_factor)
    for size, ways in ((parameters, 1), (3 * parameters, 2)):
        _, high = machine.interval(HERE, 1.0, flags, size)
        assert math.log(high) == pytest.approx(math.hypot(half, math.sqrt(ways) * WIDER))


def test_fewer_bytes_are_taken_from_what_there_is():
    parts = dict.fromkeys(PARTS, 0) | {"weights": 50, "activations": 30, "workspace": 20}
    memory = Memory(peak=100, parts=parts, kept=0, accumulated=0, moment="forward")
    assert with_more(memory, 7).parts == parts | {"workspace": 27}
    assert with_more(memory, -45).parts == parts | {"workspace": 0, "activations": 5}
    assert with_more(memory, -200).peak == 0


def test_a_plan_is_calibrated(forked, records, written, short, tmp_path):
    out, record = tmp_path / "answer" / "a.json", records["full"]
    flags = ["--model=llama-tiny", *short, f"--calibrate={written()}", "--plan"]
    exit_code, printed = forked.run(HERE, "full", *flags, "--out", out)
    assert exit_code == 0, printed
    found, content = Answer.model_validate_json(out.read_text()), json.loads(out.read_text())
    assert found.effective_tokens_per_second == pytest.approx(record.effective_tokens_per_second)
    assert found.memory.peak == record.peak_memory_bytes[0]
    assert found.verdict == "fits"
    assert found.room.usable == found.room.total == record.hardware.memory_bytes
    assert content["calibration"]["records"] == 1
    assert content["gpu"] == f"{record.hardware.cpu} ({record.hardware.cores} cores)"
    assert found.calibration.in_words in printed
    assert "calibrated by 1 record(s) of" in printed


def test_a_sweep_is_calibrated(records, written, tmp_path):
    file, out = written(**of_hardware(records["full"], device="NVIDIA H200")), tmp_path / "sweep" / "s.json"
    flags = [
        "--model=llama-7b",
        "--data=fixed:64",
        "--samples=8",
        "--steps=2",
        "--sweep",
        "--nnodes=1",
        "--attention=sdpa",
    ]
    done = run_program(f"{HERE}/finetune_lora.py", *flags, f"--calibrate={file}", "--out", out, check=True)
    found = Sweep.model_validate_json(out.read_text())
    assert (found.gpu, found.calibration.records) == ("h200", 1)
    assert found.calibration.in_words in done.stdout


def test_other_runs_of_a_folder_are_left_out(records, written):
    path = written().parent
    records["lora"].model_copy(update={"framework": OTHER}).write(path / "other.json")
    records["lora"].model_copy(update={"peer": "hf-trainer"}).write(path / "peer.json")
    records["lora"].model_copy(update={"status": "failed", "reason": "no room"}).write(path / "failed.json")
    assert [run.file.name for run in known_runs(HERE, path)] == ["r.json"]


def test_what_cannot_calibrate_is_left_out_of_a_folder(alone, written, capsys):
    conditions = alone(HERE, "llama", "full").conditions
    taken = conditions.own_core_seconds + conditions.seconds
    written(name="disturbed.json", conditions=conditions.model_copy(update={"busy_core_seconds": taken}))
    written("lora", name="older.json", matmul_flops=[])
    path = written().parent
    (path / "broken.json").write_text("{")
    assert [run.file.name for run in known_runs(HERE, path)] == ["r.json"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].removeprefix(f"--calibrate leaves out {path}/") for line in said] == [
        "broken.json",
        "disturbed.json",
        "older.json",
    ]


class TestRefusals:
    def refused(self, path, said, gpu=None, link=None):
        with pytest.raises(BadInput, match=said) as fault:
            machine_of_records(HERE, path, gpu, link)
        assert "\n" not in str(fault.value)
        assert str(fault.value).startswith(("--calibrate", "--gpu", "--link"))

    def test_no_records(self, tmp_path):
        self.refused(tmp_path / "none", "no such file or folder")
        self.refused(tmp_path, rf"none of 0 record\(s\) is of a run of {HERE}/")

    def test_none_of_this_framework(self, written):
        self.refused(written(framework=OTHER), "none of 1 record")

    def test_a_broken_file(self, tmp_path):
        (tmp_path / "r.json").write_text("{")
        self.refused(tmp_path, "r.json: not a record: not JSON")

    def test_an_edited_file(self, written):
        file = written()
        file.write_text(file.read_text().replace('"timed_from": 2', '"timed_from": 3'))
        self.refused(file, "edited since it was written")

    def test_several_machines(self, records, written):
        path = written().parent
        written("lora", "other.json", **of_hardware(records["lora"], cpu="another CPU"))
        self.refused(path, "other.json.* several machines .*another CPU")

    def test_a_disturbed_record(self, alone, written):
        conditions = alone(HERE, "llama", "full").conditions
        taken = conditions.own_core_seconds + conditions.seconds
        self.refused(
            written(conditions=conditions.model_copy(update={"busy_core_seconds": taken})), "r.json: others took"
        )

    def test_a_run_of_another_library(self, written):
        self.refused(written(versions={"paddleformers": "1.2.0"}), "r.json: its layers are of PaddleFormers")

    def test_an_older_record(self, written):
        self.refused(written(matmul_flops=[]), "without rates of matrix products")

    def test_data_that_are_gone(self, records, written, tmp_path):
        argv = [word if not word.startswith("--data=") else "--data=gone.json" for word in records["full"].argv]
        self.refused(written(argv=argv), "r.json: --data gone.json: no such file")

    def test_data_that_changed(self, records, written):
        self.refused(written(argv=[*records["full"].argv, "--plan-seed=7"]), "other batches here")

    def test_another_model(self, records, written):
        self.refused(written(argv=[*records["full"].argv, "--model=llama-13b-tiny"]), "another config here")

    def test_another_gpu(self, records, written):
        self.refused(written(), "--gpu h100: .* of a CPU", gpu="h100")
        self.refused(written(), "--link pcie4: .* of a CPU", link="pcie4")
        file = written(name="gpu.json", **of_hardware(records["full"], device="NVIDIA H200"))
        self.refused(file, "--gpu h100: .* of h200", gpu="h100")
        assert machine_of_records(HERE, file, "h200", "pcie5").link_name == "pcie5"
        unknown = written(name="unknown.json", **of_hardware(records["full"], device="NVIDIA T4"))
        self.refused(unknown, "NVIDIA T4 is none of the GPUs")

    def test_programs_refuse_in_one_line(self, tmp_path):
        script = f"{HERE}/finetune_full.py"
        said = refusal(run_program(script, "--model=llama-tiny", f"--calibrate={tmp_path}"))
        assert said == "finetune_full.py: --calibrate is for --plan; add it, or leave --calibrate out"
        said = refusal(run_program(script, "--model=llama-tiny", "--plan", f"--calibrate={tmp_path}"))
        assert said.startswith(f"finetune_full.py: --calibrate {tmp_path}: none of 0 record(s)")


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_a_record_is_rebuilt_as_it_ran(records, written, attention):
    """Its own flags may leave to defaults what follows the machine. On CPUs flash kernels take float32."""
    setup = records["full"].setup.model_copy(update={"attention": attention})
    argv = [*records["full"].argv, f"--attention={attention}"]
    file = written(argv=argv, setup=setup)
    run = rebuilt(file, read_record(file))
    for name in type(setup).model_fields:
        assert getattr(run.flags, name) == getattr(setup, name), name
    assert run.plan.sha256 == describe(run.flags)[2].sha256 == records["full"].plan.sha256


def test_each_record_of_a_folder_predicts_the_others(records, tmp_path):
    """Also in bytes of tensors, for which the runs are made again."""
    for method, record in records.items():
        (tmp_path / method).mkdir()
        record.write(tmp_path / method / "r.json")
    printed = run_program("benchmarks/calibration.py", tmp_path, "--tracked", check=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith(("| full", "| lora"))]
    assert len(lines) == 2
    assert "memory (max_memory_allocated): median error" in printed
    errors = [float(cell.strip().rstrip("%")) for line in lines for cell in line.split("|")[-3:-1]]
    assert max(errors) < 5
