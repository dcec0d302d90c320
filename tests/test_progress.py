"""How long steps get on in a log: lines at an interval, with the share that is done and the time left."""

import json
import re
import shutil
import time

import prepare
import pytest
import tokenizer
from conftest import ROOT
from sources import Source

from tunebench import progress
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import write_random
from tunebench.progress import Step, in_words, read_step, told


def lines(text, description):
    """The shares in the lines about a long step; each line has the times too."""
    found = re.findall(
        rf"^{description}: (\d+)%, (?:\d+ min )?\d+ s so far, about (?:\d+ min )?\d+ s left$", text, re.M
    )
    assert len(found) == len(text.splitlines()), text
    return list(map(int, found))


def test_a_line_has_the_share_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE", 0.3)
    started = time.monotonic()
    with told("counting", 100) as advance:
        for _ in range(50):
            time.sleep(0.02)
            advance(2)
    seconds = time.monotonic() - started  # on a busy machine more than one
    shares = lines(capsys.readouterr().out, "counting")
    assert 2 <= len(shares) <= seconds / 0.3, "at most one in 0.3 s"
    assert shares == sorted(shares)
    assert shares[-1] < 100, "none at the end"
    assert 10 <= shares[0] <= 40


def test_a_short_step_prints_nothing(capsys):
    with told("counting", 2) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().out == ""


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "LINE", 0.0)


def test_random_weights_and_their_digest(tmp_path, at_once, capsys):
    write_random(tmp_path, PRESETS["bloom-tiny"], 0, shard_bytes=1 << 22, description="weights")
    text = capsys.readouterr().out
    shards = len(list(tmp_path.glob("*.safetensors")))
    weights, digest = (
        "".join(line for line in text.splitlines(keepends=True) if line.startswith(what))
        for what in ("weights", "digest")
    )
    assert weights + digest == text
    assert lines(weights, "weights") == [int(f"{done / shards * 100:.0f}") for done in range(1, shards)]
    assert 1 <= len(lines(digest, "digest of the weights")) <= 2 * shards


def test_tokens(tmp_path, at_once, capsys):
    shutil.copy(ROOT / "tests" / "data" / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    count, file = 4 * prepare.CHUNK, tmp_path / "data.json"
    file.write_text(json.dumps([{"instruction": f"number {i}", "output": "one two three"} for i in range(count)]))
    samples = prepare.encode(tokenizer.of_checkpoint(tmp_path), Source(str(file), None, skip_bad=False), 2)
    assert len(samples.lengths) == count
    assert lines(capsys.readouterr().out, f"tokenizing {count} samples") == [25, 50, 75]


def test_a_runs_line_is_read_back():
    step = Step(3, 20, 0.25, 812.0)
    assert read_step(f"x {step.line()}") == step
    assert read_step("step 3 of 20") is None


def test_durations():
    assert [in_words(seconds) for seconds in (0.4, 59.6, 125)] == ["0 s", "1 min 0 s", "2 min 5 s"]
