"""Peers for real: PaddleNLP's Trainer beside the script, as a suite runs them."""

import subprocess
import sys

import pytest
from conftest import ROOT, refusal, run_program
from helpers import finish_suite, refusal_of_suite, start_suite

from tunebench.peers import PEERS
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
    assert "### Paddle, llama-tiny, Finetune: beside other trainers" in printed
    assert printed.count("| paddlenlp-trainer") == 1  # one table per round, not per run
    assert "runs: 2, done already: 2" in finish_suite(start_suite(mini), 0)
    alone = combined([peer])
    assert alone.startswith("### Paddle, llama-tiny, Finetune: beside other trainers")
    assert "Noise: not measured" not in alone


def test_a_peer_that_overruns_its_time_is_ended(mini):
    (mini / "mini.toml").write_text(SUITE.replace("samples = 24", "samples = 24\ntimeout = 2"))
    finish_suite(start_suite(mini, "--only=*/paddlenlp-trainer"), 1)
    record = read_record(mini / "results" / "mini" / "everything" / "paddlenlp-trainer-r1.json")
    assert (record.status, record.reason) == ("timeout", "not ended after --timeout 2 s")


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
    if not (ROOT / ".venv" / "torchtune" / "complete").exists():
        (mini / "mini.toml").write_text(SUITE.replace("paddlenlp-trainer", "torchtune"))
        assert ".venv/torchtune is not complete; run: bash setup.sh torchtune" in refusal_of_suite(mini)
    peer = "peers/run_peer.py", "--peer=paddlenlp-trainer"
    assert "--nproc: peers do not follow it" in refusal(
        run_program(*peer, "--nproc=2", "--zero=2", "--no-paired-halves")
    )
    assert "use --no-paired-halves" in refusal(run_program(*peer))
    assert "use llama-tiny or llama-65b-tiny" in refusal(run_program(*peer, "--model=bloom-tiny", "--no-paired-halves"))
    assert "--peer" in refusal(run_program("peers/run_peer.py", "--peer=speedy"))
    assert "unrecognized arguments: --speed" in refusal(run_program(*peer, "--speed"))
