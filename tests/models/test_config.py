"""Reading config.json: which configs are the same model, which are refused and how, and configs of the hub."""

import copy
import json

import pytest
from conftest import HERE

from tunebench.errors import BadInput
from tunebench.models.checkpoint import open_checkpoint
from tunebench.models.config import normalise, read_config
from tunebench.models.families import FAMILIES, family_of
from tunebench.models.presets import PRESETS, Preset
from tunebench.models.random_weights import write_random
from tunebench.run.unsupported import paddle_lacks

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 384}
QWEN2 = LLAMA | {"model_type": "qwen2"}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": None}
GLM = LLAMA | {"model_type": "glm", "head_dim": 16, "max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({"rope_theta": 5e5}, {"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": None}),
        ({"rope_theta": 5e5}, {"rope_theta": 500000, "rope_parameters": {"rope_theta": 5e5}}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0},
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4}},
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, "rope_theta": 1e4},
        ),
        (
            {"rope_scaling": {"rope_type": "llama3"} | LLAMA_3},
            {
                "rope_parameters": {"type": "llama3"} | LLAMA_3 | {"original_max_position_embeddings": None},
                "original_max_position_embeddings": 8192,
            },
        ),
        ({}, {"rope_scaling_type": None, "rope_scaling_factor": 1.0, "rope_scaling": None, "rope_parameters": None}),
        ({}, {"rope_scaling": {"rope_type": "default"}, "original_max_position_embeddings": 1024}),
        ({}, {"architectures": ["LlamaForCausalLM"], "head_dim": 16, "hidden_act": "swish"}),
        ({}, {"architectures": ["LLaMAForCausalLM"], "head_dim": None, "attention_bias": False, "mlp_bias": None}),
        ({}, {"architectures": None, "quantization_config": None, "sliding_window": None}),
        ({}, {"layer_types": ["full_attention", "full_attention"], "attention_dropout": 0, "pretraining_tp": 2}),
        ({"num_key_value_heads": 4}, {"num_key_value_heads": None}),
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_spellings_of_one_model(one, other):
    assert normalise(LLAMA | one) == normalise(LLAMA | other)


@pytest.mark.parametrize("nothing", ["rope_theta", "rope_scaling", "n_inner", "hidden_act"])
def test_null_is_as_if_it_were_not_there(nothing):
    assert normalise(BLOOM | {nothing: None}) == normalise(BLOOM)


def test_names_of_bloom():
    told = {k: v for k, v in BLOOM.items() if k not in ("n_layer", "n_head", "hidden_size")}
    told |= {"num_hidden_layers": 2, "num_attention_heads": 4, "n_embed": 64}
    assert normalise(told) == normalise(copy.deepcopy(BLOOM)) == normalise(BLOOM | told)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            LLAMA,
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta 10000.0 contradicts rope_param",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 5e5}},
            "rope_scaling.rope_theta",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2}},
            "'llama3' contradicts rope_sc",
        ),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type 'yarn' is not offered"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type 'dynamic' is not offered"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.type 'linear' needs factor, which is missing"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor '2' is not offered"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor True is not offered"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor 0 is not offered"),
        (LLAMA, {"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor 2.0 is not offered without a kind"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": 1.5}}, "attention_factor 1.5"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"} | LLAMA_3 | {"low_freq_factor": 4}}, "low_freq_factor 4"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling 'linear' is not offered"),
        (LLAMA, {"rope_parameters": [1]}, "rope_parameters [1] is not offered"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        (LLAMA, {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2}, "rope_scaling_type 'dynamic_ntk'"),
        (LLAMA, {"rope_scaling_factor": 2}, "rope_scaling_factor 2 is not offered without a kind"),
        (LLAMA, {"a\nb": 1}, "'a\\nb' 1 is not offered"),
        (LLAMA, {"rope_theta": "10000"}, "rope_theta '10000' is not offered"),
        (LLAMA, {"rope_theta": float("inf")}, "rope_theta inf is not offered"),
        (LLAMA, {"rope_theta": 0.5}, "rope_theta 0.5 is not offered"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor 0.5 is not offered"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not offered"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not offered"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor 0.5"),
        (LLAMA, {"alibi": True}, "alibi True is not offered"),
        (LLAMA, {"head_dim": 15}, "head_dim 15"),
        (LLAMA, {"head_dim": "16"}, "head_dim '16' is not offered"),
        (LLAMA, {"num_attention_heads": 4.0}, "num_attention_heads 4.0 is not offered"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers True is not offered"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        (LLAMA, {"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 64 is no multiple"),
        (LLAMA, {"rms_norm_eps": None, "layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05 is not offered"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not offered"),
        (LLAMA, {"attention_bias": True}, "attention_bias True is not offered"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout 0.1 is not offered"),
        (LLAMA, {"attention_dropout": "0"}, "attention_dropout '0' is not offered"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings 1 is not offered"),
        (BLOOM, {"tie_word_embeddings": 1}, "tie_word_embeddings 1 is not offered"),
        (LLAMA, {"partial_rotary_factor": True}, "partial_rotary_factor True is not offered"),
        (LLAMA, {"original_max_position_embeddings": "x"}, "original_max_position_embeddings 'x' is not offered"),
        (LLAMA, {"rope_theta": 1e4, "rotary_emb_base": 5e5}, "rotary_emb_base 500000.0 contradicts rope_theta 10000.0"),
        (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' is not offered"),
        (LLAMA, {"pad_token_id": "0"}, "pad_token_id '0' is not offered"),
        (LLAMA, {"eos_token_id": [1, "2"]}, "eos_token_id [1, '2'] is not offered"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window 4096 is not offered"),
        (
            LLAMA,
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types ['full_attention', 'sliding_att",
        ),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSequenceClassificatio"),
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "architectures ['MistralForCausalLM'] is not offered"),
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM' is not offered"),
        (LLAMA, {"quantization_config": {}}, "quantization_config {} is not offered"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config {'quant_method': 'gptq'}"),
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map {'AutoModelForCausalLM': 'm.M'}"),
        (LLAMA, {"fuse_attention_qkv": True}, "fuse_attention_qkv True is not offered"),
        (LLAMA, {"n_layer": 3}, "n_layer 3 is not offered: it is not known"),
        (LLAMA, {"transformers_weights": "other.safetensors"}, "transformers_weights 'other.safetensors'"),
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling 8.0 is not offered: it is not known"),
        (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder True is not offered"),
        (LLAMA, {"model_type": "qwen3"}, "model_type 'qwen3' is not offered"),
        (MISTRAL, {"sliding_window": "4096"}, "sliding_window '4096' is not offered"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window 0 is not offered"),
        (MISTRAL, {"sliding_window": True}, "sliding_window True is not offered"),
        (MISTRAL, {"max_position_embeddings": "4096"}, "max_position_embeddings '4096' is not offered"),
        (MISTRAL, {"architectures": ["LlamaForCausalLM"]}, "architectures ['LlamaForCausalLM'] is not offered"),
        (MISTRAL, {"num_local_experts": 8}, "num_local_experts 8 is not offered"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window True is not offered"),
        (QWEN2, {"attention_bias": False}, "attention_bias False is not offered"),
        (QWEN2, {"use_mrope": True}, "use_mrope True is not offered"),
        (GLM, {"partial_rotary_factor": 1.0}, "partial_rotary_factor 1.0 is not offered"),
        (GLM, {"tie_word_embeddings": True}, "tie_word_embeddings True is not offered"),
        (BLOOM, {"n_embed": 32}, "n_embed 32 contradicts hidden_size 64"),
        (BLOOM, {"num_hidden_layers": 3}, "num_hidden_layers 3 contradicts n_layer 2"),
        (BLOOM, {"n_head": 3}, "hidden_size 64 is no multiple of n_head 3"),
        (BLOOM, {"tie_word_embeddings": False}, "tie_word_embeddings False is not offered"),
        (BLOOM, {"slow_but_exact": True}, "slow_but_exact True is not offered"),
        (BLOOM, {"rope_theta": 1e4}, "rope_theta 10000.0 is not offered"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_is_refused_is_named_with_its_value(base, changes, message):
    with pytest.raises(ValueError) as refusal:
        normalise(copy.deepcopy(base | changes))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_count_of_key_value_heads_is_what_both_libraries_take_it_for():
    told = {k: v for k, v in QWEN2.items() if k != "num_key_value_heads"}
    with pytest.raises(ValueError, match="num_key_value_heads 32"):
        normalise(told)
    assert normalise({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    "text", ['{"vocab_size": 1, "vocab_size": 2}', "[1]", "{", "[" * 100_000, "null", '{"a": NaN}']
)
def test_content_that_is_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput) as refusal:
        read_config(tmp_path)
    assert "config.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("base", "changes", "reason"),
    [
        (LLAMA, {"head_dim": 32}, "head_dim is 32 here, not 16"),
        (GLM, {"head_dim": 32}, "head_dim is 32 here, not 16"),
        (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "does not scale the rotary embedding of qwen2"),
        (GLM, {"rope_theta": 5e5}, "rotary base 10000 alone"),
        (LLAMA, {"max_position_embeddings": 2**31 - 1}, "rotary tables of all positions"),
        (LLAMA, {"max_position_embeddings": 2**20}, None),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 1e8}}, "GiB here, of at most 32"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"} | LLAMA_3}, None),
        (QWEN2, {"rope_theta": 5e5}, None),
        (BLOOM, {"layer_norm_epsilon": 0.01}, "an epsilon of at most 0.001"),
        (BLOOM, {"layer_norm_epsilon": 0.001}, None),
        (BLOOM, {}, None),
    ],
)
def test_what_paddle_does_not_offer(base, changes, reason):
    lacking = paddle_lacks(normalise(base | changes))
    assert lacking is None if reason is None else reason in lacking


@pytest.mark.parametrize(
    ("changes", "positions", "groups"),
    [
        ({"sliding_window": 4096, "max_position_embeddings": 32768}, 4096, 2),
        ({"sliding_window": None, "max_position_embeddings": 32768}, 32768, 2),
        ({"sliding_window": 65536, "max_position_embeddings": 32768}, 32768, 2),
        ({}, 131072, 2),
        ({"num_attention_heads": 8, "num_key_value_heads": None}, 131072, 8),
    ],
)
def test_a_mistral_is_a_llama_for_samples_that_fit_its_window(changes, positions, groups):
    heads = {"num_attention_heads": changes.get("num_attention_heads", 4), "num_key_value_heads": groups}
    as_llama = normalise(LLAMA | heads | {"max_position_embeddings": positions})
    assert normalise(MISTRAL | changes | {"architectures": ["MistralForCausalLM"]}) == as_llama


def test_what_a_mistral_s_config_leaves_out_is_as_transformers_has_it():
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the Torch environment")
    given = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"}
    little = {key: value for key, value in MISTRAL.items() if key in given} | {"num_attention_heads": 8}
    told = transformers.AutoConfig.for_model(**little).to_dict()
    assert told["sliding_window"] == 4096
    read = normalise(little)
    assert read["max_position_embeddings"] == 4096
    both = read.keys() & told.keys() - {"model_type", "max_position_embeddings", "eos_token_id"}
    assert {key: read[key] for key in both} == {key: told[key] for key in both}


# Configs of the hub, with keys that training tools leave in them.
PUBLISHED = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Llama-3.2-1B": {
        "_name_or_path": "somebody/Llama-3.2-1B",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pad_token_id": 128004,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "unsloth_fixed": True,
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "bloom": {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "transformers_version": "4.20.0",
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": 250880,
    },
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Mistral-7B-v0.1", 7_241_732_096),
        ("bloom", 559_214_592),
    ],
)
def test_configs_of_the_hub_are_read_as_they_are(tmp_path, name, parameters):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path)
    sizes = (1 if len(shape) == 1 else shape[1] for shape in family_of(config).tensors(config).values())
    assert (
        sum(size * shape[0] for size, shape in zip(sizes, family_of(config).tensors(config).values(), strict=True))
        == parameters
    )
    assert paddle_lacks(config) is None
    assert family_of(config).computes(config).layers == PUBLISHED[name].get("num_hidden_layers", 24)


@pytest.mark.parametrize("base", [LLAMA, QWEN2, GLM, BLOOM], ids=lambda base: base["model_type"])
def test_configs_are_read_as_this_environment_s_library_writes_them(base):
    """All keys that transformers has, and those that PaddleNLP saves."""
    if HERE == "torch":
        from transformers import AutoConfig

        written = AutoConfig.for_model(**base, pad_token_id=None).to_json_string(use_diff=False)
    else:
        from paddlenlp import transformers

        names = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "bloom": "BloomConfig"}
        if base["model_type"] not in names:
            pytest.skip("PaddleNLP has Glm under another model_type, chatglm_v2")
        written = getattr(transformers, names[base["model_type"]])(**base).to_json_string(use_diff=True)
    told = json.loads(written)
    assert len(told) > len(base)
    assert normalise(told) | {"eos_token_id": None, "pad_token_id": None} == normalise(base) | {"eos_token_id": None}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_too(name):
    assert paddle_lacks(normalise(dict(PRESETS[name].config))) is None


def test_each_key_is_read_in_one_way():
    for family in FAMILIES.values():
        assert all(family.unused.values())
        assert not family.unused.keys() & family.only.keys()
        assert not family.unused.keys() & family.shape.model_fields.keys()


class TestTensors:
    """Tensors that the config does not describe or contradicts."""

    @pytest.fixture
    def folder(self, tmp_path):
        def make(tied, **more):
            from safetensors.numpy import load_file, save_file

            config = LLAMA | {"tie_word_embeddings": tied, "initializer_range": 0.02}
            write_random(tmp_path, Preset(config, "float32"), 0)
            tensors = load_file(tmp_path / "model.safetensors")
            for name, change in more.items():
                tensors[name.replace("__", ".")] = change(tensors)
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path

        return make

    def test_a_copy_of_a_tied_head_is_no_fault(self, folder):
        checkpoint = open_checkpoint(folder(True, lm_head__weight=lambda t: t["model.embed_tokens.weight"]))
        assert checkpoint.parameters == open_checkpoint(folder(True)).parameters

    @pytest.mark.parametrize(
        ("tied", "name", "change", "message"),
        [
            (True, "lm_head__weight", lambda t: t["model.embed_tokens.weight"] * 2, "differs from model.embed_tokens"),
            (
                True,
                "lm_head__weight",
                lambda t: t["model.embed_tokens.weight"].astype("float16"),
                "differs from model.embed_tokens",
            ),
            (False, "v_head__summary__bias", lambda t: t["model.norm.weight"], "v_head.summary.bias has no place"),
            (False, "score__weight", lambda t: t["model.norm.weight"], "score.weight has no place"),
            (False, "model__layers__2__mlp__up_proj__weight", lambda t: t["model.norm.weight"], "has no place"),
            (
                False,
                "model__layers__0__self_attn__q_proj__bias",
                lambda t: t["model.norm.weight"],
                "q_proj.bias has no place",
            ),
        ],
    )
    def test_others_are_refused(self, folder, tied, name, change, message):
        with pytest.raises(BadInput, match=message) as refusal:
            open_checkpoint(folder(tied, **{name: change}))
        assert "\n" not in str(refusal.value)

    def test_a_table_that_is_computed_is_no_fault(self, folder):
        open_checkpoint(
            folder(False, model__layers__0__self_attn__rotary_emb__inv_freq=lambda t: t["model.norm.weight"])
        )

    def test_an_adapter_is_no_model(self, folder):
        whole = folder(False)
        (whole / "adapter_config.json").write_text("{}")
        with pytest.raises(BadInput, match=r"adapter_config\.json"):
            open_checkpoint(whole)
