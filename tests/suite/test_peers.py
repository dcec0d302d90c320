"""Peers for real: PaddleNLP's Trainer beside the script, as a suite runs them; every peer on the script's batches.

A peer whose environment is not complete is skipped. run_tests.sh makes torch and paddle alone.
"""

import subprocess
import sys

import pytest
from conftest import refusal, run_program, train
from helpers import finish_suite, refusal_of_suite, start_suite

from tunebench.errors import BadInput
from tunebench.peers import PEERS, check_environment, has_environment
from tunebench.record import read_record
from tunebench.report.page import combined

pytestmark = pytest.mark.frameworks
SUITE = """
title = "PaddleNLP's Trainer beside the script"
[defaults]
model = "llama-tiny"
samples = 24
bsz = 4
steps = 6
warmup-steps = 2
paired-halves = false
[[contest]]
name = "everything"
script = "finetune_full.py"
[[contestant]]
name = "plain"
framework = "paddle"
[[contestant]]
peer = "paddlenlp-trainer"
"""


# A layer, since the tests take one thread of a busy machine.
JOB = (
    *("--model=llama-tiny", "--layers=1", "--samples=12", "--bsz=4", "--steps=3", "--warmup-steps=1"),
    "--no-paired-halves",
)
ON_THE_PLAN = [name for name, peer in PEERS.items() if not peer.packed and name != "hf-trainer-grouped"]


@pytest.fixture
def mini(tmp_path):
    """A folder with a suite of its own."""
    (tmp_path / "mini.toml").write_text(SUITE)
    return tmp_path


def test_a_peer_gets_the_batches_of_the_script_and_the_same_losses(mini):
    printed = finish_suite(start_suite(mini), 0)
    folder = mini / "results" / "mini" / "everything"
    ours, peer = (read_record(folder / f"{name}-r1.json") for name in ("plain", "paddlenlp-trainer"))
    assert (ours.peer, peer.peer, peer.status) == (None, "paddlenlp-trainer", "ok")
    assert peer.plan == ours.plan
    for name in ("effective_tokens", "padded_tokens", "label_tokens", "squared_lengths"):
        assert getattr(peer.steps, name) == getattr(ours.steps, name)
    assert peer.steps.loss == pytest.approx(ours.steps.loss, rel=1e-3)
    assert peer.versions["paddlenlp"] == ours.versions["paddlenlp"]
    assert "### Paddle, llama-tiny, Finetune, 24 samples: beside other trainers" in printed
    assert printed.count("| paddlenlp-trainer") == 1  # one table per round, not per run
    assert "runs: 2, done already: 2" in finish_suite(start_suite(mini), 0)
    alone = combined([peer])
    assert alone.startswith("### Paddle, llama-tiny, Finetune, 24 samples: beside other trainers")
    assert "Noise: not measured" not in alone


@pytest.fixture(scope="module")
def of_script(tmp_path_factory):
    """Gives the record of a framework's script on `JOB`, by framework and method. Each runs once."""
    folder, records = tmp_path_factory.mktemp("scripts"), {}

    def get(framework, method):
        if (framework, method) not in records:
            out = folder / f"{framework}-{method}.json"
            records[framework, method] = train(framework, method, out, *JOB, env={"OMP_NUM_THREADS": "1"})
        return records[framework, method]

    return get


# The suite above runs PaddleNLP's Trainer with all parameters.
@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for method in ("full", "lora")
        for name in ON_THE_PLAN
        if (name, method) != ("paddlenlp-trainer", "full")
    ],
)
def test_each_peer_on_the_plan_has_the_losses_of_the_script(name, method, of_script, tmp_path):
    peer = PEERS[name]
    try:
        check_environment(peer.environment)
    except BadInput as missing:
        pytest.skip(str(missing))
    out = tmp_path / "peer.json"
    arguments = f"--peer={name}", f"--method={method}", *JOB, f"--out={out}"
    run_program("peers/run_peer.py", *arguments, check=True, env={"OMP_NUM_THREADS": "1"})
    ours, record = of_script(peer.framework, method), read_record(out)
    assert (record.plan, record.model.trainable_parameters) == (ours.plan, ours.model.trainable_parameters)
    for each in ("effective_tokens", "label_tokens", "squared_lengths"):
        assert getattr(record.steps, each) == getattr(ours.steps, each)
    unit = {"llamafactory": 8, "axolotl": 64}.get(name, 1)
    widths = [-(-padded // 4 // unit) * unit for padded in ours.steps.padded_tokens]
    padded = [4 * width for width in widths]
    assert record.steps.padded_tokens == (ours.steps.effective_tokens if peer.padding_free else padded)
    # Adapters change nothing before the first update. Then the losses differ by their random start.
    assert record.steps.loss[0] == pytest.approx(ours.steps.loss[0], rel=1e-6)
    assert record.steps.loss == pytest.approx(ours.steps.loss, rel=1e-5 if method == "full" else 1e-3)
    if any(record.steps.grad_norm) and method == "full":
        assert record.steps.grad_norm[0] == pytest.approx(ours.steps.grad_norm[0], rel=1e-3)
    elif any(record.steps.grad_norm):
        # It is proportional to alpha ÷ rank, which is 4, and to the random start: 0.9 to 1.7 × ours in nine tries.
        assert 0.4 < record.steps.grad_norm[0] / ours.steps.grad_norm[0] < 2.5


def test_a_peer_that_overruns_its_time_is_ended(mini):
    (mini / "mini.toml").write_text(SUITE.replace("samples = 24", "samples = 24\ntimeout = 2"))
    finish_suite(start_suite(mini, "--only=*/paddlenlp-trainer"), 1)
    record = read_record(mini / "results" / "mini" / "everything" / "paddlenlp-trainer-r1.json")
    assert (record.status, record.reason) == ("timeout", "not ended after --timeout 2 s")


def test_a_suite_makes_the_environments_that_its_peers_lack(mini):
    """Here setup.sh refuses to start, since the Python to build with is missing."""
    if has_environment("torchtune"):
        pytest.skip("the environment of torchtune is complete")
    (mini / "mini.toml").write_text(SUITE.replace("paddlenlp-trainer", "torchtune"))
    suite = start_suite(mini, PYTHON="/nonexistent/python")
    try:
        _, errors = suite.communicate(timeout=300)  # another set-up may hold the lock
    finally:
        suite.kill()
    assert suite.returncode == 2
    assert "PYTHON=/nonexistent/python is no Python" in errors
    assert "setup.sh failed for torchtune (its messages are above)" in errors.splitlines()[-1]
    assert not (mini / "results" / "mini").exists()
    checked = finish_suite(start_suite(mini, "--check"), 0)
    assert "note   .venv/torchtune: not complete; the suite sets it up before its first run" in checked


def test_contestants_run_in_reverse_in_even_rounds():
    command = [sys.executable, "-P", "-m", "tunebench.suite.runner", "--suite=peers", "--repeats=2", "--dry-run"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    names = [line.split(" ") for line in printed.splitlines() if not line.startswith(" ")]
    half = len(names) // 2
    assert {name for name, _ in names} == {
        f"{contest}/{contestant}"
        for contest in ("full", "lora")
        for contestant in (*PEERS, "torch-parity", "torch-tuned", "paddle-parity", "paddle-tuned")
    }
    assert [name for name, _ in names[half:]] == [name for name, _ in reversed(names[:half])]
    assert [number for _, number in names] == ["r1"] * half + ["r2"] * half
    assert printed.count("run_peer.py --peer=hf-trainer --method=lora") == 2


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('peer = "paddlenlp-trainer"', 'peer = "speedy"', "contestant 2: peer 'speedy': use one of hf-trainer, "),
        (
            'peer = "paddlenlp-trainer"',
            'peer = ["torchtune"]',
            "contestant 2: peer ['torchtune']: use one of hf-trainer, ",
        ),
        ('peer = "paddlenlp-trainer"', 'peer = "torchtune"\nframework = "torch"', "framework: a peer has its own"),
        ('name = "plain"', "", "contestant 1: name: Field required"),
        ('name = "plain"', 'name = "paddlenlp-trainer"', "two contestants have the name paddlenlp-trainer"),
        ("[[contest]]", "[[pair]]", "a suite has [[pair]] tables, or [[contest]] and [[contestant]] tables"),
        ("paired-halves = false", "", "(paddlenlp-trainer): peers draw the batches of one pass over the samples"),
        ("samples = 24", "samples = 24\ntuned = true", "(paddlenlp-trainer): --tuned: peers do not follow it"),
    ],
)
def test_a_bad_suite_of_contestants_is_refused_in_one_line(mini, old, new, part):
    assert old in SUITE
    (mini / "mini.toml").write_text(SUITE.replace(old, new))
    assert part in refusal_of_suite(mini)


def test_what_peers_do_not_do_is_refused_in_one_line(mini):
    assert "has contestants, which have no sides" in refusal_of_suite(mini, "--aa")
    peer = "peers/run_peer.py", "--peer=paddlenlp-trainer"
    assert "--nproc: peers do not follow it" in refusal(
        run_program(*peer, "--nproc=2", "--zero=2", "--no-paired-halves")
    )
    assert "use --no-paired-halves" in refusal(run_program(*peer))
    assert "use llama-tiny or llama-65b-tiny" in refusal(run_program(*peer, "--model=bloom-tiny", "--no-paired-halves"))
    assert "--peer" in refusal(run_program("peers/run_peer.py", "--peer=speedy"))
    assert "unrecognized arguments: --speed" in refusal(run_program(*peer, "--speed"))
