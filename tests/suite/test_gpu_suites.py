"""The suites for GPUs, as far as a CPU can check them: rows, flags, and the models that they build.

tests/full_size.py builds each run's model by shapes, at full size, with the script's own functions and the run's flags.
"""

import functools
import json
import math
import subprocess
from pathlib import Path

import pytest
from conftest import FRAMEWORKS, LIMIT, ROOT

from tunebench.errors import BadInput
from tunebench.flags import place
from tunebench.models.checkpoint import Checkpoint
from tunebench.models.config import normalise
from tunebench.models.families import family_of
from tunebench.models.presets import PRESETS
from tunebench.report.published import FOLDER, Pair, PublishedRecord, load, tables
from tunebench.run.start import check_tensor_parallel
from tunebench.run.unsupported import multiplies_float16, not_offered
from tunebench.suite.file import Planned, find_suite, plan_runs, read_suite

GPUS = {"a100x4": 4, "a100x4-as-published": 4, "a100x4-options": 4, "h100x8": 8, "gpu1-80g": 1, "gpu1-24g": 1}
# Other suites have the same runs with other batch sizes, --tuned or single options.
BUILT = ("a100x4", "a100x4-as-published", "h100x8")
PAIRS = [(suite, pair.name) for suite in BUILT for pair in read_suite(find_suite(suite)).pair]
MODELS = {"chatglm-6b": "chatglm2-6b"}  # models of the published record that another one stands in for


@functools.cache
def planned(suite: str) -> dict[tuple[str, str], Planned]:
    """The runs of a suite by pair and framework, their flags parsed. Raises `BadInput`."""
    file = find_suite(suite)
    return {
        (run.entry.group, run.entry.framework): run
        for run in plan_runs(file, read_suite(file), Path("results"), 1, None)
    }


def runs(suite: str) -> list[Planned]:
    return list(planned(suite).values())


@pytest.mark.parametrize("suite", GPUS)
def test_a_machine_with_as_many_gpus_takes_the_flags(suite):
    for run in runs(suite):
        options = run.flags.model_dump(include={"nproc", "mp", "zero"})
        options |= dict.fromkeys(("nnodes", "node_rank", "master"))
        place(options, gpus=GPUS[suite])
        assert run.flags.samples == 10_000
    assert max(run.flags.world_size for run in runs(suite)) == GPUS[suite]


@pytest.mark.parametrize("suite", GPUS)
def test_the_models_can_be_split_so_and_both_frameworks_offer_it(suite):
    for run in runs(suite):
        checkpoint = Checkpoint(Path(), normalise(PRESETS[run.flags.model].config), [], "")
        check_tensor_parallel(run.flags, checkpoint)
        reason = not_offered(run.entry.framework, run.entry.method, run.flags, checkpoint)
        assert reason is None or "CPUs" in reason, f"{run.name}: {reason}"


@pytest.mark.parametrize("suite", ["a100x4", "h100x8"])
def test_both_sides_run_the_same(suite):
    for pair in {run.entry.group for run in runs(suite)}:
        assert planned(suite)[pair, "torch"].flags == planned(suite)[pair, "paddle"].flags


def test_an_option_has_its_counterpart():
    """Each run of the suite of options but the first of its kind differs from another run in one flag."""
    flags = {key: run.flags.model_dump(exclude={"given", "out"}) for key, run in planned("a100x4-options").items()}
    for (pair, framework), own in flags.items():
        base = flags["-".join(pair.split("-")[:2]) if pair.startswith("full") else "lora", framework]
        changed = {name for name in own if own[name] != base[name]}
        assert len(changed) == (pair not in ("lora", "full-zero2", "full-zero3", "full-mp4")), (
            pair,
            framework,
            changed,
        )


def test_flash_has_its_counterpart():
    flags = [run.flags for run in runs("h100x8")]
    assert {each.model for each in flags} == {name for name in PRESETS if "tiny" not in name}
    for each in flags:
        # One run of llama-65b with ZeRO 3 is enough: Paddle is not expected to fit it.
        if each.attention == "flash" and (each.model, each.zero) != ("llama-65b", 3):
            assert each.model_copy(update={"attention": "eager"}) in flags


@functools.cache
def published_runs() -> list[PublishedRecord]:
    _, runs, broken = load([FOLDER])
    assert not broken
    return runs


def published_rows() -> list[Pair]:
    return [pair for table in tables(published_runs()) for pair in table.pairs]


def is_of(run: Planned, published: PublishedRecord) -> bool:
    """Whether a run has the published one's model, method, GPUs, batch size, data and setup."""
    model, setup, flags = MODELS.get(published.model, published.model), published.setup, run.flags
    mp = 2 if setup.mp > 1 and model == "chatglm2-6b" else setup.mp  # the stand-in's heads do not divide by 4
    return (
        (flags.model, run.entry.method) == (model, published.method)
        and (flags.world_size, flags.bsz) == (published.num_gpus, published.bsz)
        and flags.data in published.data
        and (flags.mp, flags.zero, flags.recompute, flags.accumulation)
        == (mp, setup.zero, setup.recompute, setup.accumulation)
    )


def test_every_published_run_is_there_on_both_sides():
    for published in published_runs():
        found = [run.entry.framework for run in runs("a100x4") if is_of(run, published)]
        assert sorted(found) == ["paddle", "torch"], published
    assert {(run.flags.dtype, run.flags.amp) for run in runs("a100x4")} == {("fp16", "O2")}


def test_every_published_row_is_there_as_it_was():
    suite = "a100x4-as-published"
    unused = {run.entry.group for run in runs(suite)}
    for row in published_rows():
        found = {
            pair
            for pair in {run.entry.group for run in runs(suite)}
            if all(is_of(planned(suite)[pair, side], getattr(row, side) or row.either) for side in FRAMEWORKS)
        }
        assert len(found) == 1, row
        unused -= found
    assert not unused
    assert {(run.entry.framework, run.flags.dtype, run.flags.amp) for run in runs(suite)} == {
        ("torch", "fp16", "O1"),
        ("paddle", "fp16", "O2"),
    }
    assert "UNEQUAL" in read_suite(find_suite(suite)).title


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function that returns what a framework's runs build, by suite/pair and number of processes."""
    folder, made = tmp_path_factory.mktemp("built"), {}

    def results(framework):
        if framework not in made:
            made[framework] = {}  # what fails is not tried again for each run
            cases, names = {}, {}  # two suites may have the same run
            for suite in BUILT:
                try:
                    members = [run for run in runs(suite) if run.entry.framework == framework]
                except BadInput:  # which the tests of this suite say
                    continue
                for run in members:
                    case = run.entry.method, *run.argv[1:-1]
                    names[f"{suite}/{run.entry.group}"] = cases.setdefault(case, str(len(cases)))
            (folder / "cases").write_text(json.dumps({number: case for case, number in cases.items()}))
            python = ROOT / ".venv" / framework / "bin" / "python"
            command = [python, "-P", ROOT / "tests" / "full_size.py", framework, folder / "cases", folder / framework]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd="/", check=False)
            assert done.returncode == 0, done.stderr
            found = json.loads((folder / framework).read_text())
            made[framework] = {name: found[number] for name, number in names.items()}
        return made[framework]

    return results


def parameters(config: dict, **cut: int) -> int:
    return sum(map(math.prod, family_of(config | cut).tensors(config | cut).values()))


def adapters(config: dict, rank: int, **cut: int) -> int:
    """The number of LoRA's weights: A and B of each adapted layer."""
    return sum(
        rank * sum(shape)
        for name, shape in family_of(config | cut).tensors(config | cut).items()
        if name.endswith(".weight") and name.split(".")[-2] in family_of(config).lora_targets
    )


def check_counts(facts: dict, run: Planned, **cut: int) -> None:
    """Asserts the numbers of all and of trained parameters, and that a process holds its slice of them."""
    config = PRESETS[run.flags.model].config
    whole, added = parameters(config, **cut), adapters(config, run.flags.lora_r, **cut)
    whole, trained = (whole + added, added) if run.entry.method == "lora" else (whole, whole)
    assert (facts["parameters"], facts["trainable"]) == (whole, trained)
    if not run.flags.zero:
        # Norms, some biases and LoRA's A are whole on each.
        assert facts["held"] == pytest.approx(whole / run.flags.mp, rel=0.01)


@pytest.mark.frameworks
@pytest.mark.parametrize(("suite", "pair"), PAIRS)
def test_torch_builds_it(built, suite, pair):
    run = planned(suite)[pair, "torch"]
    flags, config = run.flags, PRESETS[run.flags.model].config
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    by_size = built("torch")[f"{suite}/{pair}"]
    for facts in by_size.values():
        assert "error" not in facts, facts["error"]
    if flags.mp == 1:
        check_counts(by_size["1"], run)
    for size, facts in by_size.items():
        assert facts["dtypes"] == [flags.weights_dtype]
        if flags.zero and size != "1":
            check_counts(facts, run, **{layers: 1, "vocab_size": 8192})
            assert (facts["bsz"], facts["stage"]) == (flags.bsz, flags.zero)
            assert facts["precision"] == ([flags.compute_dtype] if flags.amp == "O2" else [])
            if flags.weights_dtype == "float16" and not multiplies_float16():
                assert facts["refused"] == "Type fp16 is not supported on your device."
            else:
                assert facts["engine"][0] == "DeepSpeedEngine"
            continue
        if flags.mp > 1:
            check_counts(facts, run, **{layers: 1})
        assert facts["gradients"] == facts["weights"] == [flags.weights_dtype]
        assert facts["matmuls"] == [flags.compute_dtype]
        eager = flags.attention == "eager"
        assert facts["attention"] == ["softmax" if eager else "scaled_dot_product_flash_attention_for_cpu"]
        assert facts["recompute"] == flags.recompute
        assert facts["logits"] == [*facts["inputs"], config["vocab_size"] // flags.mp]
        assert facts["inputs"][0] == flags.micro_bsz


@pytest.mark.frameworks
@pytest.mark.parametrize(("suite", "pair"), PAIRS)
def test_paddle_builds_it(built, suite, pair):
    run = planned(suite)[pair, "paddle"]
    flags, config = run.flags, PRESETS[run.flags.model].config
    [facts] = built("paddle")[f"{suite}/{pair}"].values()
    assert "error" not in facts, facts["error"]
    check_counts(facts, run)
    assert facts["dtypes"] == facts["tiny"] == ["float32" if config["model_type"] == "glm" else flags.weights_dtype]
    assert facts["recompute"] == flags.recompute
    if flags.mp == 1:
        assert facts["logits"] == [*facts["inputs"], config["vocab_size"]]
        assert facts["inputs"][0] == flags.micro_bsz
