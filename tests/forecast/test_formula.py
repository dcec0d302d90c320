"""The formula of memory against the forecasts, and its table against the code that it was made from; --sweep."""

import contextlib
import importlib
import io
import json
import sys

import numpy as np
import pytest
from conftest import HERE, ROOT, job_of, refusal, run_program

from tunebench.forecast import sweep
from tunebench.forecast.formula import NAMED, at_moments, kinds_of_runs, predict, tensors_of
from tunebench.forecast.memory import with_unseen
from tunebench.forecast.passes import read_line, table, to_line
from tunebench.forecast.report import forked
from tunebench.forecast.symbols import PRIMES, SYMBOLS, Kind, symbolic, term
from tunebench.run.unsupported import not_offered

CONFIGS = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "bloom": {"model_type": "bloom", "vocab_size": 50000, "hidden_size": 1024, "n_layer": 5, "n_head": 16},
    "glm": {
        "model_type": "glm",
        "vocab_size": 65024,
        "hidden_size": 2048,
        "intermediate_size": 6848,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
}
CONFIGS["qwen2"] = CONFIGS["llama"] | {"model_type": "qwen2", "vocab_size": 50000, "tie_word_embeddings": True}
SETUPS = (
    "full llama --bsz=8 --attention=sdpa",
    "full llama --bsz=8 --padding-free --attention=sdpa",
    "full qwen2 --bsz=8 --padding-free",
    "full llama --bsz=8 --dtype=bf16 --amp=O1 --micro-bsz=2",
    "full llama --bsz=8 --dtype=bf16 --padding-free --attention=sdpa --recompute",
    "full llama --bsz=8 --dtype=bf16 --head=labels --nproc=2",
    "full llama --bsz=8 --dtype=bf16 --mp=4",
    "lora llama --bsz=16 --mp=2 --recompute",  # the logits lead
    "full llama --bsz=8 --dtype=fp16 --nproc=4 --zero=1 --micro-bsz=1",
    "full qwen2 --bsz=8 --dtype=bf16 --nproc=4 --zero=2",
    "full bloom --bsz=8 --dtype=bf16 --nproc=4 --zero=3",
    "full glm --bsz=8 --dtype=bf16 --nproc=2 --zero=2 --attention=sdpa",
    "lora llama --bsz=8 --dtype=bf16 --nproc=4 --zero=3 --recompute",
    "full qwen2 --bsz=8 --dtype=bf16 --nproc=4 --zero=2 --overlap",
    "full llama --bsz=8 --dtype=bf16 --padding-free --attention=sdpa --lean",
    "lora glm --bsz=4 --dtype=bf16 --amp=O1 --attention=sdpa --lean",
    "full llama --bsz=8 --dtype=bf16 --nproc=4 --zero=3 --sharding=fsdp --attention=sdpa",
    "full bloom --bsz=8 --dtype=bf16 --nproc=2 --zero=2 --sharding=fsdp --micro-bsz=2",
    "full llama --bsz=8 --dtype=bf16 --nproc=4 --zero=3 --sharding=fsdp --recompute --padding-free --attention=sdpa",
    "full qwen2 --bsz=8 --nproc=4 --zero=2 --sharding=fsdp --micro-bsz=1",
    "full glm --bsz=4 --dtype=fp16 --nproc=4 --zero=3 --sharding=fsdp --micro-bsz=1 --recompute",
    "lora llama --bsz=8 --dtype=bf16 --nproc=4 --zero=3 --sharding=fsdp",
    "lora qwen2 --bsz=8 --dtype=bf16 --amp=O1 --nproc=4 --zero=2 --sharding=fsdp",
    "lora llama --bsz=8 --dtype=bf16 --amp=O1 --mp=2 --attention=sdpa",
    "lora qwen2 --bsz=8 --dtype=bf16 --lora-r=64",
    "lora bloom --bsz=4",
    "lora glm --bsz=4 --dtype=bf16 --attention=sdpa",
    "lora llama --bsz=48 --dtype=bf16 --attention=sdpa",  # the loss takes so many logits in stretches
)


@pytest.fixture(scope="module")
def own(scripts):
    """This framework's functions for forecasts, by method: build_model, wrap and to_device."""
    return {method: [scripts[method][name] for name in ("build_model", "wrap", "to_device")] for method in scripts}


@pytest.fixture(scope="module")
def passes_program():
    """benchmarks/passes.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        patch.setattr(sys, "argv", ["passes.py", HERE])
        yield importlib.import_module("passes")


def test_a_tensor_is_a_product_of_sizes():
    rows, width, head = (SYMBOLS[name] for name in ("rows", "width", "head"))
    monomial, number = term(6 * rows * width * head // 2)
    assert number == pytest.approx(3)
    assert {name for name, power in zip(SYMBOLS, monomial, strict=True) if power} == {"rows", "width", "head"}
    assert term(53) is None  # too small to count
    with pytest.raises(ValueError, match="53 is left"):
        term(53 * 2**20)
    assert len({*PRIMES.values()}) == len(SYMBOLS)


def test_a_line_of_the_table_is_read_as_it_was_written():
    for kind, line in list(table(HERE).items())[::97]:
        again, passes = read_line(line)
        assert again == kind
        assert to_line(kind, passes) == line


@pytest.mark.parametrize("setup", SETUPS)
def test_the_formula_gives_what_the_forecast_gives(own, tmp_path, setup):
    import forecast

    method, family, *flags = setup.split()
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    job = job_of(method, f"--model={tmp_path}", "--data=fixed:384", "--samples=32", "--steps=2", *flags)
    if reason := not_offered(HERE, method, job.flags, job.checkpoint):
        pytest.skip(reason)
    found = tensors_of(HERE, method, job.flags, job.checkpoint, job.plan)
    traced = forked(lambda each: forecast.forecast(each, *own[method]), job)
    unseen = with_unseen(found)
    assert unseen.peak == pytest.approx(traced.peak, rel=0.03)
    assert unseen.accumulated == pytest.approx(traced.accumulated, rel=0.03)
    for kind in ("weights", "master_weights", "moments"):
        assert found.held[kind] == pytest.approx(traced.held[kind], rel=0.01)


@pytest.mark.parametrize("part", range(4))
def test_the_table_is_of_this_code(passes_program, own, part):
    """A part of its kinds is traced again. `python benchmarks/passes.py` writes the table anew."""
    import forecast

    kinds = [kind for kind in kinds_of_runs(HERE) if passes_program.is_offered(kind)]
    assert set(table(HERE)) == set(kinds)
    random = np.random.default_rng(part)
    for i in random.choice(len(kinds), size=4, replace=False):
        kind = kinds[i]

        def trace(kind: Kind, layers: int):
            with contextlib.redirect_stdout(io.StringIO()):
                return forecast.moments(*symbolic(kind, layers, HERE == "torch"), *own[kind.method])

        now, kept = passes_program.traced(kind, trace), read_line(table(HERE)[kind])[1]
        for sizes in list(passes_program.samples(kind))[:40]:
            traced, known = (at_moments(HERE, each.by_kind(*sizes)) for each in (now, kept))
            for one, other in zip(traced, known, strict=True):
                peaks = [largest(*pair) for pair in ((one, now), (other, kept))]
                assert peaks[1] == pytest.approx(peaks[0], rel=0.005), kind


def largest(sizes, passes):
    """The peak among moments of the passes."""
    return max(size for size, phase in zip(sizes, passes.phases, strict=True) if phase not in NAMED)


def test_the_front_of_a_sweep(tmp_path):
    flags = ["--model=llama-7b", "--data=fixed:512", "--samples=64", "--steps=2", "--sweep", "--price=1.79"]
    done = run_program(
        f"{HERE}/finetune_full.py", *flags, "--gpu=a100-80g", "--out", tmp_path / "sweep.json", check=True
    )
    found = sweep.Sweep.model_validate_json((tmp_path / "sweep.json").read_text())
    assert found.tried == sum(found.verdicts.values()) > 5000
    gpus, rates = zip(*((point.gpus, point.effective_tokens_per_second) for point in found.front), strict=True)
    assert list(gpus) == sorted(set(gpus))
    assert list(rates) == sorted(rates)
    assert min(gpus) > 1  # a full run of 7 billion parameters does not fit one GPU
    for point in found.front:
        hours = point.gpus / point.effective_tokens_per_second / 3600 * 1e6
        assert point.cost_per_million_tokens == pytest.approx(1.79 * hours)
        assert f"| {point.flags} " in done.stdout
    # Each is a command line, which --plan answers alike.
    for point in (found.front[0], found.front[-1]):
        job = job_of("full", *flags[:4], *point.flags.split())
        assert predict(HERE, "full", job.flags, job.checkpoint, job.plan).peak == pytest.approx(point.peak, rel=0.01)


def test_rows_of_a_sweep_are_planned_alike_on_data_of_many_lengths(tmp_path):
    flags = ["--model=llama-7b", "--data=synthetic-en", "--sweep", "--nproc=1", "--nnodes=1", "--micro-bsz=1"]
    run_program(f"{HERE}/finetune_lora.py", *flags, "--bsz=4", "--out", tmp_path / "sweep.json", check=True)
    [point] = sweep.Sweep.model_validate_json((tmp_path / "sweep.json").read_text()).front
    job = job_of("lora", *flags[:2], "--steps=250", *point.flags.split())
    assert predict(HERE, "lora", job.flags, job.checkpoint, job.plan).peak == pytest.approx(point.peak, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--order=grouped"], "batches are grouped for one --bsz; add --bsz"),
        (["--nnodes=4", "--zero=1", "--bsz=8"], "no setup goes with --bsz 8"),
        (["--sweep", "--mp=3", "--nproc=3"], "--mp 3 does not divide"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(flags, says):
    given = ["--model=llama-7b", "--data=fixed:64", "--samples=8", "--sweep", *flags]
    assert says in refusal(run_program(f"{HERE}/finetune_full.py", *given))


def test_given_flags_stay(tmp_path):
    flags = ["--model=llama-7b", "--data=fixed:512", "--samples=64", "--steps=2", "--sweep", "--zero=3", "--nnodes=2"]
    run_program(f"{HERE}/finetune_lora.py", *flags, "--bsz=64", "--out", tmp_path / "sweep.json", check=True)
    front = sweep.Sweep.model_validate_json((tmp_path / "sweep.json").read_text()).front
    assert front
    assert all("--zero 3" in point.flags and "--nnodes 2" in point.flags and point.bsz == 64 for point in front)
