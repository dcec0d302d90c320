"""Low precision: what is computed in it and what is not. A run in another precision than asked for fails."""

import pytest
from conftest import run_program
from helpers import MODEL, close, probe

from tunebench.record import read_record
from tunebench.report.parity import TOLERANCES
from tunebench.run.unsupported import multiplies_float16

pytestmark = pytest.mark.frameworks
NEEDS_FLOAT16 = pytest.mark.skipif(not multiplies_float16(), reason="DeepSpeed refuses float16 on this processor")
NAMES = {"bf16": "bfloat16", "fp16": "float16"}


def assert_close(record, exact):
    """Asserts that two curves are one training by the limits of tunebench/report/parity.py."""
    tolerance = TOLERANCES[record.setup.dtype]
    assert record.steps.loss[0] == pytest.approx(exact.steps.loss[0], rel=tolerance.first_loss)
    assert record.steps.loss == pytest.approx(exact.steps.loss, rel=tolerance.loss)
    assert record.steps.grad_norm == pytest.approx(exact.steps.grad_norm, rel=tolerance.gradient)


@pytest.mark.parametrize(
    ("family", "method", "dtype", "amp", "setup"),
    [
        ("llama", "full", "bf16", "O1", []),
        ("llama", "full", "bf16", "O2", ["--attention=flash"]),
        ("llama", "full", "fp16", "O1", []),
        ("llama", "lora", "bf16", "O2", []),
        ("llama", "lora", "bf16", "O1", ["--recompute"]),
        ("llama", "lora", "fp16", "O2", ["--mp=2"]),
        ("bloom", "full", "bf16", "O2", ["--zero=3"]),
        ("bloom", "full", "bf16", "O1", ["--zero=2", "--attention=flash"]),
        ("chatglm2", "full", "bf16", "O2", ["--mp=2"]),
        ("qwen2", "full", "bf16", "O2", ["--nproc=2"]),
        pytest.param(*("llama", "full", "fp16", "O2", ["--zero=2"]), marks=NEEDS_FLOAT16),
        ("llama", "full", "bf16", "O2", ["--zero=3", "--sharding=fsdp"]),
        ("bloom", "full", "fp16", "O2", ["--zero=2", "--sharding=fsdp"]),
        ("llama", "lora", "bf16", "O2", ["--zero=3", "--sharding=fsdp", "--recompute"]),
        ("qwen2", "full", "bf16", "O1", ["--zero=2", "--sharding=fsdp"]),
    ],
    ids=lambda part: "".join(part),
)
def test_torch_trains_in_low_precision_on_a_cpu(alone, forked, short, tmp_path, family, method, dtype, amp, setup):
    exact = alone("torch", family, method)
    flags = [f"--model={family}-tiny", *short, f"--dtype={dtype}", f"--amp={amp}"]
    record = forked.train("torch", method, tmp_path / "r.json", *flags, *setup)
    assert record.kernels.matmuls == [NAMES[dtype]]
    assert record.kernels.weights == [NAMES[dtype] if amp == "O2" else "float32"]
    assert record.skipped_steps == 0
    assert_close(record, exact)
    assert record.steps.loss != exact.steps.loss


@pytest.mark.parametrize(("setup", "ranks"), [([], 1), (["--zero=2", "--nproc=2"], 2)])
def test_master_weights_are_float32(forked, tmp_path, setup, ranks):
    """Bytes per weight with O2: weight 2, gradient 2, and over the ranks master weight 4, moments 8."""
    flags = [f"--model={MODEL}", "--bsz=2", "--steps=2", "--warmup-steps=1", "--dtype=bf16", "--amp=O2"]
    held, record = probe(forked, "torch", "full", tmp_path, *flags, *setup)
    weights = record.model.parameters
    for rank in held:
        assert rank["trainable"] == close(2 * weights)
        assert rank["master"] == close(4 * weights / ranks)
        assert rank["states"] == close(8 * weights / ranks)
    if not setup:
        assert held[0]["gradients"] == close(2 * weights)


@pytest.mark.parametrize("zero", [2, 3])
def test_fsdp_holds_slices_of_float32_masters_alone(forked, tmp_path, zero):
    """Bytes per weight, over the ranks: 4 trained, moments 8; 2 frozen, which stage 2 leaves whole on each."""
    flags = [f"--model={MODEL}", "--bsz=2", "--steps=2", "--warmup-steps=1", "--dtype=bf16", "--amp=O2"]
    flags += [f"--zero={zero}", "--nproc=2", "--sharding=fsdp"]
    held, record = probe(forked, "torch", "lora", tmp_path, *flags)
    trained = record.model.trainable_parameters
    for rank in held:
        assert rank["frozen"] == close(2 * record.model.parameters / (1 if zero == 2 else 2))
        assert rank["trainable"] == close(4 * trained / 2)
        assert rank["gradients"] == close(4 * trained / 2)
        assert rank["states"] == close(8 * trained / 2)
        assert rank["master"] == 0


FEW = ["--model=llama-tiny", "--bsz=4", "--steps=3", "--warmup-steps=1"]


@pytest.fixture(scope="module")
def still(forked, tmp_path_factory):
    """Every step of the run overflows and trains nothing."""
    return forked.train("torch", "full", tmp_path_factory.mktemp("still") / "r.json", *FEW, "--lr=1e-30")


@pytest.mark.parametrize("setup", [["--zero=1"], ["--nproc=2"], ["--zero=3", "--sharding=fsdp"]], ids=" ".join)
def test_fp16_skips_the_steps_that_overflow(forked, still, tmp_path, setup):
    """The loss, scaled by 2**16 and doubled for the mean of two replicas, overflows float16 once."""
    record = forked.train("torch", "full", tmp_path / "r.json", *FEW, "--dtype=fp16", "--amp=O1", *setup)
    assert record.steps.grad_norm[0] is None
    assert record.skipped_steps == 1
    assert record.steps.loss[:2] == pytest.approx(still.steps.loss[:2], rel=1e-4), "a skipped step trains nothing"
    assert record.steps.grad_norm[1:] == pytest.approx(still.steps.grad_norm[1:], rel=0.5), "of gradients without scale"
    assert record.steps.loss[2] < still.steps.loss[2] * 0.99


def test_what_paddle_cannot_do_on_a_cpu_is_unsupported(short, tmp_path):
    flags = ["--model=llama-tiny", *short, "--dtype=bf16", "--amp=O1", f"--out={tmp_path / 'r.json'}"]
    assert run_program("paddle/finetune_full.py", *flags).returncode == 1
    record = read_record(tmp_path / "r.json")
    assert (record.status, record.setup.dtype, record.setup.amp) == ("unsupported", "bf16", "O1")
    assert "no bfloat16 kernels for CPUs" in record.reason


@pytest.mark.parametrize(("family", "method"), [("llama", "full"), ("llama", "lora"), ("bloom", "lora")])
def test_paddle_gets_as_far_as_a_cpu_lets_it(forked, short, tmp_path, family, method):
    """With O2 a CPU builds model, adapters and optimizer. The first layer has no kernel there."""
    offered = "import tunebench.run.start as start; start.not_offered = lambda *_: None"
    flags = [f"--model={family}-tiny", *short, "--dtype=bf16", "--amp=O2"]
    record = forked.train("paddle", method, tmp_path / "r.json", *flags, code=offered)
    assert record.status == "failed"
    kernel = "layer_norm" if family == "bloom" else "matmul"
    assert f"bfloat16) of kernel `{kernel}` is not registered" in record.reason
    assert record.model.trainable_parameters


@pytest.mark.parametrize(
    ("framework", "code", "what"),
    [
        # On a CPU, Paddle's autocast warns and computes in float32.
        ("paddle", "import tunebench.run.start as start; start.not_offered = lambda *_: None", "matrix products"),
        ("torch", "import precision; precision.autocast_forward = lambda *_: None", "matrix products"),
    ],
)
def test_a_precision_that_is_ignored_is_no_result(forked, short, tmp_path, framework, code, what):
    flags = ["--model=llama-tiny", *short, "--dtype=bf16", "--amp=O1"]
    record = forked.train(framework, "full", tmp_path / "r.json", *flags, code=code)
    assert record.status == "failed"
    assert record.reason == f"RuntimeError: --dtype bf16: {what} are in float32, not in bfloat16"
    assert record.kernels.matmuls == ["float32"]
    assert not record.steps.seconds
