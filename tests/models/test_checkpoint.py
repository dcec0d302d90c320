"""The shared checkpoint: published sizes, reproducible bytes, and damage found before a run starts."""

import json
import math
import os
import pty
import re
import select
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

from tunebench.errors import BadInput
from tunebench.models.checkpoint import find_checkpoint, open_checkpoint
from tunebench.models.families import family_of
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import SHARD_BYTES, lora_a, write_random


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("bloomz-7b1-mt", 7_069_016_064),
        ("qwen2-7b", 7_615_616_512),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("chatglm2-6b", 6_243_584_000),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert sum(map(math.prod, family_of(PRESETS[name].config).tensors(PRESETS[name].config).values())) == parameters


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-tiny")])
def test_tiny_presets_are_real_models(name):
    checkpoint = find_checkpoint(name, "random", 0)
    heads = checkpoint.config.get("num_attention_heads") or checkpoint.config["n_head"]
    assert heads % 4 == 0
    assert checkpoint.config["vocab_size"] % 4 == 0
    assert 5e6 <= checkpoint.parameters <= 40e6
    again = open_checkpoint(checkpoint.folder)
    assert (again.weights_sha256, again.config_sha256) == (checkpoint.weights_sha256, checkpoint.config_sha256)


def test_seed_decides_the_weights(tmp_path):
    sums = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / run).mkdir()
        write_random(tmp_path / run, PRESETS["llama-tiny"], seed)
        sums[run] = open_checkpoint(tmp_path / run).weights_sha256
    assert sums["a"] == sums["b"] != sums["c"]


def test_shards_hold_the_same_weights(tmp_path):
    for run, shard in (("one", 1 << 30), ("many", 1 << 21)):
        (tmp_path / run).mkdir()
        write_random(tmp_path / run, PRESETS["bloom-tiny"], 0, shard_bytes=shard)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert len(one.files) == 1
    assert len(many.files) > 3
    whole = load_file(one.files[0])
    parts = {name: value for file in many.files for name, value in load_file(file).items()}
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


# data/prepare.py with llama-7b's layers cut to four: two shards with embedding and head. It ends with its own peak of
# resident memory, which ru_maxrss is not: that starts at the peak of whoever started the process.
WRITE_CUT_7B = """
import pathlib, runpy, sys
from tunebench.models.presets import PRESETS
PRESETS["llama-7b"] = PRESETS["llama-7b"].cut(4)
del sys.argv[0]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
print([line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0])
"""


@pytest.fixture
def spacious(tmp_path):
    """A folder for gigabytes, removed after the test: pytest keeps its own folders for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.frameworks
def test_large_weights_stream_shard_by_shard_and_show_progress(spacious):
    """On a terminal: each percentage is compared with the files on the disk when it is shown."""
    ours, its = pty.openpty()
    command = [sys.executable, "-P", "-c", WRITE_CUT_7B, ROOT / "data/prepare.py"]
    environment = os.environ | {"TUNEBENCH_CACHE": str(spacious), "TERM": "xterm", "COLUMNS": "120"}
    flags = ["--model=llama-7b", "--bsz=1", "--steps=1", "--samples=4"]
    child = subprocess.Popen([*command, *flags], stdin=its, stdout=its, stderr=its, cwd="/", env=environment)
    os.close(its)
    shown, shards_there = "", {}  # names of the shards on disk at each percentage
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                shown += os.read(ours, 1 << 16).decode(errors="replace")
            except OSError:  # the child closed the terminal
                break
            for percent in re.findall(r"random weights of llama-7b[^%]*?(\d+)%", shown):
                if percent not in shards_there:
                    shards_there[percent] = sorted(file.name for file in spacious.rglob("*.safetensors"))
        assert child.wait(timeout=60) == 0, shown
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert list(shards_there) == ["0", "50", "100"]
    assert shards_there["50"] == ["model-00001-of-00002.safetensors"]
    assert "model-00002-of-00002.safetensors" in shards_there["100"]
    sizes = [file.stat().st_size for file in sorted(spacious.rglob("model-*.safetensors"))]
    assert sizes == [pytest.approx(SHARD_BYTES, rel=0.01)] * 2
    assert sum(sizes) > 2e9  # more than the memory asserted below
    assert 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", shown)[1]) < 2e9


def test_lora_start_is_kaiming_uniform():
    torch_name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight"
    start = lora_a(0, torch_name, (8, 4096))
    assert start.dtype == np.float32
    assert np.abs(start).max() <= 1 / 64
    assert start.std() == pytest.approx(1 / 64 / math.sqrt(3), rel=0.02)
    assert np.array_equal(start, lora_a(0, "model.llama.layers.3.self_attn.q_proj.lora_A", (8, 4096)))
    assert not np.array_equal(start, lora_a(0, "model.llama.layers.2.self_attn.q_proj.lora_A", (8, 4096)))


@pytest.fixture
def folder(tmp_path):
    write_random(tmp_path, PRESETS["llama-tiny"], 0)
    (tmp_path / "fingerprint.json").unlink()
    return tmp_path


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def to_int8(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.astype(np.int8) for name, value in tensors.items()}, folder / "model.safetensors")


def test_the_config_names_that_bloom_checkpoints_use(tmp_path):
    write_random(tmp_path, PRESETS["bloom-tiny"], 0)
    parameters = open_checkpoint(tmp_path).parameters
    edit_config(tmp_path, hidden_size=None, n_embed=256)
    assert open_checkpoint(tmp_path).parameters == parameters
    edit_config(tmp_path, n_layer=None, n_head=None, num_hidden_layers=4, num_attention_heads=8)
    assert open_checkpoint(tmp_path).parameters == parameters


def test_a_fingerprint_in_a_folder_of_somebody_is_not_believed(folder):
    (folder / "fingerprint.json").write_text('{"weights_sha256": "0"}')
    assert open_checkpoint(folder).weights_sha256 != "0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
        (lambda f: edit_config(f, model_type="gpt2"), "model_type 'gpt2' is not offered"),
        (lambda f: edit_config(f, hidden_size=None), "hidden_size"),
        (lambda f: edit_config(f, num_hidden_layers=5), "lack model.layers.4"),
        (lambda f: edit_config(f, vocab_size=8000), "has shape"),
        (lambda f: edit_config(f, rope_scaling={"rope_type": "yarn"}), "rope_scaling.rope_type"),
        (lambda f: edit_config(f, rope_scaling="linear"), "rope_scaling 'linear' is not offered"),
        (lambda f: edit_config(f, model_type=["llama"]), "model_type ['llama'] is not offered"),
        (lambda f: edit_config(f, num_attention_heads=0), "num_attention_heads 0 is not offered"),
        (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu' is not offered"),
        (lambda f: edit_config(f, attention_bias=True), "attention_bias True is not offered"),
        (lambda f: edit_config(f, rms_norm_eps="x"), "rms_norm_eps 'x' is not offered"),
        (to_int8, "use weights in F32, F16 or BF16"),
        (cut, "not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    ],
)
def test_damage_is_named_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(BadInput) as refusal:
        open_checkpoint(folder)
    assert message in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)
