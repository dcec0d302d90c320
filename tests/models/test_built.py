"""Each side reads back what its framework built. A framework that computes something else fails the run."""

import pytest
from conftest import FRAMEWORKS, assert_one_curve, assert_one_model, run_program

from tunebench.models.presets import PRESETS, Preset
from tunebench.models.random_weights import write_random
from tunebench.record import read_record

pytestmark = pytest.mark.frameworks
FEW = ["--bsz=2", "--samples=4", "--steps=2", "--warmup-steps=1"]
# Faults of a library that ignores part of a config, by framework: the code that causes one, and the run's message.
FAULTS = [
    (
        "torch",
        "llama",
        """
from transformers.models.llama import modeling_llama as m
init = m.LlamaRMSNorm.__init__
m.LlamaRMSNorm.__init__ = lambda self, hidden_size, eps=0: init(self, hidden_size, 1e-5)
""",
        "norm_epsilon: 1e-05 ≠ 1e-06",
    ),
    (
        "paddle",
        "llama",
        """
from paddlenlp.transformers.llama import modeling as m
init = m.LlamaRotaryEmbedding.__init__
m.LlamaRotaryEmbedding.__init__ = lambda self, dim, max_position_embeddings=0, base=0: init(self, dim, 2048, 1e5)
""",
        "rotary[1]: 0.4869675 ≠ 0.5623413",
    ),
    (
        "paddle",
        "bloom",
        """
from paddlenlp.transformers.bloom import modeling as m
import paddle
m.BloomGelu.forward = lambda self, x: paddle.nn.functional.silu(x)
""",
        "activation: silu ≠ gelu_tanh",
    ),
]


@pytest.mark.parametrize(("framework", "family", "fault", "said"), FAULTS, ids=lambda part: part[:20].strip())
def test_a_model_that_is_not_the_config_s_never_takes_a_step(forked, tmp_path, framework, family, fault, said):
    record = forked.train(framework, "full", tmp_path / "r.json", f"--model={family}-tiny", *FEW, code=fault)
    assert record.status == "failed"
    assert f"the model that {framework} built is not that of the config: {said} of the config" in record.reason
    assert not record.steps.loss


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_record_says_what_was_built(alone, framework):
    llama, bloom, glm = (alone(framework, family, "full").model.built for family in ("llama", "bloom", "chatglm2"))
    assert llama.rotary == pytest.approx([10000 ** (-i / 16) for i in range(16)], rel=1e-5)
    assert (llama.activation, llama.norm_epsilon, llama.tied, llama.alibi) == ("silu", 1e-6, False, None)
    assert bloom.alibi == pytest.approx([2**-i for i in range(1, 9)])
    assert (bloom.activation, bloom.norm_epsilon, bloom.tied, bloom.rotary) == ("gelu_tanh", 1e-5, True, None)
    assert (len(glm.rotary), glm.key_value_heads, glm.heads, glm.head_size) == (8, 2, 8, 32)


def test_a_head_size_of_its_own_is_unsupported_in_paddle(forked, tmp_path):
    config = PRESETS["llama-tiny"].config | {"head_dim": 16, "num_hidden_layers": 2}
    write_random(tmp_path, Preset(config, "float32"), 0)
    torch = forked.train("torch", "full", tmp_path / "torch.json", f"--model={tmp_path}", *FEW)
    assert torch.model.built.head_size == 16
    run_program("paddle/finetune_full.py", f"--model={tmp_path}", *FEW, "--out", tmp_path / "paddle.json")
    paddle = read_record(tmp_path / "paddle.json")
    assert paddle.status == "unsupported"
    assert "head_dim is 16 here, not 32" in paddle.reason


def test_a_rotary_base_that_stands_in_rope_parameters_alone(forked, tmp_path):
    """As transformers 5 writes it; linear scaling too, and a padding token that the text has."""
    base = {name: value for name, value in PRESETS["llama-tiny"].config.items() if name != "rope_theta"}
    rotary = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    config = base | {"num_hidden_layers": 2, "rope_parameters": rotary, "pad_token_id": 300}
    write_random(tmp_path, Preset(config, "float32"), 0)
    torch, paddle = (
        forked.train(framework, "full", tmp_path / f"{framework}.json", f"--model={tmp_path}", *FEW)
        for framework in FRAMEWORKS
    )
    assert torch.model.built.rotary[1] == pytest.approx(5e5 ** (-1 / 16) / 2, rel=1e-6)
    assert_one_model(torch, paddle)
    assert_one_curve(torch, paddle)
