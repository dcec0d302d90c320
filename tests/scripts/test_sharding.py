"""ZeRO and tensor parallel shard: bytes of weights, gradients and optimizer states per process, by stage.

The bytes are those of tensors (tests/bytes_held.py), counted at the last of a few real steps. What the frameworks keep
beyond an even share is stated where it is tested.
"""

import json
from typing import NamedTuple

import pytest
from helpers import MODEL, close, probe

from tunebench.forecast.report import Answer
from tunebench.models.presets import PRESETS

pytestmark = pytest.mark.frameworks
FRAMEWORKS = ("torch", "paddle")
FLOAT, MIB = 4, 2**20
SHAPE = PRESETS[MODEL].config
HIDDEN, LAYERS = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
NORMS = (2 * LAYERS + 1) * HIDDEN * FLOAT
EMBEDDING = SHAPE["vocab_size"] * HIDDEN * FLOAT
LARGEST_OF_A_LAYER = SHAPE["intermediate_size"] * HIDDEN * FLOAT


class Whole(NamedTuple):
    """Bytes that a single process holds."""

    weights: int
    rest: int


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Flags for samples of a few words: short steps, and logits that are small beside the weights."""
    file = tmp_path_factory.mktemp("data") / "short.json"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    file.write_text(
        json.dumps([{"instruction": " ".join(words[: 2 + i % 7]), "output": words[i % 10]} for i in range(40)])
    )
    return [f"--model={MODEL}", f"--data={file}", "--bsz=4", "--steps=4", "--warmup-steps=1"]


@pytest.fixture
def count(work, forked, tmp_path):
    """`probe` with the flags of this file. What it counts is compared with the script's forecast of the same run."""

    def counted(framework, method, *flags):
        ranks, record = probe(forked, framework, method, tmp_path, *work, *flags)
        assert_forecast(forked, framework, method, ranks, tmp_path / "answer.json", *work, *flags)
        return ranks, record

    return counted


@pytest.fixture(scope="module")
def alone(work, forked, tmp_path_factory):
    """Bytes that one process holds, by framework. They must match the model's size, which tests the counting."""
    made = {}

    def whole(framework):
        if framework not in made:
            (held,), record = probe(forked, framework, "full", tmp_path_factory.mktemp(framework), *work)
            weights = record.model.parameters * FLOAT
            assert held["trainable"] == held["gradients"] == weights
            assert held["states"] == 2 * weights
            assert held["frozen"] == held["master"] == 0
            assert held["rest"] < 5 * MIB < weights / 4
            made[framework] = Whole(weights, held["rest"])
        return made[framework]

    return whole


def assert_forecast(forked, framework, method, ranks, out, *flags):
    """--plan forecasts what lasts and a step's gradients within 2%, on the process that holds most."""
    code, printed = forked.run(framework, method, *flags, "--plan", "--gpu=a100-80g", "--out", out)
    assert code == 0, printed
    memory = Answer.model_validate_json(out.read_text()).memory
    assert memory.accumulated == pytest.approx(max(rank["passes"][-1] for rank in ranks), rel=0.02)
    kinds = {"weights": ("trainable", "frozen"), "master_weights": ("master",), "moments": ("states",)}
    for kind, counted in kinds.items():
        assert memory.held[kind] == pytest.approx(
            max(sum(rank[name] for name in counted) for rank in ranks), rel=0.02
        ), kind


def most(framework: str, whole: Whole) -> int:
    """Bytes that a process may hold beside the counted kinds. DeepSpeed has a bucket of a million gradients."""
    return whole.rest + MIB + (2**20 * FLOAT if framework == "torch" else 0)


def assert_in_partition(gradients: int, share: float) -> None:
    """DeepSpeed's stages 1 and 2 cut one flat vector of all weights; a parameter across a cut stays whole on each side.

    (`copy_grads_in_partition`: with two ranks there is one cut, here within a layer.)
    """
    assert share * (1 - 1e-4) <= gradients <= share + LARGEST_OF_A_LAYER


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_zero_1_shards_optimizer_states(alone, count, framework):
    """Torch: DeepSpeed adds a float32 copy of this rank's share of the weights, though these are float32 already.

    It keeps whole gradients between the passes of a step, and lets go of the others' after the last. Paddle keeps them,
    and gives whole parameters to ranks, largest first: with this model all but even shares.
    """
    whole, (ranks, _) = alone(framework), count(framework, "full", "--zero=1", "--nproc=2", "--micro-bsz=1")
    share = whole.weights / 2
    for held in ranks:
        assert held["trainable"] == close(whole.weights)
        assert held["states"] == close(2 * share)
        assert held["passes"][0] == close(whole.weights)
        assert held["rest"] < most(framework, whole)
        if framework == "torch":
            assert_in_partition(held["gradients"], share)
            assert held["master"] == close(share)
        else:
            assert held["gradients"] == close(whole.weights)
            assert held["master"] == 0
    assert sum(held["states"] for held in ranks) == close(2 * whole.weights)


def test_zero_2_shards_gradients_on_torch(alone, count):
    """As ZeRO 1, but each pass frees the gradients of other ranks."""
    whole, (ranks, _) = alone("torch"), count("torch", "full", "--zero=2", "--nproc=2", "--micro-bsz=1")
    share = whole.weights / 2
    for held in ranks:
        assert held["trainable"] == close(whole.weights)
        assert held["states"] == close(2 * share)
        assert held["master"] == close(share)
        assert len(held["passes"]) == 2
        for gradients in held["passes"]:
            assert_in_partition(gradients, share)
        assert held["rest"] < most("torch", whole)


def test_zero_2_shards_gradients_on_paddle(alone, count):
    """Paddle gives whole parameters to ranks, so that shares differ by up to the largest one, an embedding.

    Each rank's gradients lie in a buffer of the size of the largest share (`_rank_buffer_size`). The buffer that a
    rank sent last stays in memory until the next one is sent, though released: the optimizer keeps the task
    (`_comm_task`).
    """
    whole, (ranks, _) = alone("paddle"), count("paddle", "full", "--zero=2", "--nproc=2", "--micro-bsz=1")
    shares = [held["states"] / 2 for held in ranks]
    assert sum(shares) == close(whole.weights)
    assert max(shares) - min(shares) <= EMBEDDING
    for held in ranks:
        assert held["trainable"] == close(whole.weights)
        assert held["passes"] == [close(max(shares))] * 2
        assert held["master"] == 0
    assert sum(held["rest"] for held in ranks) < 2 * (whole.rest + MIB) + max(shares)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_zero_3_shards_everything(alone, count, framework):
    """Norms are whole on each rank: Paddle does not slice them, DeepSpeed holds them whole beside the slices.

    (Paddle: `segment_size`. DeepSpeed: `stage3_param_persistence_threshold`.) DeepSpeed also adds a copy of this rank's
    slices: to find out that it needs none, it compares a device with its name, which is never equal.
    """
    whole = alone(framework)
    ranks, _ = count(framework, "full", "--zero=3", "--nproc=4", "--micro-bsz=1")
    for held in ranks:
        if framework == "torch":
            share = whole.weights / 4
            assert held["trainable"] == close(share + NORMS)
            assert held["master"] == close(share)
        else:
            share = (whole.weights - NORMS) / 4 + NORMS
            assert held["trainable"] == close(share)
            assert held["master"] == 0
        assert held["passes"] == [close(share)]
        assert held["states"] == close(2 * share)
        assert held["rest"] < most(framework, whole)


@pytest.mark.parametrize(("zero", "nproc"), [(2, 2), (3, 4)])
def test_fsdp_shards_everything(alone, count, zero, nproc):
    """Between the passes of a step too: stage 2 keeps the gathered weights within a pass alone. Masters are slices."""
    whole, flags = alone("torch"), [f"--zero={zero}", f"--nproc={nproc}", "--sharding=fsdp", "--micro-bsz=1"]
    ranks, _ = count("torch", "full", *flags)
    share = whole.weights / nproc
    for held in ranks:
        assert held["trainable"] == close(share)
        assert held["passes"] == [close(share)] * (4 // nproc)
        assert held["states"] == close(2 * share)
        assert held["master"] == 0
        assert held["rest"] < whole.rest + MIB


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_zero_3_shards_frozen_weights(alone, count, framework):
    """LoRA. Llama's matrices of it are so small that they are whole on each rank, as norms are.

    DeepSpeed has their slices beside them, and divides their gradients and states; Paddle has these whole too.
    """
    whole = alone(framework)
    ranks, record = count(framework, "lora", "--zero=3", "--nproc=2", "--micro-bsz=1")
    adapters = record.model.trainable_parameters * FLOAT
    for held in ranks:
        if framework == "torch":
            assert held["frozen"] == close(whole.weights / 2 + NORMS)
            share = adapters / 2
            assert held["trainable"] == close(share + adapters)
            assert held["master"] == close(share)
        else:
            assert held["frozen"] == close((whole.weights - NORMS) / 2 + NORMS)
            share = adapters
            assert held["trainable"] == close(adapters)
        assert held["passes"] == [close(share)] * 2
        assert held["states"] == close(2 * share)
        assert held["rest"] < most(framework, whole)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_mp_slices_everything(alone, count, framework):
    """Norms are whole on each rank.

    safetensors' slices of rows are views of the mapped checkpoint; each rank has written to its own pages alone.
    """
    whole, (ranks, _) = alone(framework), count(framework, "full", "--mp=4")
    slices = (whole.weights - NORMS) / 4 + NORMS
    for held in ranks:
        assert held["trainable"] == close(slices)
        assert held["after"]["private"] < slices
        assert held["states"] == close(2 * slices)
        assert held["passes"] == [close(slices)]
        assert held["master"] == 0
        assert held["rest"] < most(framework, whole)
