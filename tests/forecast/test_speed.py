"""The forecast rates: the fitted constants, what they leave unexplained, and what must make a run faster or slower."""

import json

import numpy as np
import pytest

from tunebench.flags import parse_flags
from tunebench.forecast import speed, speed_points
from tunebench.forecast.gpus import GPUS, LINKS
from tunebench.forecast.job import describe

FRAMEWORKS = ("torch", "paddle")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_constants_are_those_of_the_points(framework):
    kept = json.loads(speed.CONSTANTS.read_text())[framework]
    found = json.loads(json.dumps(speed_points.summary(framework)))
    assert found["rows"] == kept["rows"]
    for name, value in kept["constants"].items():
        assert found["constants"][name] == pytest.approx(value, rel=1e-3)
    assert found["interval_factor"] == pytest.approx(kept["interval_factor"], rel=1e-3)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_interval_covers_nine_in_ten_rows_that_are_left_out(framework):
    members = [point for point in speed_points.points() if point.framework == framework]
    off = np.abs(speed_points.left_out([point for point in members if point.source not in speed_points.CHECKED]))
    factor = json.loads(speed.CONSTANTS.read_text())[framework]["interval_factor"]
    assert (off <= np.log(factor) + 1e-9).mean() >= 0.9


def rate(framework, method, *flags, gpu="a100-80g"):
    """The forecast effective tokens per second."""
    given = parse_flags(method, [*flags, "--plan", f"--gpu={gpu}"], framework=framework)
    found, checkpoint, plan, _ = describe(given)
    kind = GPUS[gpu]
    return speed.forecast_speed(framework, method, found, checkpoint, plan, kind, LINKS[kind.link])


PACKED = ["--model=llama-7b", "--data=fixed:1024", "--samples=64", "--steps=4", "--dtype=bf16", "--attention=sdpa"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_faster_and_slower(framework):
    base = rate(framework, "lora", *PACKED, "--bsz=4")
    low, high = base.interval
    assert low < base.effective_tokens_per_second < high
    assert sum(base.parts.values()) == pytest.approx(base.step_seconds, rel=0.3)
    assert rate(framework, "lora", *PACKED, "--bsz=4", gpu="h100").effective_tokens_per_second > high
    slower = rate(framework, "lora", *PACKED, "--bsz=4", "--recompute")
    assert slower.effective_tokens_per_second < base.effective_tokens_per_second
    assert rate(framework, "full", *PACKED, "--bsz=4").effective_tokens_per_second < base.effective_tokens_per_second
    two, four = (rate(framework, "full", *PACKED, f"--bsz={4 * n}", f"--nproc={n}", "--zero=2") for n in (2, 4))
    assert 1.5 < four.effective_tokens_per_second / two.effective_tokens_per_second < 2
