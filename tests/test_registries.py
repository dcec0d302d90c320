"""One place for each fact: a family or a framework added to a registry alone works everywhere."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import HERE, ROOT

from tunebench import frameworks
from tunebench.errors import BadInput
from tunebench.flags import parse_flags
from tunebench.models import families, presets
from tunebench.models.checkpoint import find_checkpoint
from tunebench.plan import load_plan
from tunebench.record import Record, read_record
from tunebench.report.load import load_records
from tunebench.report.page import combined
from tunebench.run.place import read_world
from tunebench.run.run import Job, Run, describe_run
from tunebench.run.unsupported import not_offered
from tunebench.suite.file import plan_runs, read_suite
from tunebench.world import ALONE


@pytest.fixture
def helium(monkeypatch):
    """A family of a few lines, and a preset of it."""

    class HeliumShape(families.LlamaShape):
        sliding_window: None = None

    names = ("HeliumForCausalLM",)
    family = dataclasses.replace(families.LLAMA, title="Helium", shape=HeliumShape, architectures=names)
    monkeypatch.setitem(families.FAMILIES, "helium", family)
    own = {"model_type": "helium", "architectures": [*names], "num_key_value_heads": 4}
    config = presets.PRESETS["llama-tiny"].config | own
    monkeypatch.setitem(presets.PRESETS, "helium-tiny", presets.Preset(config, "float32"))


def test_a_family_is_an_entry_of_its_registry(helium, script, tmp_path, capsys):
    flags = parse_flags("full", ["--model=helium-tiny", "--bsz=2", "--samples=4", "--steps=2", "--warmup-steps=1"])
    checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed)
    assert checkpoint.parameters == sum(int(np.prod(shape)) for shape in checkpoint.tensors.values())
    assert checkpoint.widths["key-value heads"] == 4
    if HERE == "paddle":
        assert "Helium" in not_offered("paddle", "full", flags, checkpoint)
        return
    assert not_offered("torch", "full", flags, checkpoint) is None
    plan_flags = flags.model_copy(update={"model": "llama-tiny", "out": tmp_path / "r.json"})
    plan = load_plan(plan_flags, find_checkpoint("llama-tiny", "random", 0))  # the same tokenizer and vocabulary
    run = Run("torch", "full", Job(flags.model_copy(update={"out": tmp_path / "r.json"}), checkpoint, plan, ALONE))
    script["main"](run)
    record = read_record(tmp_path / "r.json")
    assert (record.status, record.model.family) == ("ok", "helium")
    assert "### Helium" in combined([record])


@pytest.fixture
def third(monkeypatch):
    """A framework that the registry alone names, with PyTorch's launcher under other variables."""
    known = dataclasses.replace(
        frameworks.FRAMEWORKS["torch"],
        name="third",
        title="Third",
        packages=("numpy",),
        version_of="numpy",
        launcher="thirdrun",
        rank_variable="THIRD_RANK",
        compiles=False,
    )
    monkeypatch.setitem(frameworks.FRAMEWORKS, "third", known)


def test_a_framework_is_an_entry_of_its_registry(third, tmp_path):
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "THIRD_RANK": "1"}
    assert read_world("third", place).rank == 1
    with pytest.raises(BadInput, match="THIRD_RANK is set, as thirdrun does; start this script by python -m paddle"):
        read_world("paddle", {"THIRD_RANK": "0"})
    flags = parse_flags("full", ["--model=llama-tiny", "--tuned"], framework="third")
    assert not flags.compile
    file = tmp_path / "mini.toml"
    file.write_text(
        'title = "t"\n[[pair]]\nname = "p"\nscript = "finetune_full.py"\nflags = { model = "llama-tiny" }\n'
        "third = { bsz = 2 }\n"
    )
    runs = plan_runs(file, read_suite(file), tmp_path, 1, None)
    assert [(run.entry.framework, run.flags.bsz) for run in runs] == [("paddle", 4), ("torch", 4), ("third", 2)]
    assert runs[-1].command[:2] == [f"{ROOT}/.venv/third/bin/python", f"{ROOT}/third/finetune_full.py"]
    about = describe_run("third", "full", runs[-1].flags, runs[-1].argv)
    assert "numpy" in about["versions"]
    unknown = dict.fromkeys(("model", "plan", "steps", "setup_seconds"))
    record = Record(status="failed", reason="there is no such folder", log=[], peak_memory_bytes=[], **unknown, **about)
    record.write(tmp_path / "p" / "third-r1.json")
    (read,), broken = load_records([tmp_path])
    assert (read, broken) == (record, [])
    content = json.loads((tmp_path / "p" / "third-r1.json").read_text())
    assert content["framework"] == "third"
