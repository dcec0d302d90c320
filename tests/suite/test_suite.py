"""The suite runner: what it writes, what it skips, and what is left when it or a run is killed."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from helpers import SUITE, finish_suite, refusal_of_suite, start_suite, wait_for

from tunebench import processes
from tunebench.record import read_record


def descendants(running: subprocess.Popen, program: str) -> list[psutil.Process]:
    """All processes that the runner started, or none while `program` is not among them."""
    found = psutil.Process(running.pid).children(recursive=True)
    return found if any(program in " ".join(process.cmdline()) for process in found) else []


@pytest.fixture
def mini(tmp_path):
    """A folder with a suite of its own."""
    (tmp_path / "mini.toml").write_text(SUITE)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("samples = 40", "samples = ", ["not TOML", "line 7"]),
        ('title = "two short pairs"', "", ["title: Field required"]),
        ('name = "lora"', 'name = "lora"\nspeed = 1', ["pair lora: speed: unknown key"]),
        ('name = "lora"', 'name = "../lora"', ["pair ../lora: name"]),
        ('name = "lora"', 'name = "full"', ["two pairs have the name full"]),
        ('name = "lora"', 'name = "lora.json"', ["a pair cannot be named lora.json"]),
        ('title = "two', 'repeats = 1001\ntitle = "two', ["repeats: Input should be less than or equal to 1000"]),
        ("finetune_lora", "finetune_lore", ["pair lora: script"]),
        ("samples = 40", "samples = 0", ["pair full (paddle): argument --samples: 0 is out of range"]),
        ("samples = 40", "sample = 40", ["pair full (paddle): unrecognized arguments: --sample=40"]),
        ("samples = 40", "samples = false", ["pair full (paddle): samples = false: --samples takes a value"]),
        ("samples = 40", "samples = [40]", ["defaults: samples: a flag is"]),
        ("samples = 40", '"samples=40" = true', ["defaults: 'samples=40' is no flag's name"]),
        ("samples = 40", 'out = "x.json"', ["defaults: out is no flag for a suite"]),
        ("steps = 20", "bsz = 3, micro-bsz = 2", ["pair lora (paddle): --micro-bsz 2 does not divide --bsz 3"]),
        ("recompute = true", 'data = "x.json"', ["pair lora (paddle): --data x.json: no such file"]),
    ],
)
def test_a_bad_suite_is_refused_in_one_line(mini, old, new, parts):
    assert old in SUITE
    (mini / "mini.toml").write_text(SUITE.replace(old, new))
    line = refusal_of_suite(mini)
    assert all(part in line for part in [str(mini / "mini.toml"), *parts]), line


def test_bad_arguments_are_refused_in_one_line(mini):
    assert (
        "no such suite; use a100x4, a100x4-as-published, a100x4-options, calibration, cpu, gpu1-24g, gpu1-80g, h100x8, "
        "parity, " in refusal_of_suite(mini, "--suite=gpus")
    )
    assert "fits none of full/paddle, full/torch, lora/paddle, lora/torch" in refusal_of_suite(mini, "--only=llama*")
    assert "--repeats: 0 is out of range" in refusal_of_suite(mini, "--repeats=0")
    assert "--repeats 1001: use at most 1000" in refusal_of_suite(mini, "--repeats=1001")
    assert "--plan and --aa do not go together" in refusal_of_suite(mini, "--plan", "--aa")
    assert "--check and --fresh do not go together" in refusal_of_suite(mini, "--check", "--fresh")
    assert "--out /dev/null is no regular file" in refusal_of_suite(mini, "--plan", "--out=/dev/null")
    (mini / "published.toml").write_text(SUITE)
    assert "published cannot name a folder" in refusal_of_suite(mini, f"--suite={mini / 'published.toml'}")


PAIRED = [file for file in sorted((ROOT / "suites").glob("*.toml")) if not file.stem.startswith("peers")]


@pytest.mark.parametrize("file", PAIRED, ids=lambda file: file.stem)
def test_the_suites_are_valid_and_alternate(mini, file):
    printed = finish_suite(start_suite(mini, f"--suite={file.stem}", "--repeats=3", "--dry-run"), 0)
    names = [line.split(" r")[0] for line in printed.splitlines() if not line.startswith(" ")]
    third = len(names) // 3
    first, second, last = names[:third], names[third : 2 * third], names[2 * third :]
    assert [name.split("/")[1] for name in first] == ["paddle", "torch"] * (third // 2)
    assert all(a.split("/")[0] == b.split("/")[0] for a, b in zip(first[::2], first[1::2], strict=True))
    assert (second, last) == (first[::-1], first)
    seeds = [re.findall("--plan-seed=([0-9]+)", line) for line in printed.splitlines() if line.startswith(" ")]
    assert seeds == [[]] * third + [["1"]] * third + [["2"]] * third
    assert not (mini / "results").exists()


def test_a_suite_has_its_own_rounds_and_expects_its_minutes(mini):
    (mini / "mini.toml").write_text("repeats = 3\nminutes = 7" + SUITE)
    assert " r3" in finish_suite(start_suite(mini, "--dry-run"), 0)
    assert " r3" not in finish_suite(start_suite(mini, "--dry-run", "--repeats=2"), 0)
    running = start_suite(mini)
    wait_for(lambda: descendants(running, "finetune_full"))
    running.send_signal(signal.SIGTERM)
    assert "runs: 12, done already: 0\nexpected: about 21 minutes" in finish_suite(running, 130)


def published_rows() -> list[tuple[str, str, str]]:
    """Model, method and setup of each row of the published record, as the suite's pairs name them."""
    multi = [
        *(("llama-tiny", f"bsz{bsz}-{split}") for bsz in (8, 16) for split in ("mp4", "zero3", "zero2")),
        *(("llama-13b-tiny", f"bsz8-{split}") for split in ("mp4-recompute", "zero3", "zero2")),
        *(("bloom-tiny", f"bsz{bsz}-{split}") for bsz in (8, 16) for split in ("mp4", "zero3")),
    ]
    alone = [("bloom-tiny", "bsz4"), ("llama-tiny", "bsz4"), ("llama-13b-tiny", "bsz8-recompute")]
    return [(model, "full", setup) for model, setup in multi] + [(model, "lora", setup) for model, setup in alone]


def test_the_default_suite_has_every_published_row(mini):
    printed = finish_suite(start_suite(mini, "--suite=cpu", "--dry-run"), 0)
    assert {line.split("/")[0] for line in printed.splitlines() if not line.startswith(" ")} == {
        "-".join(row) for row in published_rows()
    }
    for model, method, setup in published_rows():
        command = next(line for line in printed.splitlines() if f"{model}-{method}-{setup}/torch-r1.json" in line)
        parts = setup.split("-")
        assert f"finetune_{method}.py" in command
        assert f"--model={model} " in command
        assert f"--bsz={parts[0].removeprefix('bsz')} " in command
        assert ("--mp=4 " in command) == ("mp4" in parts)
        assert ("--recompute " in command) == ("recompute" in parts)
        for zero in (2, 3):
            assert (f"--zero={zero} " in command) == (f"zero{zero}" in parts)
        assert f"--nproc={1 if method == 'lora' else 4} " in command


def test_ending_a_process_ends_all_that_it_started(tmp_path):
    """One grandchild in a session of its own, one that ignores SIGTERM, and one whose parent is gone."""
    ready = tmp_path / "ready"
    child = f"""
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
deaf = [sys.executable, "-c", "import signal, time; signal.signal(15, 1); print(1, flush=True); time.sleep(60)"]
ones = [subprocess.Popen(sleep, start_new_session=True, stdout=-1), subprocess.Popen(deaf, stdout=-1)]
for one in ones: one.stdout.readline()
orphan = subprocess.Popen(["sh", "-c", "sleep 60 >/dev/null & echo $!"], stdout=-1, text=True).stdout.readline()
open({str(ready)!r}, "w").write(" ".join([*(str(one.pid) for one in ones), orphan.strip(), "."]))
time.sleep(60)
"""
    process = processes.start([sys.executable, "-c", child])
    wait_for(lambda: ready.exists() and ready.read_text().endswith("."))
    others = [psutil.Process(int(pid)) for pid in ready.read_text().split()[:-1]]
    started = time.monotonic()
    processes.end(process, patience=1)
    assert process.returncode == -signal.SIGTERM
    assert not psutil.wait_procs(others, timeout=2)[1]
    assert 1 <= time.monotonic() - started < 5


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """Two rounds of one pair: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "mini.toml").write_text(SUITE)
    return folder, finish_suite(start_suite(folder, "--repeats=2", "--only=full/*"), 0)


@pytest.mark.frameworks
class TestRounds:
    def test_files_and_records(self, rounds):
        folder, printed = rounds
        results = folder / "results" / "mini"
        names = [f"full/{framework}-r{number}" for framework in ("paddle", "torch") for number in (1, 2)]
        files = {str(file.relative_to(results)) for file in results.rglob("*") if file.is_file()}
        assert files == {name + end for name in names for end in (".json", ".log")}
        records = {name: read_record(results / f"{name}.json") for name in names}
        for name, record in records.items():
            assert record.status == "ok"
            assert record.framework in name
            flags = ["--steps=4", "--warmup-steps=1", "--bsz=2", "--samples=40", "--model=llama-tiny"]
            flags += ["--plan-seed=1"] * name.endswith("-r2")
            assert record.argv == ["finetune_full.py", *flags, f"--out={results / name}.json"]
            assert len(record.steps.seconds) == 4
            log = (results / f"{name}.log").read_text()
            assert log.count("effective tokens/s\n") == 4
            assert f"{record.effective_tokens_per_second:.0f} effective tokens/s over 3 timed steps" in printed
        assert len({record.plan.drawn_from for record in records.values()}) == 1
        plans = [records[f"full/{framework}-r{n}"].plan.sha256 for n in (1, 2) for framework in ("paddle", "torch")]
        assert plans[0] == plans[1] != plans[2] == plans[3]

    def test_the_order_is_abba(self, rounds):
        folder, printed = rounds
        records = [read_record(file) for file in (folder / "results").rglob("*.json")]
        order = [record.framework for record in sorted(records, key=lambda record: record.started_at)]
        assert order == ["paddle", "torch", "torch", "paddle"]
        ends = [line.split(":")[0] for line in printed.splitlines() if ": ok, " in line]
        assert ends == [
            f"[{i}/4] full/{name}" for i, name in enumerate(("paddle r1", "torch r1", "torch r2", "paddle r2"), 1)
        ]

    def test_a_second_call_skips_what_is_done_and_a_change_runs_again(self, rounds):
        folder, _ = rounds
        results = folder / "results" / "mini" / "full"
        before = {file: file.stat().st_mtime_ns for file in results.iterdir()}
        (results / ".torch-r1.json.abc").write_text("{")  # left by a run killed while it wrote
        printed = finish_suite(start_suite(folder, "--repeats=2", "--only=full/*"), 0)
        assert "runs: 4, done already: 4" in printed
        assert "done already: full/torch r2: ok, " in printed
        assert "llama-tiny" in printed.split("| Model")[1]  # the tables are printed nevertheless
        assert before == {file: file.stat().st_mtime_ns for file in results.iterdir()}

        (folder / "mini.toml").write_text(SUITE.replace('"finetune_full.py"', '"finetune_full.py"\npaddle={lr=2e-4}'))
        (results / "paddle-r2.json").write_text("{}")
        printed = finish_suite(start_suite(folder, "--repeats=2", "--only=full/*"), 0)
        assert "runs: 4, done already: 2" in printed
        assert "full/paddle r1: again, since its flags changed" in printed
        assert "full/paddle r2: again, since its record is broken" in printed
        after = {file: file.stat().st_mtime_ns for file in results.iterdir()}
        assert {file.stem for file in before if before[file] != after[file]} == {"paddle-r1", "paddle-r2"}
        assert "--lr=0.0002" in read_record(results / "paddle-r1.json").argv
        (previous,) = (folder / "results" / ".previous").iterdir()
        assert "--lr=0.0002" not in read_record(previous / "full" / "paddle-r1.json").argv
        assert (previous / "full" / "paddle-r2.json").read_text() == "{}"


@pytest.mark.frameworks
def test_each_side_against_itself(mini):
    printed = finish_suite(start_suite(mini, "--aa", "--repeats=2", "--only=full/torch"), 0)
    folder = mini / "results" / "mini" / "aa" / "full"
    files = [folder / f"torch-{side}-r{number}.json" for side in "ab" for number in (1, 2)]
    assert sorted(folder.glob("*.json")) == files
    records = sorted(map(read_record, files), key=lambda record: record.started_at)
    assert [record.aa for record in records] == ["a", "b", "b", "a"]
    a, b = (statistics.geometric_mean(r.effective_tokens_per_second for r in records if r.aa == s) for s in "ab")
    *_, line = (line for line in printed.splitlines() if line.startswith("| llama-tiny | Finetune | 1 "))
    assert f"| torch, fp32 | {b / a - 1:+.1%} " in " ".join(line.split())
    assert "Noise: the rounds of a side" in printed or "| disturbed: torch: others took " in printed
    assert "Speedup |" not in printed  # they are not rounds of a pair
    printed = finish_suite(start_suite(mini, "--aa", "--repeats=2", "--only=full/torch"), 0)
    assert "runs: 4, done already: 4" in printed


@pytest.mark.frameworks
def test_killed_and_interrupted_then_gone_on_with(mini):
    """A run is killed and the suite continues. It is interrupted in the next run. A second call does the rest."""
    results = mini / "results" / "mini"
    running = start_suite(mini, "--only=*/torch", "--fresh")
    child = wait_for(lambda: descendants(running, "finetune_full.py"))[0]
    assert "PYTHONPATH" not in child.environ()
    assert os.getsid(child.pid) == child.pid
    child.kill()
    wait_for(lambda: (results / "lora" / "torch-r1.log").exists() and descendants(running, "finetune_lora.py"))

    second = start_suite(mini, "--suite=quick")  # any other suite: suites share the machine
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert errors.startswith(f"run_all.sh: {mini / 'results'} is in use by process {running.pid} (run_all.sh --suite=")
    assert errors.endswith("; wait for it, since two would slow each other\n")
    assert errors.count("\n") == 1

    wait_for(lambda: "step 2/20" in (results / "lora" / "torch-r1.log").read_text())
    started = descendants(running, "finetune_lora.py")
    running.send_signal(signal.SIGINT)
    printed = finish_suite(running, 130)
    assert not [process for process in started if process.is_running()]
    assert "[1/2] full/torch r1: failed: killed by SIGKILL (9)" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("interrupted with 0 of 2 runs done; `bash run_all.sh --suite=")
    assert last.endswith("mini.toml --anyway '--only=*/torch'` goes on from here")
    failed = read_record(results / "full" / "torch-r1.json")
    assert (failed.status, failed.reason) == ("failed", "killed by SIGKILL (9)")
    assert failed.argv[0] == "finetune_full.py"
    assert failed.setup.bsz == 2
    assert "torch" in failed.versions
    assert not (results / "lora" / "torch-r1.json").exists()

    printed = finish_suite(start_suite(mini, "--only=*/torch"), 0)
    assert "full/torch r1: again, since it ended as failed" in printed
    assert read_record(results / "full" / "torch-r1.json").status == "ok"
    assert read_record(results / "lora" / "torch-r1.json").setup.recompute
    assert read_record(next((mini / "results" / ".previous").rglob("torch-r1.json"))) == failed


@pytest.mark.frameworks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_the_runner(mini, number):
    """The runner ends while a run has a child of its own, data/prepare.py."""
    running = start_suite(mini, TUNEBENCH_CACHE=str(mini / "cache"))
    started = wait_for(lambda: descendants(running, "prepare.py"))
    assert len(started) >= 2
    running.send_signal(number)
    finish_suite(running, -number if number == signal.SIGKILL else 130)
    assert not psutil.wait_procs(started, timeout=3)[1]
    assert not list((mini / "results").rglob("*.json"))


@pytest.mark.frameworks
def test_a_run_that_does_not_end_well_is_named_and_fresh_moves_it(mini):
    (mini / "mini.toml").write_text(SUITE.replace("steps = 4\n", "steps = 400\ntimeout = 1\n"))
    printed = finish_suite(start_suite(mini, "--only=full/paddle"), 1)
    assert printed.splitlines()[-2].startswith("1 of 1 runs did not end well")
    assert printed.splitlines()[-1].startswith("  full/paddle r1: timeout: not done within --timeout 1 s")
    record = mini / "results" / "mini" / "full" / "paddle-r1.json"
    old = json.loads(record.read_text())
    printed = finish_suite(start_suite(mini, "--only=full/paddle", "--fresh"), 1)
    assert "again, since" not in printed
    (moved,) = (mini / "results" / ".previous").rglob("paddle-r1.json")
    assert json.loads(moved.read_text()) == old
    assert moved.with_suffix(".log").exists()
