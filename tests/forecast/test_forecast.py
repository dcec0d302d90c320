"""The forecasts of memory against counted bytes, the published record and public peaks; --plan as a user gives it."""

import gc
import json

import numpy as np
import pytest
from conftest import HERE, ROOT, job_of, run_program

from tunebench.flags import parse_flags
from tunebench.forecast.changes import changes, may_fit
from tunebench.forecast.gpus import GPUS, kind_of
from tunebench.forecast.machine import machine_of_kind
from tunebench.forecast.memory import PARTS, largest_batch
from tunebench.forecast.report import Answer, answer, forked, lines
from tunebench.forecast.symbols import Kind, symbolic
from tunebench.forecast.verdict import judge
from tunebench.world import ALONE

FAMILIES = ("llama", "bloom", "qwen2", "chatglm2", "llama-3.2-1b")
LONGEST = 641  # tokens: a prompt of 256, a response of 384 and its end


@pytest.fixture(scope="module")
def forecasts(scripts):
    """This framework's forecast of memory for a job, by method."""
    import forecast

    def of(method):
        parts = [scripts[method][name] for name in ("build_model", "wrap", "to_device")]
        return lambda job: forecast.forecast(job, *parts)

    return {method: of(method) for method in scripts}


@pytest.fixture(scope="module")
def memory_of(forecasts):
    """What a script's --plan finds for the memory, without importing the framework again."""
    return lambda method, *flags: forked(forecasts[method], job_of(method, *flags))


def test_the_longest_batch_decides():
    flags = ["--model=llama-tiny", "--data=synthetic-en", "--samples=200", "--bsz=4", "--steps=10", "--nproc=2"]
    job = job_of("full", *flags)
    widths = [int(job.plan.row_lengths(step).max()) for step in range(10)]
    assert largest_batch(job.flags, job.plan).input_ids.shape == (2, max(widths))
    free = job_of("full", *flags, "--padding-free", "--attention=sdpa")
    sums = [job.plan.row_lengths(step).reshape(2, 2).sum(axis=1).max() for step in range(10)]
    assert largest_batch(free.flags, free.plan).input_ids.shape == (1, max(sums))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_keep_their_share_of_the_tokens(memory_of, method):
    flags = ["--model=llama-7b", "--mp=4", "--bsz=4", "--data=fixed:512", "--steps=2", "--dtype=bf16", "--recompute"]

    def saved(layers):
        given = [*flags, f"--layers={layers}", "--attention=sdpa"]
        whole, split = (memory_of(method, *given, *more) for more in ([], ["--sequence-parallel"]))
        return whole.kept - split.kept

    inputs = 4 * 512 * 4096 * 2  # bytes of a layer's inputs, which recomputation keeps
    assert saved(5) - saved(3) == pytest.approx(2 * 3 / 4 * inputs, rel=0.01)


def test_parts_are_of_one_moment(forecasts):
    job = job_of("full", "--model=llama-tiny", "--data=fixed:128", "--bsz=4", "--steps=2", "--dtype=bf16")
    found = answer(HERE, "full", job, forecasts["full"])
    memory, weights = found.memory, found.parameters
    assert tuple(memory.parts) == PARTS
    assert sum(memory.parts.values()) == memory.peak
    held = {"weights": 2, "master_weights": 4, "moments": 8}
    for kind, size in held.items():
        assert memory.held[kind] == pytest.approx(size * weights, rel=0.01)
    assert found.verdict == "fits"
    assert found.interval[0] < found.effective_tokens_per_second < found.interval[1]


@pytest.mark.parametrize("gpu", GPUS)
def test_a_gpu_is_known_by_its_name(gpu):
    assert kind_of(f"NVIDIA {GPUS[gpu].name}") == gpu


def test_verdicts_leave_a_margin():
    gpu = GPUS["a100-80g"]
    assert judge(75 * 10**9, gpu, 1).verdict == "fits"
    assert judge(82 * 10**9, gpu, 1).verdict == "marginal"
    assert judge(85 * 10**9, gpu, 1).verdict == "out of memory"
    assert judge(84 * 10**9, gpu, 4).verdict == "out of memory"  # NCCL's buffers


# Rows of the published record: out of memory are llama-13b with ZeRO 2, and its LoRA without recomputation.
RECORD = (
    (["full", "--model=llama-13b", "--bsz=8", "--zero=2", "--nproc=4"], False),
    (["full", "--model=llama-13b", "--bsz=8", "--zero=3", "--nproc=4"], True),
    (["full", "--model=llama-13b", "--bsz=8", "--mp=4", "--recompute"], True),
    (["full", "--model=llama-7b", "--bsz=16", "--zero=2", "--nproc=4"], True),
    (["lora", "--model=llama-13b", "--bsz=8"], False),
    (["lora", "--model=llama-13b", "--bsz=8", "--recompute"], True),
)


@pytest.mark.parametrize(("row", "fits"), RECORD, ids=lambda value: str(value))
def test_the_published_record_fits_where_it_ran(memory_of, row, fits):
    method, *flags = row
    memory = memory_of(method, *flags, "--dtype=fp16", f"--data=fixed:{LONGEST}", "--samples=64", "--steps=2")
    processes = 1 if method == "lora" else 4
    assert (judge(memory.peak, GPUS["a100-80g"], processes).verdict != "out of memory") == fits, memory


def test_the_fastest_change_that_fits_is_named(forecasts):
    """On a GPU with 24 GB. The kernels of eager attention take most."""
    flags = ["--model=llama-7b", "--layers=4", "--data=fixed:2048", "--samples=64", "--steps=2", "--bsz=8"]
    job = job_of("lora", *flags, "--dtype=bf16", gpu="rtx-4090")
    found = answer(HERE, "lora", job, forecasts["lora"])
    assert found.verdict == "out of memory"
    assert "--attention sdpa" in found.change.flags
    assert judge(found.change.peak, GPUS["rtx-4090"], 1).verdict == "fits"
    assert f"what fits: {found.change.flags}" in "\n".join(lines(found))


def test_sequence_parallelism_is_a_change_of_tensor_parallel_runs():
    """At 24 GB a run that --sequence-parallel lets fit may fit, and one whose weights are too many may not."""
    one, four = (parse_flags("full", ["--model=llama-7b", "--plan", "--gpu=rtx-4090", *mp]) for mp in ([], ["--mp=4"]))
    assert {"sequence_parallel": True} not in changes(HERE, one, of_states=False)
    assert {"sequence_parallel": True} in changes(HERE, four, of_states=False)
    assert {"sequence_parallel": True} not in changes(HERE, four, of_states=True)
    flags = ["--data=fixed:1024", "--samples=64", "--steps=2", "--bsz=4", "--mp=4", "--dtype=bf16", "--attention=sdpa"]
    machine = machine_of_kind("rtx-4090", None)
    for layers, more, fits in (
        (24, [], False),
        (24, ["--sequence-parallel"], True),
        (32, ["--sequence-parallel"], False),
    ):
        job = job_of("full", "--model=llama-7b", f"--layers={layers}", *flags, *more, gpu="rtx-4090")
        assert may_fit(HERE, "full", job, machine) == fits, (layers, more)


def test_lean_is_a_change_of_paddle_alone():
    flags = parse_flags("lora", ["--model=llama-7b", "--plan", "--gpu=rtx-4090"])
    lean = flags.model_copy(update={"lean": True})
    assert {"lean": True} in changes("paddle", flags, of_states=False)
    assert {"lean": True} not in changes("torch", flags, of_states=False)
    assert {"lean": True} not in changes("paddle", lean, of_states=False)
    assert {"lean": True} not in changes("paddle", flags, of_states=True)


def test_a_config_alone_is_enough(tmp_path):
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--model", tmp_path, "--data=fixed:256", "--bsz=2", "--price=1.79", "--plan", "--gpu=h100"]
    done = run_program(f"{HERE}/finetune_lora.py", *flags, "--out", tmp_path / "answer.json", check=True)
    found = Answer.model_validate_json((tmp_path / "answer.json").read_text())
    assert (found.gpu, found.link, found.largest_batch) == ("h100", "nvlink4", (2, 256))
    assert found.cost == pytest.approx(1.79 * found.seconds / 3600)
    assert "verdict: fits" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answer.json", "config.json"]


def test_a_preset_is_planned_without_its_weights(tmp_path):
    flags = ["--model=llama-65b", "--layers=1", "--data=fixed:64", "--bsz=2", "--plan", "--recompute"]
    done = run_program(f"{HERE}/finetune_lora.py", *flags, env={"TUNEBENCH_CACHE": str(tmp_path)}, check=True)
    assert "verdict: fits" in done.stdout
    assert not (tmp_path / "checkpoints").exists()


def test_what_is_not_offered_is_an_answer(tmp_path):
    model, more = {"torch": ("bloom-tiny", ["--padding-free"]), "paddle": ("llama-tiny", ["--compile"])}[HERE]
    out = tmp_path / "answer.json"
    flags = [f"--model={model}", *more, "--plan", "--out", out]
    done = run_program(f"{HERE}/finetune_full.py", *flags, check=True)
    found = Answer.model_validate_json(out.read_text())
    assert (found.verdict, found.memory) == ("unsupported", None)
    assert found.reason in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu=h100"], "--gpu is for --plan"),
        (["--price=2"], "--price is for --plan"),
        (["--plan", "--gpu=tpu"], "invalid choice: 'tpu'"),
        (["--plan", "--price=0"], "out of range"),
        (["--plan", "--mp=3", "--model=llama-7b"], "--mp 3 does not divide"),
    ],
)
def test_wrong_questions_are_refused(flags, said):
    done = run_program(f"{HERE}/finetune_full.py", *flags)
    assert (done.returncode, done.stdout.count("Traceback")) == (2, 0)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(HERE != "paddle", reason="torch's fused kernels are in its traces themselves")
@pytest.mark.parametrize(
    ("types", "attention", "width"),
    [("fp32", "memory_efficient_attention", 4), ("O1", "flash_attn", 2), ("O2", "flash_attn", 2)],
)
def test_fused_kernels_make_what_they_make_on_a_gpu(scripts, types, attention, width):
    """Attention's result has the dtype of the queries, also at O1, where a norm's is float32."""
    import forecast

    kind = Kind("llama", False, "lora", types, "sdpa", False, False, "all", False, False, True)
    flags, checkpoint, batch = symbolic(kind, 2, own_width=False)
    parts = [scripts["lora"][name] for name in ("build_model", "wrap", "to_device")]
    moments, _ = forecast.moments(flags, checkpoint, batch, *parts)
    rows, tokens = batch.input_ids.shape
    heads, hidden = (checkpoint.config[name] for name in ("num_attention_heads", "hidden_size"))
    sums = 4 * rows * heads * -(-tokens // 128) * 128
    names = [each.operator for each in moments]
    assert names.count(f"{attention} {rows * tokens * hidden * width} {sums}") == 2
    assert names.count(f"rms_norm {rows * tokens * hidden * (2 if types == 'O2' else 4)} {4 * rows * tokens}") == 5
    assert sum(name.startswith("rms_norm_grad ") for name in names) == 4, "none before the first adapter"


if HERE == "torch":
    import torch

    KINDS = (
        [],
        ["--attention=sdpa"],
        ["--dtype=bf16", "--amp=O1"],
        ["--dtype=bf16", "--amp=O2", "--attention=sdpa"],
        ["--recompute"],
        ["--dtype=bf16", "--amp=O2", "--attention=sdpa", "--recompute"],
    )

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("method", ["full", "lora"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_kept_activations_are_what_autograd_saves(scripts, memory_of, family, method, kind):
        flags = [f"--model={family}-tiny", "--data=fixed:256", "--bsz=2", "--steps=2", "--samples=8", *kind]
        assert memory_of(method, *flags).kept == pytest.approx(
            counted(scripts[method], job_of(method, *flags)), rel=0.03
        )

    def counted(script, job):
        """The bytes that a real forward pass saves, each storage once, without weights and what is of the head.

        A checkpoint of --recompute keeps its inputs in Python: they are tensors that were not there before the pass.
        """
        from tunebench.models.checkpoint import find_checkpoint

        group = script["parallel"].join(job.flags, ALONE)
        model = script["build_model"](job.flags, find_checkpoint(job.flags.model, "random", 0), group)
        inputs, _ = script["to_device"](job.flags, largest_batch(job.flags, job.plan), group.device)
        lasting = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *in_python())}
        saved = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if model.config.vocab_size not in tensor.shape:
                saved[storage.data_ptr()] = storage  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = model(**inputs)
        assert outputs.logits is not None
        if job.flags.recompute:
            for tensor in in_python():
                note(tensor)
        return sum(x.nbytes() for address, x in saved.items() if address not in lasting)

    def in_python():
        """The tensors that Python's objects refer to."""
        gc.collect()
        return [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]

    def test_public_peaks_are_met(memory_of, tmp_path):
        """The points that the flags can express. None that ran out of memory `fits`."""
        content = json.loads((ROOT / "tests" / "data" / "peaks.json").read_text())
        errors = []
        for point in content["points"]:
            (tmp_path / "config.json").write_text(json.dumps(content["models"][point["model"]]))
            flags = [f"--model={tmp_path}", f"--data=fixed:{point['length']}", f"--bsz={point['bsz']}", *point["flags"]]
            if point["counter"] != "allocated by torch":
                continue
            memory = memory_of("lora", *flags, "--steps=2", "--samples=64")
            if point["peak_gb"] is None:
                assert judge(memory.peak, GPUS["a100-40g"], 1).verdict != "fits"
            else:
                errors.append(abs(memory.peak / point["peak_gb"] / 1e9 - 1))
        print(f"errors: {[f'{error:.1%}' for error in errors]}")
        assert np.median(errors) <= 0.03
        assert max(errors) <= 0.08
