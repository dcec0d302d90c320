"""The tokenizer of a checkpoint: read from its files as transformers does, and never replaced silently."""

import json
import shutil

import pytest
import tokenizer
from conftest import ROOT, refusal, run_program

from tunebench.errors import BadInput
from tunebench.flags import parse_flags
from tunebench.models.checkpoint import find_checkpoint
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import write_random
from tunebench.plan import tokens_key

DATA = ROOT / "tests" / "data"
EXPECTED = json.loads((DATA / "tokenizer-ids.json").read_text())


def put(folder, files):
    """Writes files into a folder: JSON, text or bytes."""
    for name, content in files.items():
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def llama(tmp_path):
    """A folder with the tokenizer files of a published Llama that sentencepiece reads."""
    shutil.copy(DATA / "tokenizer.model", tmp_path)
    return put(tmp_path, {"config.json": {"model_type": "llama", "eos_token_id": 2}})


@pytest.mark.parametrize("case", EXPECTED["folders"])
def test_tokenizer_model_gives_the_tokens_of_transformers_slow_class(llama, case):
    found = tokenizer.of_checkpoint(put(llama, case["files"]))
    encoded = found.encode_batch(EXPECTED["texts"], add_special_tokens=False)
    for text, tokens, ids in zip(EXPECTED["texts"], encoded, case["ids"], strict=True):
        assert tokens.ids == ids, text
    assert [found.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "?!")] == [0, 1, 2, None]


CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": b""}, "tokenizer.model cannot be used: it is empty; put"),
        ({"tokenizer.model": b"\x0a\x03\x0a\x01a"}, "tokenizer.model cannot be used: sentencepiece cannot read it"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "tokenizer.model cannot be used: it is in tiktoken's format"),
        ({CONFIG: {"tokenizer_class": "GemmaTokenizer"}}, "tokenizer_config.json asks for a GemmaTokenizer"),
        ({CONFIG: {"tokenizer_class": ["LlamaTokenizer"]}}, "tokenizer_config.json asks for a ['LlamaTokenizer']"),
        ({CONFIG: {"add_prefix_space": False}}, "tokenizer_config.json asks for add_prefix_space False"),
        ({CONFIG: {"sp_model_kwargs": {"alpha": 1}}}, "asks for sp_model_kwargs {'alpha': 1}"),
        ({CONFIG: {"auto_map": {"AutoTokenizer": ["x.Y", None]}}}, "asks for auto_map"),
        ({CONFIG: {"pad_token": "[PAD]"}}, "it has no token '[PAD]', and no other file gives its id"),
        ({CONFIG: {"pad_token": {"content": "<s>", "lstrip": True}}}, "pad_token '<s>' asks for lstrip"),
        ({CONFIG: {"pad_token": 5}}, "pad_token must be text, not 5"),
        ({CONFIG: {"additional_special_tokens": "<s>"}}, "additional_special_tokens must be a list"),
        ({MAP: {"additional_special_tokens": 7}}, "additional_special_tokens must be a list, not 7"),
        ({"added_tokens.json": '{"[X]": Infinity}'}, "the added token '[X]' has the id inf"),
        ({"added_tokens.json": {"[X]": 1.5}}, "the added token '[X]' has the id 1.5"),
        ({"added_tokens.json": {"[X]": -5}}, "the added token '[X]' has the id -5"),
        ({"added_tokens.json": {"[X]": 2**31}}, "the added token '[X]' has the id 2147483648"),
        ({CONFIG: {"added_tokens_decoder": ["<s>"]}}, "added_tokens_decoder must be an object"),
        ({"added_tokens.json": {"[X]": "first"}}, "the added token '[X]' has the id 'first'"),
        ({"added_tokens.json": ["[X]"]}, "added_tokens.json is not a JSON object"),
        ({CONFIG: {"eos_token": "</s>"}, MAP: {"eos_token": "<s>"}}, "eos_token is '</s>' in tokenizer_config.json"),
        ({CONFIG: "{"}, "tokenizer_config.json is not readable JSON"),
        ({"config.json": {"model_type": "qwen2"}}, "tokenizer.model of a qwen2 model is not offered"),
    ],
)
def test_what_would_give_other_tokens_is_refused(llama, files, message):
    with pytest.raises(BadInput) as refused:
        tokenizer.of_checkpoint(put(llama, files))
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"vocab.json": {}, "merges.txt": ""}, "merges.txt, vocab.json"),
        ({"vocab.txt": "[PAD]\n"}, "vocab.txt"),
        ({"qwen.tiktoken": "IQ== 0\n"}, "qwen.tiktoken"),
        ({"spiece.model": b"x"}, "spiece.model"),
        ({"sentencepiece.bpe.model": b"x"}, "sentencepiece.bpe.model"),
        ({"tekken.json": {}}, "tekken.json"),
        ({"special_tokens_map.json": {"eos_token": "</s>"}}, "special_tokens_map.json"),
        ({CONFIG: {"tokenizer_class": "LlamaTokenizer"}}, "tokenizer_config.json for a LlamaTokenizer"),
    ],
)
def test_a_tokenizer_in_other_files_alone_is_refused(tmp_path, files, named):
    with pytest.raises(BadInput) as refused:
        tokenizer.of_checkpoint(put(tmp_path, files))
    assert f"has {named} and neither tokenizer.json nor tokenizer.model" in str(refused.value)


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint without a tokenizer."""
    folder = tmp_path / "ck"
    folder.mkdir()
    write_random(folder, PRESETS["llama-tiny"], seed=0)
    return folder


def test_a_checkpoint_without_a_tokenizer_says_each_time_what_is_taken_instead(checkpoint):
    arguments = [f"--model={checkpoint}", "--samples=8", "--bsz=2", "--steps=3"]
    said = "--model: its folder has no tokenizer: the text is encoded by the embedded one of 8192 tokens\n"
    for _ in range(2):
        assert said in run_program("data/prepare.py", *arguments, check=True).stdout
    arguments += ["--steps=4"]  # another plan of the same tokens
    assert said in run_program("data/prepare.py", *arguments, check=True).stdout
    put(checkpoint, {CONFIG: {"tokenizer_class": "LlamaTokenizer"}})
    assert "put the checkpoint's tokenizer.json into it" in refusal(run_program("data/prepare.py", *arguments))


def test_a_folder_in_place_of_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(BadInput, match=r"tokenizer\.json is a folder"):
        tokenizer.of_checkpoint(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_not_replaced(checkpoint):
    (checkpoint / "tokenizer.json").symlink_to("nowhere")  # a hub cache copied without its blobs looks so
    done = run_program("data/prepare.py", f"--model={checkpoint}", "--samples=8", "--bsz=2", "--steps=3")
    assert "tokenizer.json cannot be read: No such file or directory" in refusal(done)


def test_tokens_depend_on_every_file_of_the_tokenizer(checkpoint):
    flags = parse_flags("full", [f"--model={checkpoint}"])

    def key():
        return tokens_key(flags.model_dump(), find_checkpoint(flags.model, flags.weights, flags.seed))

    keys = [key()]
    shutil.copy(DATA / "tokenizer.model", checkpoint)
    for name in (CONFIG, MAP, "added_tokens.json", "tokenizer.json"):
        keys.append(key())
        put(checkpoint, {name: {}})
    keys.append(key())
    assert len(set(keys)) == 6


def test_a_run_with_tokenizer_model_alone(checkpoint):
    shutil.copy(DATA / "tokenizer.model", checkpoint)
    done = run_program("data/prepare.py", f"--model={checkpoint}", "--samples=8", "--bsz=2", "--steps=3", check=True)
    assert "8 samples of synthetic-en" in done.stdout
    assert "tokenizer" not in done.stdout.replace("tokenizing", "")
