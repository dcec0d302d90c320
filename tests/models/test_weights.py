"""Checkpoints on both sides: of other programs, and with layers that Paddle splits differently."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FRAMEWORKS, HERE, ROOT, assert_one_curve, assert_one_model
from safetensors.numpy import load_file

from tunebench.models.checkpoint import find_checkpoint, open_checkpoint
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import write_random


def test_chatglm2_and_back(monkeypatch, tmp_path):
    pytest.importorskip("paddle", reason="needs the Paddle environment, where run_tests.sh runs it")
    monkeypatch.setattr(sys, "path", [str(ROOT / "paddle"), *sys.path])
    import weights
    from paddlenlp import transformers

    write_random(tmp_path, PRESETS["chatglm2-tiny"], 0, shard_bytes=1 << 17)  # q, k and v in different shards
    checkpoint = open_checkpoint(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(weights.read_config(checkpoint), dtype="float32")
    weights.load(model, checkpoint)
    state, config = model.state_dict(), checkpoint.config
    queries = config["num_attention_heads"] * config["head_dim"]
    ends = {"q_proj": (0, queries)}
    ends["k_proj"] = (queries, queries + config["num_key_value_heads"] * config["head_dim"])
    ends["v_proj"] = (ends["k_proj"][1], None)
    back = {}
    for source, (name, transpose, part) in weights.name_targets(model, config).items():
        value = state[name].numpy()
        value = value.T if transpose else value
        back[source] = value[slice(*ends[part])] if part else value
    stored = {name: value for file in checkpoint.files for name, value in load_file(file).items()}
    assert len(checkpoint.files) > 10
    assert back.keys() == stored.keys()
    assert all(np.array_equal(back[name], stored[name]) for name in stored)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("degree", [1, 2])
def test_joined_projections_are_in_paddlenlps_order(monkeypatch, dtype, degree):
    """Weights are read on the CPU in the model's dtype, also for a GPU."""
    paddle = pytest.importorskip("paddle", reason="needs the Paddle environment, where run_tests.sh runs it")
    monkeypatch.setattr(sys, "path", [str(ROOT / "paddle"), *sys.path])
    import weights

    heads, groups, size, inputs = 4, 2, 3, 2
    columns = {"q": heads * size, "k": groups * size, "v": groups * size, "gate": 8, "up": 8}
    names = {name: [f"{name}{i}" for i in range(n)] for name, n in columns.items()}
    numbers = {label: i for i, label in enumerate(label for labels in names.values() for label in labels)}
    parts = {
        name: paddle.to_tensor([[numbers[label]] * inputs for label in labels]).astype(dtype).T
        for name, labels in names.items()
    }
    for rank in range(degree):
        config = SimpleNamespace(tensor_parallel_degree=degree, tensor_parallel_rank=rank, num_key_value_heads=groups)
        per, own = heads // groups * size, groups // degree
        mine = [
            label
            for group in range(rank * own, (rank + 1) * own)
            for name, width in (("q", per), ("k", size), ("v", size))
            for label in names[name][group * width : (group + 1) * width]
        ]
        qkv = weights.joined(config, "qkv_proj", [parts[name] for name in "qkv"])
        assert qkv.astype("float32").tolist() == [[numbers[label] for label in mine]] * inputs
        half = slice(rank * 8 // degree, (rank + 1) * 8 // degree)
        both = weights.joined(config, "gate_up_fused_proj", [parts["gate"], parts["up"]])
        expected = [numbers[label] for label in names["gate"][half] + names["up"][half]]
        assert both.astype("float32").tolist() == [expected] * inputs


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("family", "method", "setup"),
    [
        ("llama", "lora", []),
        ("llama", "full", ["--mp=2"]),
        ("bloom", "full", ["--mp=4"]),
        ("chatglm2", "full", ["--mp=2"]),
        ("llama-3.2-1b", "full", ["--mp=2", "--fuse-projections"]),
    ],
    ids=lambda part: "".join(part),
)
def test_weights_are_whole_where_paddle_copies_them_as_to_a_gpu(alone, forked, short, tmp_path, family, method, setup):
    """A strided weight would read other bytes: Paddle copies bytes and strides into an empty tensor."""
    flags = [f"--model={family}-tiny", *short, *setup]
    record = forked.train("paddle", method, tmp_path / "r.json", *flags, PROGRAM="built_lazily.py")
    assert_one_curve(record, alone("paddle", family, method))


SAVE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], max_shard_size="8MB")
"""


@pytest.mark.frameworks
@pytest.mark.parametrize("family", ["llama-3.2-1b", "chatglm2"])
def test_a_checkpoint_that_transformers_saved_in_shards(forked, tmp_path, short, family):
    random = find_checkpoint(f"{family}-tiny", "random", 0)
    python, saved = ROOT / ".venv/torch/bin/python", tmp_path / "saved"
    subprocess.run([python, "-P", "-c", SAVE, random.folder, saved], check=True, capture_output=True, timeout=300)
    assert len(list(saved.glob("*.safetensors"))) > 2
    torch, paddle = (
        forked.train(
            framework, "full", tmp_path / f"{framework}.json", "--weights=pretrained", f"--model={saved}", *short
        )
        for framework in FRAMEWORKS
    )
    assert torch.model.parameters == random.parameters
    assert_one_model(torch, paddle)
    assert_one_curve(torch, paddle)


MISTRAL = """
import sys
import numpy
import torch
import transformers
sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, vocab_size=384, head_dim=16)
sizes |= dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=16, tie_word_embeddings=False)
transformers.set_seed(1)
model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, initializer_range=0.2))
model.save_pretrained(sys.argv[1])
tokens = torch.arange(3, 19)[None] * 19 % 384
numpy.save(sys.argv[2], model.eval()(tokens).logits.detach().numpy())
"""


@pytest.mark.frameworks
def test_a_mistral_that_transformers_saved(monkeypatch, tmp_path):
    """As long a sample as its window: the model that each side builds gives the logits of transformers' Mistral."""
    program = [ROOT / ".venv/torch/bin/python", "-P", "-c", MISTRAL, tmp_path, tmp_path / "logits.npy"]
    subprocess.run(program, check=True, capture_output=True, timeout=300)
    expected = np.load(tmp_path / "logits.npy")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config["model_type"], checkpoint.config["max_position_embeddings"]) == ("llama", 16)
    tokens = np.arange(3, 19)[None] * 19 % 384
    monkeypatch.setattr(sys, "path", [str(ROOT / HERE), *sys.path])
    import weights

    config = weights.read_config(checkpoint)
    if HERE == "torch":
        import torch

        logits = weights.load(config, checkpoint).eval()(torch.from_numpy(tokens)).logits.detach().numpy()
    else:
        import paddle
        from paddlenlp import transformers

        model = transformers.AutoModelForCausalLM.from_config(config, dtype="float32")
        weights.load(model, checkpoint)
        model.eval()
        logits = model(paddle.to_tensor(tokens))
        logits = (logits[0] if isinstance(logits, tuple) else logits).numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)
