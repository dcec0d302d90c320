"""Any config.json on both sides: equal losses, or one refusal, or `unsupported`; never a traceback.

TUNEBENCH_FUZZ_EXAMPLES=300 tries more of them than CI does.
"""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import FRAMEWORKS, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunebench.models.config import normalise
from tunebench.models.families import FAMILIES
from tunebench.models.presets import Preset
from tunebench.models.random_weights import write_random
from tunebench.record import Built

EXAMPLES = int(os.environ.get("TUNEBENCH_FUZZ_EXAMPLES", "40"))
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SHARED = {"vocab_size": 96, "hidden_size": 32, "initializer_range": 0.2, "pad_token_id": 3, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SHARED | LAYERS
GLM = LAYERS | SHARED | {"model_type": "glm", "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
BASES = [
    LLAMA,
    LLAMA | {"tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA_3},
    LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}},
    LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    LLAMA | {"model_type": "qwen2", "architectures": None, "tie_word_embeddings": True, "sliding_window": 4},
    GLM,
    {"model_type": "bloom", "n_layer": 2, "n_head": 4} | SHARED,
    {"model_type": "bloom", "n_layer": 2, "num_attention_heads": 4, "n_embed": 32, "vocab_size": 96},
]
# Keys that are mapped, known or foreign, and attribute names of the libraries' config classes.
KEYS = sorted(
    {key for base in BASES for key in base}
    | {key for family in FAMILIES.values() for key in (*family.unused, *family.only)}
    | {"rope_theta", "rope_scaling", "rope_parameters", "rope_scaling_type", "rope_scaling_factor", "rms_norm_eps"}
    | {"partial_rotary_factor", "original_max_position_embeddings", "layer_norm_epsilon", "hidden_act", "head_dim"}
    | {"attribute_map", "to_dict", "n_embd", "n_positions", "sub_configs", "base_model_tp_plan", "init_class", "x"}
)
ROTARY = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", None, 1]),
        "type": st.sampled_from(["default", "linear", "dynamic", None]),
        "factor": st.sampled_from([1, 2.0, 8, 1e8, "2", 0, None, True]),
        "rope_theta": st.sampled_from([1e4, 10000, 300.0, "1e4", -1, None]),
        "low_freq_factor": st.sampled_from([1.0, 4.0]),
        "high_freq_factor": st.sampled_from([4.0, 1]),
        "original_max_position_embeddings": st.sampled_from([32, 64]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0, 2]),
        "full_attention": st.just({"rope_theta": 1.0}),
    },
)
PLAIN = [
    None,
    True,
    False,
    0,
    1,
    2,
    4,
    8,
    16,
    32,
    2.0,
    1e-5,
    1e4,
    3e2,
    -1,
    95,
    96,
    2**31 - 1,
    10**12,
    "",
    "2",
    "silu",
    "linear",
]
VALUES = st.one_of(
    st.sampled_from([*PLAIN, "gelu", "swish", "LlamaForCausalLM", [], [1], {}, {"a": 1}, ["full_attention"] * 2]),
    st.sampled_from([["LLaMAForCausalLM"], ["LlamaForSequenceClassification"], ["sliding_attention"] * 2, [2, 3]]),
    ROTARY,
)


@st.composite
def configs(draw):
    """A config of one of the families, in which some keys are missing, moved, doubled, mistyped or foreign."""
    config = dict(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(0, 3))):
        change = draw(st.sampled_from(["drop", "set", "rotary", "double", "set"]))
        if change == "drop":
            config.pop(draw(st.sampled_from(sorted(config))), None)
        elif change == "set":
            config[draw(st.sampled_from(KEYS))] = draw(VALUES)
        elif change == "rotary":
            config[draw(st.sampled_from(["rope_parameters", "rope_scaling"]))] = draw(ROTARY)
        else:
            pairs = [("hidden_size", "n_embed"), ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads")]
            one, other = draw(st.sampled_from([*pairs, ("rope_theta", "rotary_emb_base"), ("dtype", "torch_dtype")]))
            config[other] = config.get(one, draw(VALUES))
    return config


@pytest.fixture(scope="module")
def sides():
    """A function that asks a side about a folder: tests/losses_of.py runs for both frameworks."""
    started = {}
    for framework in FRAMEWORKS:
        command = [ROOT / ".venv" / framework / "bin/python", "-P", ROOT / "tests/losses_of.py", framework]
        started[framework] = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    for process in started.values():
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "the script ended"

    def ask(folder: Path) -> dict[str, dict]:
        for process in started.values():
            print(json.dumps(str(folder)), file=process.stdin, flush=True)
        return {framework: json.loads(process.stdout.readline()) for framework, process in started.items()}

    yield ask
    for process in started.values():
        process.kill()
        process.wait()


def assert_the_same(answers: dict[str, dict]) -> str:
    """How both sides ended: with equal losses, both refusing, or one or both not offering it."""
    torch, paddle = answers["torch"], answers["paddle"]
    assert "error" not in torch, torch
    assert "error" not in paddle, paddle
    if "refused" in torch or "refused" in paddle:
        assert torch == paddle
        assert "\n" not in torch["refused"]
        return "refused"
    if "unsupported" in torch or "unsupported" in paddle:
        return "unsupported"
    assert paddle["loss"] == pytest.approx(torch["loss"], rel=1e-5)
    assert paddle["norm"] == pytest.approx(torch["norm"], rel=1e-4)
    assert Built(**torch["built"]).contradiction(Built(**paddle["built"])) is None
    return "equal"


def write(folder: Path, config: dict) -> None:
    """A checkpoint with this config.json, and weights that fit it where it is one."""
    for file in folder.iterdir():
        file.unlink()
    try:
        shape = normalise(config) | {"initializer_range": 0.2}
    except ValueError:
        shape = normalise(BASES[0]) | {"initializer_range": 0.2}
    if shape["vocab_size"] > 1000 or shape["hidden_size"] > 1000:  # too large to write: tensors are missing
        shape = normalise(BASES[0]) | {"initializer_range": 0.2}
    write_random(folder, Preset(shape, "float32"), 0)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.frameworks
class TestBothSides:
    """Two processes answer for all examples."""

    @pytest.mark.parametrize("base", BASES, ids=lambda base: base["model_type"])
    def test_each_base_is_one_model(self, sides, tmp_path, base):
        write(tmp_path, base)
        assert assert_the_same(sides(tmp_path)) == "equal"

    def test_any_config(self, sides, tmp_path):
        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100, suppress_health_check=list(HealthCheck)
        )
        @given(configs())
        def check(config):
            write(tmp_path, config)
            ended[assert_the_same(sides(tmp_path))] += 1

        ended = Counter()
        check()
        print(dict(ended))
        assert ended["equal"] > EXAMPLES / 10
        assert ended["refused"] > EXAMPLES / 10
