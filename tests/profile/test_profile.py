"""--profile on both sides: real traces of one and two processes, what they tell, and that no figure changes by them."""

import csv
import gzip
import io
import json
import re
from dataclasses import replace

import pytest
from conftest import FRAMEWORKS, HERE, ROOT, refusal, run_program, train
from filelock import FileLock

from tunebench.record import KERNEL_KINDS, Shares, parse_record, read_record
from tunebench.report.profile import profile_rows, render_profiles
from tunebench.suite.file import find_suite, plan_runs, read_suite

LAYERS = 4  # of llama-tiny
PRODUCTS = 7 * LAYERS + 1  # of activations with weights: q, k, v, o, gate, up, down, and the head
MOST_OTHER = 0.01  # the share of kernels whose kind is not known
SECONDS = "seconds", "squared_lengths"


@pytest.fixture(scope="session")
def profiled(short, shared_folder):
    """A function that returns the record of a profiled run and its folder of traces. It runs once in a session."""

    def record(framework, method, *flags):
        folder = shared_folder / "profiles"
        out = folder / f"{framework}-{method}{''.join(flags)}.json"
        with FileLock(f"{shared_folder / out.stem}.lock"):
            if not out.exists():
                flags = ["--model=llama-tiny", *short, *flags, f"--profile={folder / 'traces'}"]
                train(framework, method, out, *flags, cwd=shared_folder)
        return read_record(out), folder / "traces"

    return record


def check_profile(record, traces):
    """Asserts what holds for each profile, and that its trace is one that Perfetto draws."""
    assert record.profile.steps == 2
    assert len(record.profile.ranks) == record.devices
    for rank, profile in enumerate(record.profile.ranks):
        shares = profile.shares.model_dump()
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["computing"] > 0.05
        assert shares["waiting_for_host"] > 0.001  # Python's
        assert set(profile.kinds) == set(KERNEL_KINDS)
        total = sum(profile.kinds.values())
        assert profile.kinds["other"] < MOST_OTHER * total
        for kind in ("matrix products", "attention", "norms", "elementwise", "loss", "optimizer", "copies"):
            assert 0 < profile.kinds[kind] < total * 0.95, kind
        # One thread computes; gloo has threads of its own on Torch's side.
        busy = total - profile.kinds["communication"]
        alone = shares["computing"] + shares["communication_hidden"] + shares["copies"]
        assert busy / profile.seconds == pytest.approx(alone, rel=0.05)
        seconds = [kernel.seconds for kernel in profile.longest]
        assert len(seconds) == 10
        assert seconds == sorted(seconds, reverse=True)
        assert all(kernel.calls >= 1 for kernel in profile.longest)
        assert profile.memory[0] == (0, 0)
        assert 24 < len(profile.memory) <= 50
        assert max(size for _, size in profile.memory) > 10**6
        assert profile.memory[-1][0] <= 2 * profile.seconds
        assert re.fullmatch(rf".*-rank{rank}\.json\.gz", profile.trace)
        check_layout(traces / profile.trace)


def check_layout(trace):
    """Asserts that a trace is Chrome's: numbers where numbers belong, and spans of a thread in one another."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    threads = {}
    for event in events:
        if event["ph"] != "X" or event["cat"] not in ("cpu_op", "user_annotation"):
            continue
        assert isinstance(event["ts"] + event["dur"] + event["tid"] + event["pid"], float)
        assert event["dur"] >= 0
        assert "[" not in event["name"]  # Paddle's own files have the duration there
        if not event["name"].startswith("gloo:"):
            threads.setdefault(event["tid"], []).append((event["ts"], -event["dur"]))
    for spans in threads.values():
        ends = []
        for start, negative in sorted(spans):
            while ends and ends[-1] <= start + 0.01:
                ends.pop()
            assert not ends or start - negative <= ends[-1] + 0.01, "two spans of a thread cross each other"
            ends.append(start - negative)


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_profile_tells_what_the_steps_did_and_changes_no_figure(profiled, short, tmp_path, framework):
    plain = train(framework, "full", tmp_path / "plain.json", "--model=llama-tiny", *short)
    record, traces = profiled(framework, "full")
    check_profile(record, traces)
    assert (record.plan, record.setup, record.model) == (plain.plan, plain.setup, plain.model)
    assert record.steps.model_dump(exclude=SECONDS) == plain.steps.model_dump(exclude=SECONDS)
    assert len(record.steps.seconds) == 10
    assert record.peak_memory_bytes[0] == pytest.approx(plain.peak_memory_bytes[0], rel=0.05)
    (profile,) = record.profile.ranks
    assert profile.shares.communication_alone == profile.shares.communication_hidden == 0
    products = {kernel.name: kernel.calls for kernel in profile.longest if kernel.kind == "matrix products"}
    expected = {"torch": {"aten::mm": 3 * PRODUCTS}, "paddle": {"matmul": PRODUCTS, "matmul_grad": PRODUCTS}}
    assert products.items() >= expected[framework].items()


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("framework", "method", "flags"), [("torch", "full", ["--zero=2"]), ("paddle", "lora", ["--nproc=2"])]
)
def test_each_of_two_processes_has_its_communication(profiled, framework, method, flags):
    record, traces = profiled(framework, method, *flags)
    check_profile(record, traces)
    for profile in record.profile.ranks:
        assert profile.shares.communication_alone + profile.shares.communication_hidden > 0.001
        assert profile.kinds["communication"] > 0
    assert len({profile.trace for profile in record.profile.ranks}) == 2


@pytest.mark.frameworks
def test_the_tables_have_both_sides_beside_each_other(profiled, shared_folder):
    records = [profiled(framework, "full")[0] for framework in FRAMEWORKS]
    text = run_program("summarize.py", shared_folder / "profiles", "--profile", check=True).stdout
    profiles = [record.profile.ranks[0] for record in reversed(records)]  # Paddle's first
    for title, profile in zip(("Paddle", "Torch"), profiles, strict=True):
        assert f"| 0    | {title:<6} | {profile.seconds:.3f}" in text
        assert f" {profile.shares.computing:.1%}" in text
        assert f"`{profile.longest[0].name}`, {profile.longest[0].kind}: {profile.longest[0].seconds:.3f} s" in text
    rows = json.loads(render_profiles(records, "json"))
    shares = [row for row in rows if row["part"] == "shares"]
    assert [row["name"] for row in shares] == list(Shares.model_fields)
    for side, profile in zip(("paddle", "torch"), profiles, strict=True):
        assert sum(row[side] for row in shares) == pytest.approx(1)
        assert {r["name"]: r[side] for r in rows if r["part"] == "kinds"} == profile.kinds
        assert [r[f"{side}_kernel"] for r in rows if r["part"] == "longest"] == [k.name for k in profile.longest]
    lines = list(csv.reader(io.StringIO(render_profiles(records, "csv"))))
    assert len(lines) == 1 + len(rows)
    one_side = profile_rows(records[:1])
    assert {row.paddle for row in one_side} == {None}
    assert all(row.torch is not None for row in one_side)


@pytest.mark.frameworks
def test_each_library_of_models_stands_beside_the_same_profile_of_torch(profiled):
    torch, paddle = (profiled(framework, "full")[0] for framework in FRAMEWORKS)
    formers = paddle.model_copy(update={"versions": {"paddleformers": "1.2.0"}})
    alone, both = profile_rows([torch, paddle]), profile_rows([formers, torch, paddle])
    assert [row for row in both if row.setup == "fp32"] == alone
    assert [replace(row, setup="fp32") for row in both if row.setup == "fp32, PaddleFormers"] == alone
    assert len(both) == 2 * len(alone)


def test_records_without_a_profile_say_how_to_get_one():
    lines = (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()
    older = [parse_record(line) for line in lines]
    assert {record.profile for record in older} == {None}
    assert render_profiles(older, "md") == "No record has a profile: run the scripts with --profile DIR."
    assert json.loads(render_profiles(older, "json")) == []


@pytest.mark.frameworks
def test_a_folder_that_cannot_be_used_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    script = f"{HERE}/finetune_full.py"
    for folder in (tmp_path / "file", tmp_path / "file" / "traces"):
        line = refusal(run_program(script, "--model=llama-tiny", "--profile", folder))
        assert line == f"finetune_full.py: --profile {folder}: {tmp_path / 'file'} is a file; name a folder"
    line = refusal(run_program(script, "--model=llama-tiny", "--profile", "/proc/traces"))
    assert line.startswith("finetune_full.py: --profile /proc/traces: ")  # root learns it by trying
    line = refusal(run_program(script, "--model=llama-tiny", "--plan", "--profile", tmp_path / "traces"))
    assert line == "finetune_full.py: --profile traces a run, and --plan starts none; leave one of them out"
    assert not (tmp_path / "traces").exists()
    line = refusal(run_program("summarize.py", tmp_path, "--profile", "--memory"))
    assert line == "summarize.py: --memory prints a table of its own; leave --profile out"


@pytest.mark.parametrize("aa", [False, True])
def test_the_runs_of_a_suite_leave_traces_of_different_names(tmp_path, aa):
    suite = tmp_path / "mini.toml"
    pair = '[[pair]]\nname = "{0}"\nscript = "finetune_{0}.py"\n'
    suite.write_text(
        f'title = "traced"\n[defaults]\nmodel = "llama-tiny"\nprofile = "{tmp_path}/traces"\n'
        + "".join(map(pair.format, ("full", "lora")))
    )
    found = find_suite(str(suite))
    runs = plan_runs(found, read_suite(found), tmp_path / "results", repeats=2, only=None, aa=aa)
    traces = {run.flags.profile / run.record.stem for run in runs}
    assert len(traces) == len(runs) == (16 if aa else 8)
    for run in runs:
        assert run.flags.profile == tmp_path / "traces" / run.record.parent.relative_to(tmp_path / "results")
        named = [word for word in run.argv if word.startswith("--profile")]
        assert named == [f"--profile={run.flags.profile}"]
