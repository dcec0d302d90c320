"""The scripts in paddle/ on PaddleFormers' models, in an environment of their own: losses are those on PaddleNLP's."""

import os
import subprocess

import pytest
from conftest import ROOT, assert_one_curve, assert_one_model, refusal, run_program, train
from filelock import FileLock
from helpers import SUITE

from tunebench.record import read_record
from tunebench.report.pairing import LIKE_FOR_LIKE, join

pytestmark = pytest.mark.frameworks
PYTHON = ROOT / ".venv" / "paddleformers" / "bin" / "python"
HERE = {"TUNEBENCH_PADDLE": str(PYTHON)}
PRODUCTS = """
import sys

sys.path = ["paddle", *sys.path, "."]
import kernels_seen
import paddle
from paddle.base import core
from paddleformers.transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, vocab_size=384)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, fuse_rms_norm=False))


def count(*_):
    counts = core.get_low_precision_op_list().items()
    products = [each for name, each in counts if any(part in name for part in kernels_seen.PRODUCTS)]
    print(sum(int(each.split(",")[2]) for each in products), "in float32")


kernels_seen.watch(model, count)
model(paddle.ones([1, 5], "int64"))
"""
SAMPLES = """
import sys
from types import SimpleNamespace

sys.path = ["paddle", *sys.path, "."]
import attention
import paddle
from paddleformers.nn.attention.interface import AttentionInterface

known = AttentionInterface()
samples = attention.Samples([3, 1, 2], "cpu")
samples.ends = paddle.to_tensor(attention.sample_ends([3, 1, 2]))  # as on a GPU
one = paddle.rand([1, 4, 6, 16])
given = {"query": one, "key": one, "value": one, "attention_mask": None, "scaling": 0.25}
layer = SimpleNamespace(training=True)
expected = known["eager"](layer, **given, attn_mask_startend_row_indices=samples.ends.unsqueeze(1))[0]
for kernel in ("eager", "sdpa"):
    attended = attention.formers_by_sample(
        known[kernel], kernel == "sdpa", layer, **given, attn_mask_startend_row_indices=samples
    )[0]
    assert paddle.allclose(attended, expected, rtol=1e-5), kernel
print("equal")
attention.formers_by_flashmask(known["flashmask"], layer, **given, attn_mask_startend_row_indices=samples)
"""


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Makes the environment, which run_tests.sh does not."""
    with FileLock(ROOT / ".venv" / "paddleformers.lock"):
        own = {name: value for name, value in os.environ.items() if not name.startswith("TUNEBENCH_")}
        subprocess.run(["bash", ROOT / "setup.sh", "paddleformers", "--cpu"], check=True, env=own, timeout=600)


@pytest.mark.parametrize(
    ("family", "method", "setup"),
    [
        ("llama", "full", []),
        ("llama", "lora", ["--recompute", "--nproc=2"]),
        ("llama", "full", ["--zero=3", "--nproc=2", "--recompute"]),
        ("llama", "lora", ["--mp=2", "--micro-bsz=4"]),
        ("llama", "full", ["--zero=2", "--nproc=2", "--micro-bsz=2", "--overlap"]),
        ("llama-3.2-1b", "full", ["--mp=2", "--recompute", "--overlap"]),
        ("llama-3.2-1b", "lora", ["--attention=sdpa", "--head=labels"]),
        ("llama", "full", ["--padding-free", "--recompute", "--nproc=2"]),
        ("llama", "full", ["--tuned", "--order=plan", "--recompute"]),
        ("llama", "lora", ["--lean"]),
        ("llama-3.2-1b", "lora", ["--tuned", "--order=plan", "--nproc=2"]),
        ("llama", "full", ["--mp=2", "--sequence-parallel", "--attention=sdpa", "--padding-free"]),
        ("llama-3.2-1b", "lora", ["--mp=2", "--sequence-parallel", "--recompute"]),
    ],
    ids=lambda part: "".join(part),
)
def test_paddleformers_does_the_arithmetic_of_paddlenlp(alone, short, tmp_path, family, method, setup):
    record = train("paddle", method, tmp_path / "r.json", f"--model={family}-tiny", *short, *setup, env=HERE)
    assert record.versions["paddleformers"]
    assert "paddlenlp" not in record.versions
    assert record.predicted_peak_memory_bytes is None  # the formula is of PaddleNLP's layers
    pinned = alone("paddle", family, method)
    assert_one_model(record, pinned)
    assert_one_curve(record, pinned)


def run_code(code):
    """What the environment's Python did with some code, to which the modules of paddle/ are known."""
    return subprocess.run([PYTHON, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_products_of_positions_are_no_products_of_activations():
    """Each pass multiplies positions in float32, in low precision too, which would look like an ignored --dtype."""
    done = run_code(PRODUCTS)
    of_layers, of_head = 2 * (7 + 2), 1
    assert done.stdout.endswith(f"{of_layers + of_head} in float32\n"), done.stdout + done.stderr


def test_samples_end_to_end_see_themselves_alone():
    """PaddleFormers gives the indices the same meaning. Its flashmask takes them up to a check for GPUs."""
    done = run_code(SAMPLES)
    assert done.stdout.endswith("equal\n"), done.stderr
    assert "FLAGS_cudnn_deterministic" in done.stderr.splitlines()[-1]


def test_both_libraries_have_a_row_beside_torch(alone, short, tmp_path):
    ours = train("paddle", "full", tmp_path / "r.json", "--model=llama-tiny", *short, env=HERE)
    rows = join([alone("torch", "llama", "full"), alone("paddle", "llama", "full"), ours])
    assert {(row.paddle_setup, row.torch_setup, row.compared) for row in rows} == {
        ("fp32", "fp32", LIKE_FOR_LIKE),
        ("fp32, PaddleFormers", "fp32", LIKE_FOR_LIKE),
    }
    assert len(rows) == 2


def test_a_suite_with_its_interpreter(tmp_path):
    """As docs/running.md has it: the interpreter is named by a path from here, and runs start in another folder."""
    (tmp_path / "mini.toml").write_text(SUITE)
    command = ["bash", "run_all.sh", f"--suite={tmp_path / 'mini.toml'}", "--only=full/*", "--anyway"]
    own = os.environ | {"TUNEBENCH_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--paddle", PYTHON.relative_to(ROOT)], capture_output=True, text=True, env=own, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| fp32, PaddleFormers |" in done.stdout
    (record,) = (read_record(file) for file in (tmp_path / "results").rglob("paddle-r1.json"))
    assert record.versions["paddleformers"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model=qwen2-tiny"], "builds Qwen2 with PaddleFleet"),
        (["--model=bloom-tiny"], "has no Bloom"),
        (["--model=llama-tiny", "--fuse-projections"], "has no choice of projections in this model"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_what_the_scripts_do_not_train_on_it(tmp_path, flags, reason):
    run_program("paddle/finetune_full.py", *flags, f"--out={tmp_path / 'r.json'}", env=HERE)
    record = read_record(tmp_path / "r.json")
    assert record.status == "unsupported"
    assert reason in record.reason
    assert record.reason.count("PaddleFormers 1.") == 1


def test_a_forecast_is_refused():
    line = refusal(run_program("paddle/finetune_full.py", "--model=llama-7b", "--plan", env=HERE))
    assert line == (
        f"finetune_full.py: --plan is of PaddleNLP's models, and {PYTHON} has PaddleFormers; unset TUNEBENCH_PADDLE"
    )
