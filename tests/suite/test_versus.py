"""run_all.sh --versus, two checkouts or two environments in one series, and --until, rounds as needed."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import FRAMEWORKS, HERE, ROOT, run_program
from helpers import SUITE, finish_suite, record, refusal_of_suite, start_suite, wait_for

from tunebench import bootstrap
from tunebench.checkout import read_git
from tunebench.errors import BadInput
from tunebench.record import read_record
from tunebench.report.pairing import SIDES, join
from tunebench.report.regressions import exit_code, regressions
from tunebench.report.remarks import until_in_words
from tunebench.report.rounds import beside, pair_rounds
from tunebench.report.stats import LOOKS, is_narrow
from tunebench.suite.other import find_other
from tunebench.suite.versus import check_code

LONGER = SUITE.replace("steps = 4\n", "steps = 12\n")  # the fewer the steps, the more rates scatter


@pytest.fixture
def mini(tmp_path):
    """A folder with a suite of its own."""
    (tmp_path / "mini.toml").write_text(SUITE)
    return tmp_path


def python_with(folder, *frameworks: str):
    """A Python of its own that has the packages of these environments, without tunebench."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (own,) = folder.glob("lib/python3*/site-packages")
    packages = [str(next((ROOT / ".venv" / name).glob("lib/python3*/site-packages"))) for name in frameworks]
    (own / "packages.pth").write_text("\n".join(packages))
    return folder / "bin" / "python"


def checkout(folder, monkeypatch):
    """A copy of this checkout that has its packages, as benchmarks/slowed.py makes it."""
    with monkeypatch.context() as patch:
        for name in bootstrap.UNWANTED:  # the program would start anew without them
            patch.delenv(name, raising=False)
        patch.setattr(sys, "path", [*sys.path])
        slowed = runpy.run_path(str(ROOT / "benchmarks" / "slowed.py"))
    slowed["copy_checkout"](folder)
    for framework in FRAMEWORKS:
        slowed["borrow_environment"](folder, framework)
    return folder


def test_what_versus_does_not_take(mini):
    def refused(other: object) -> str:
        with pytest.raises(BadInput) as fault:
            find_other(str(other))
        return str(fault.value)

    assert "no such folder or Python; name another checkout's folder, or an interpreter" in refused(mini / "none")
    assert "is this checkout; name another one" in refused(ROOT)
    assert "no checkout of this project, for want of setup.sh; name the folder of another checkout" in refused(mini)
    assert "no Python that answers" in refused("/bin/false")
    bare = python_with(mini / "bare")
    assert f"{bare} has none of paddle, torch; name an interpreter with the packages of one framework" in refused(bare)
    assert f"name its Python: --versus {bare}" in refused(mini / "bare")
    own = ROOT / ".venv" / HERE / "bin" / "python"
    assert f"is this checkout's own Python of {HERE}; name another" in refused(own)


@pytest.mark.frameworks
def test_flags_that_do_not_go_with_versus_and_until(mini):
    other = f"--versus={python_with(mini / 'same', 'torch')}"
    for arguments, words in (
        (["--versus=none"], "--versus none: no such folder or Python"),
        ([other, "--repeats=3"], "with --repeats 3: odd rounds start with the old side"),
        ([other, "--until=3%"], "--versus and --until do not go together"),
        ([other, "--only=*/paddle"], "--only */paddle fits no run of torch, which --versus names"),
        (["--versus="], "--versus: the path is empty"),
        (["--threshold=3%"], "--threshold is for --versus"),
        (["--until=3"], "--until: 3 is no share; use one above 0% and below 100%"),
        (["--until=3%", "--repeats=4"], "--until and --repeats do not go together"),
        (["--until=3%", "--only=full/torch"], "--until needs both sides of a pair"),
    ):
        assert words in refusal_of_suite(mini, *arguments)


@pytest.mark.frameworks
def test_an_interpreter_with_both_frameworks_or_another_tunebench_is_refused(mini, monkeypatch):
    both = python_with(mini / "both", *FRAMEWORKS)
    assert "has both paddle and torch; name an interpreter" in refusal_of_suite(mini, f"--versus={both}")
    other = mini / "other"
    subprocess.run(["git", "clone", "--quiet", ROOT, other], check=True)
    mixed = python_with(mini / "mixed", "torch")
    (own,) = (mini / "mixed").glob("lib/python3*/site-packages")
    (own / "tunebench").symlink_to(other / "tunebench")
    line = refusal_of_suite(mini, f"--versus={mixed}")
    assert f"has the tunebench of {other}; name that folder: --versus {other}" in line
    # A program of this checkout uses its own code there.
    (other / "tunebench" / "flags.py").write_text("raise SystemExit('other code')")
    environment = os.environ | {"TUNEBENCH_TORCH": str(mixed)}
    command = [mixed, ROOT / "torch" / "finetune_full.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_runs_of_another_commit_and_changes_that_are_none_of_the_code(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    kept = read_git(clone)
    for name in ("report.html", "docs/page.md", "results/measured/x/a.json", "traces/a.json"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("other")
    assert read_git(clone) == kept and not kept.dirty
    known = record(git=kept)
    check_code(known, clone)
    (clone / "tunebench" / "new.py").write_text("x = 1")
    assert read_git(clone).dirty
    with pytest.raises(BadInput, match=f"a run of {clone} used revision 0000000000, and that folder has"):
        check_code(known.model_copy(update={"git": kept.model_copy(update={"revision": "0" * 40})}), clone)


def test_the_order_of_old_and_new(mini):
    """Old first in odd rounds, new first in even ones, next to each other; each round has its own batches."""
    other = python_with(mini / "nightly", HERE)
    printed = finish_suite(start_suite(mini, f"--versus={other}", "--dry-run"), 0)
    lines = printed.splitlines()
    rows = [f"full/{HERE}", f"lora/{HERE}"]
    odd = [f"{row} {side}" for row in rows for side in ("old", "new")]
    expected = [f"{name} r{n}" for n in range(1, 7) for name in (odd if n % 2 else odd[::-1])]
    assert lines[::2] == expected
    for name, command in zip(expected, lines[1::2], strict=True):
        row, side, number = re.fullmatch(r"(\w+)/\w+ (\w+) r(\d)", name).groups()
        python = other if side == "old" else ROOT / ".venv" / HERE / "bin" / "python"
        assert command.split()[:2] == [str(python), str(ROOT / HERE / f"finetune_{row}.py")]
        assert command.endswith(f"results/mini/versus-nightly/{row}/{HERE}+{side}-r{number}.json")
        assert ("--plan-seed=" in command) == (number != "1")
    assert not (mini / "results").exists()


@pytest.mark.frameworks
def test_a_slower_checkout_for_real(tmp_path):
    """Both checkouts run, and the verdict follows from their records.

    Other tests run beside this one, so that the rounds may count as disturbed.
    """
    (tmp_path / "mini.toml").write_text(LONGER)
    env = {"TUNEBENCH_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    arguments = [f"--suite={tmp_path / 'mini.toml'}", "--only=full/torch", "--repeats=2", "--anyway", "--slower=60%"]
    folder = tmp_path / "results" / "slowed" / "mini" / f"versus-{ROOT.name}"
    command = [sys.executable, ROOT / "benchmarks" / "slowed.py", *arguments]
    running = subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "full" / "torch+new-r1.log").exists())
    running.terminate()
    assert "interrupted with 1 of 4 runs done" in finish_suite(running, 130)
    done = run_program("benchmarks/slowed.py", *arguments, env=env)
    assert "runs: 4, done already: 1" in done.stdout
    names = [f"full/torch+{side}-r{number}.json" for side in ("new", "old") for number in (1, 2)]
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.json")) == names, done.stdout + done.stderr
    records = [read_record(folder / name) for name in names]
    assert [record.status for record in records] == ["ok"] * 4
    order = sorted(records, key=lambda record: record.started_at)
    assert [re.search(r"\+(.*)-", record.argv[-1])[1] for record in order] == ["old", "new", "new", "old"]
    assert "new" in done.stdout and records[0].git.changes != records[2].git.changes == records[3].git.changes
    assert records[0].plan.sha256 == records[2].plan.sha256 != records[1].plan.sha256
    (row,) = found = regressions(records)
    assert done.returncode == exit_code(found)
    # A row alone has one degree of freedom here, so that the fall of 60% need not be sure.
    assert row.new_effective_tokens_per_second < 0.75 * row.old_effective_tokens_per_second
    if row.verdict == "not comparable":
        assert (done.returncode, row.reason[:17]) == (2, "disturbed: torch:")
    assert f"| {row.verdict} " in done.stdout
    by_json = json.loads(run_program("summarize.py", folder, "--format=json", check=True).stdout)
    assert [each["verdict"] for each in by_json] == [row.verdict]
    done = run_program("benchmarks/slowed.py", *arguments, env=env)  # another copy of the same content
    assert "runs: 4, done already: 4" in done.stdout
    assert done.returncode == exit_code(found)


@pytest.mark.frameworks
def test_records_that_this_checkout_cannot_read_are_refused(mini, monkeypatch):
    other = checkout(mini / "newer", monkeypatch)
    code = (other / "tunebench" / "record.py").read_text()
    assert code.count("schema_: Literal[1]") == 1
    (other / "tunebench" / "record.py").write_text(code.replace("schema_: Literal[1]", "schema_: Literal[2]"))
    code = (other / "tunebench" / "run" / "run.py").read_text()
    (other / "tunebench" / "run" / "run.py").write_text(code.replace('"schema": 1,', '"schema": 2,'))
    running = start_suite(mini, f"--versus={other}", "--only=full/torch", "--repeats=2")
    printed, errors = running.communicate(timeout=300)
    assert running.returncode == 2, printed + errors
    record = mini / "results" / "mini" / "versus-newer" / "full" / "torch+old-r1.json"
    assert errors.splitlines()[-1].startswith(
        f"run_all.sh: --versus {other}: this checkout cannot read its records; name one whose records it reads: "
        f"{record}: not a record: schema: "
    )
    assert json.loads(record.read_text())["schema"] == 2
    assert f"old: {other}, revision " in printed and f"new: {ROOT}, revision " in printed
    # Against another checkout of the same name, the series would mix.
    (mini / "elsewhere").mkdir()
    other.rename(mini / "elsewhere" / "newer")
    running = start_suite(mini, f"--versus={mini / 'elsewhere' / 'newer'}", "--only=full/torch")
    errors = running.communicate(timeout=60)[1]
    assert running.returncode == 2
    assert f"versus-newer has runs against {other}; move them away by --fresh" in errors


@pytest.mark.frameworks
def test_rounds_are_added_until_the_interval_is_narrow(mini):
    """It goes on from rounds that were measured without --until, and each look decides by the records."""
    (mini / "mini.toml").write_text(LONGER)
    finish_suite(start_suite(mini, "--repeats=2", "--only=full/*"), 0)
    # A busy machine adds rounds: ratios that scatter by less than 33% need four.
    printed = finish_suite(start_suite(mini, "--until=99%", "--only=full/*"), 0, seconds=1200)
    assert "--until 99%: rounds 1 to 4 of full\nruns: 8, done already: 4" in printed
    folder = mini / "results" / "mini" / "full"
    last = len(list(folder.glob("torch-r*.json")))
    sides = {name: [read_record(folder / f"{name}-r{n}.json") for n in range(1, last + 1)] for name in SIDES}
    assert last in LOOKS
    for records in sides.values():
        assert [record.until for record in records] == [None] * 2 + [0.99] * (last - 2)
        assert all("--until=99%" in record.argv for record in records[2:])
    for look in LOOKS[: LOOKS.index(last) + 1]:
        rounds = pair_rounds(*(records[:look] for records in sides.values()), beside)
        narrow = is_narrow(rounds.log_ratios, 0.99)
        assert narrow == (look == last) or look == LOOKS[-1]
        assert f"full: {until_in_words(0.99, narrow, len(rounds.pairs))}\n" in printed
    (row,) = join([*sides["paddle"], *sides["torch"]])
    assert (row.rounds, row.until) == (len(rounds.pairs), 0.99)
    assert f"{until_in_words(0.99, narrow, row.rounds)}; the interval is widened for that" in row.note
    printed = finish_suite(start_suite(mini, "--until=99%", "--only=full/*"), 0)
    assert "runs: 8, done already: 8" in printed
    assert "starts, log:" not in printed
