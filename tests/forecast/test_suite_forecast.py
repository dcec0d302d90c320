"""run_all.sh --plan: the table of a suite, and the same as JSON."""

import json

import pytest
from helpers import SUITE, finish_suite, refusal_of_suite, start_suite

from tunebench.forecast.report import Answer

pytestmark = pytest.mark.frameworks


@pytest.fixture
def suite(tmp_path):
    """A folder with a suite of two short pairs."""
    (tmp_path / "mini.toml").write_text(SUITE)
    return tmp_path


def test_a_suite_is_planned_without_a_run(suite):
    out = suite / "answers.json"
    printed = finish_suite(start_suite(suite, "--plan", "--gpu=h100", "--price=2", f"--out={out}"), 0)
    answers = {each.pop("run"): Answer.model_validate(each) for each in json.loads(out.read_text())}
    assert list(answers) == ["full/paddle", "full/torch", "lora/paddle", "lora/torch"]
    for name, found in answers.items():
        assert (found.verdict, found.gpu) == ("fits", "h100"), name
        assert found.setup.recompute == (found.method == "lora")
        assert f"| {name}" in printed
    total = sum(found.cost for found in answers.values())
    assert f"${total:.2f}" in printed
    assert not (suite / "results").exists()


@pytest.mark.parametrize("flag", ["--gpu=h100", "--calibrate=results"])
def test_questions_of_a_plan_need_a_plan(suite, flag):
    assert f"{flag.split('=')[0]} is for --plan" in refusal_of_suite(suite, flag)
