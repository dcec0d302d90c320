"""Flags: defaults, what follows from them, and one-line refusals that name the flag and what would work."""

import pytest
from conftest import refusal, run_program

from tunebench.errors import BadInput
from tunebench.flags import arguments_of, parse_flags, settle_precision


def test_a_bare_call(capsys):
    flags = parse_flags("lora", [])
    assert (flags.model, flags.weights, flags.data) == ("llama-tiny", "random", "synthetic-en")
    assert (flags.bsz, flags.micro_bsz, flags.accumulation, flags.steps, flags.warmup_steps) == (4, 4, 1, 30, 8)
    assert (flags.lora_r, flags.lora_alpha) == (8, 32)
    assert "llama-tiny (the default: no GPU visible)" in capsys.readouterr().out


def test_accumulation_follows_from_the_batch_sizes():
    flags = parse_flags("full", ["--model=llama-tiny", "--bsz=16", "--micro-bsz=4"])
    assert (flags.replicas, flags.accumulation) == (1, 4)


def test_a_cut_model_says_so_in_its_name():
    names = [parse_flags("full", ["--model=llama-tiny", f"--layers={n}"]).model_name for n in (3, 4)]
    assert names == ["llama-tiny-3-layers", "llama-tiny"]  # it has 4


def test_precision_says_what_is_held_in_it():
    dtypes = {}
    for arguments in ([], ["--dtype=bf16", "--amp=O1"], ["--dtype=fp16"]):
        flags = parse_flags("full", ["--model=llama-tiny", *arguments])
        dtypes[flags.amp] = (flags.weights_dtype, flags.compute_dtype)
    assert dtypes == {None: ("float32",) * 2, "O1": ("float32", "bfloat16"), "O2": ("float16",) * 2}


def test_flash_attention_in_float32_is_for_cpus():
    options = {"dtype": "fp32", "amp": None, "attention": "flash"}
    settle_precision(options, gpus=0)
    with pytest.raises(BadInput, match="--attention flash: no flash kernel for GPUs takes float32; use --dtype bf16"):
        settle_precision(options, gpus=1)


@pytest.mark.parametrize(
    ("arguments", "gpus", "found", "said"),
    [
        (["--steps=4"], 0, {"warmup_steps": 3}, "--warmup-steps 3 (the default 8 leaves none of 4 to time)"),
        (["--steps=1"], 0, {"warmup_steps": 0}, "--warmup-steps 0"),
        (["--steps=3", "--tuned"], 0, {"warmup_steps": 2, "compile": True}, "--warmup-steps 2"),
        (["--steps=2", "--tuned"], 0, {"warmup_steps": 1, "compile": False}, "--no-compile (the default of --tuned"),
        (["--nproc=3"], 0, {"bsz": 6, "micro_bsz": 2}, "--bsz 6 (not the default 4: a multiple of 3)"),
        (["--nproc=2", "--micro-bsz=3"], 0, {"bsz": 6}, "--bsz 6"),
        (["--samples=2", "--epochs=1"], 0, {"bsz": 2}, "--bsz 2 (not the default 4: 1 epoch(s) have 2 sample(s))"),
        (["--amp=O1"], 0, {"dtype": "bf16"}, "--dtype bf16 (not the default fp32: --amp O1 is for low precision)"),
        (["--attention=flash"], 4, {"dtype": "bf16", "nproc": 4}, "--dtype bf16"),
        (["--bsz=2"], 4, {"nproc": 2}, "--nproc 2 (not all 4 GPUs: --bsz and --mp allow no more)"),
        (["--mp=3"], 4, {"nproc": 3}, "--nproc 3"),
        (["--bsz=2", "--zero=2"], 4, {"nproc": 2}, "--nproc 2"),
        (["--bsz=8"], 4, {"nproc": 4, "bsz": 8}, ""),
        ([], 3, {"nproc": 3, "bsz": 6}, "--bsz 6"),
    ],
)
def test_a_default_gives_way_to_a_given_flag_and_says_so(monkeypatch, capsys, arguments, gpus, found, said):
    monkeypatch.setattr("tunebench.flags.visible_accelerators", lambda: ["a GPU"] * gpus)
    flags = parse_flags("full", ["--model=llama-tiny", *arguments], framework="torch").model_dump()
    assert found.items() <= flags.items()
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(printed) == bool(said)


def test_a_suites_table_as_a_command_line():
    table = {"tuned": True, "padding-free": False, "recompute": False, "steps": 4, "no-compile": False}
    assert arguments_of("full", table) == ["--tuned", "--no-padding-free", "--steps=4", "--compile"]
    for name, fault in (("steps", "--steps takes a value"), ("speed", "there is no flag --speed")):
        with pytest.raises(BadInput, match=f"{name} = false: {fault}"):
            arguments_of("full", {name: False})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=lama-tiny"], "--model lama-tiny: no such preset or folder; use one of llama-tiny, "),
        (["--model=me/mine", "--weights=random"], "--weights random is for presets"),
        (["--data=squad"], "--data squad: use synthetic-en, synthetic-zh, alpaca, guanaco, fixed:N (samples"),
        (["--data=missing.json"], "--data missing.json: no such file"),
        (
            ["--bsz=6", "--micro-bsz=4"],
            "--micro-bsz 4 does not divide --bsz 6 over 1 replica(s); use one of 1, 2, 3, 6",
        ),
        (["--mp=2", "--nproc=3"], "--mp 2 does not divide the 3 process(es) of a node; use --nproc 4 or --mp 1, 3"),
        (["--mp=2", "--zero=1"], "--zero 1 with --mp 2: not combined here"),
        (["--sequence-parallel"], "--sequence-parallel splits what --mp leaves whole; add --mp 2 or more"),
        (
            ["--mp=2", "--sequence-parallel", "--sweep"],
            "--sequence-parallel with --sweep: no formula knows such runs; leave it out, or use --plan",
        ),
        (["--sharding=fsdp"], "--sharding fsdp says what shards with --zero; add --zero 2 or 3, or leave it out"),
        (
            ["--sharding=fsdp", "--zero=1"],
            "--sharding fsdp has no stage 1: FSDP shards gradients too; use --zero 2 or 3",
        ),
        (["--sharding=fsdp", "--zero=3", "--sweep"], "--sharding fsdp with --sweep: its formulas are DeepSpeed's"),
        (["--fuse-projections", "--sweep"], "--fuse-projections with --sweep: no formula knows such runs"),
        (["--zero=2", "--nproc=1"], "--zero 2 has nothing to shard over in one process; use --nproc 2 or --zero 0"),
        (["--nproc=4", "--bsz=6"], "--bsz 6 does not divide over 4 replicas; use 4 or 8"),
        (
            ["--compile", "--warmup-steps=1"],
            "--warmup-steps 1 would time --compile too; use 2 or more, or --no-compile",
        ),
        (
            ["--amp=O1", "--dtype=fp32"],
            "--amp O1 is for low precision; use --dtype bf16 or fp16, or leave --amp out",
        ),
        (["--master=here:1"], "--master is for several nodes; add --nnodes"),
        (["--nnodes=2"], "--master is missing; with --nnodes name node 0"),
        (["--nnodes=2", "--master=here"], "--master here is no HOST:PORT"),
        (["--nnodes=2", "--master=here:1", "--node-rank=2"], "--node-rank 2: use 0 to 1, as --nnodes is 2"),
        (["--steps=5", "--warmup-steps=5"], "--warmup-steps 5 leaves none of the 5 step(s) to time; use at most 4"),
        (["--steps=2", "--compile"], "--compile takes 2 steps before those timed, of 2; use --steps 3 or more"),
        (["--packing=1024", "--no-padding-free"], "--packing has no padding; leave --no-padding-free out"),
        (["--out=/tmp"], "--out /tmp is a folder; name a file"),
        (["--out=/dev/null"], "--out /dev/null is no regular file; name another file"),
        (["--out=/dev/null/r.json"], "--out /dev/null/r.json: "),
        (["--layers=5"], "--layers 5: llama-tiny has 4; use at most 4"),
        (["--weights=pretrained"], "--weights pretrained needs a checkpoint: llama-tiny is a preset"),
    ],
)
def test_refused_in_combination(arguments, message):
    with pytest.raises(BadInput) as refused:
        parse_flags("full", ["--model=llama-tiny", *arguments])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bsz=0"], "argument --bsz: 0 is out of range; use 1 or more"),
        (["--bsz=two"], "argument --bsz: 'two' is no whole number"),
        (["--lr=0"], "argument --lr: 0 is out of range; use a number above 0"),
        (["--lr=nan"], "argument --lr: nan is out of range"),
        (["--seed=-1"], "argument --seed: -1 is out of range; use 0 to 4294967295"),
        (["--zero=4"], "argument --zero: invalid choice: 4 (choose from 0, 1, 2, 3)"),
        (["--dtype=int8"], "argument --dtype: invalid choice: 'int8' (choose from 'fp32', 'bf16', 'fp16')"),
        (["--steps=5", "--epochs=1"], "argument --epochs: not allowed with argument --steps"),
        (["--lora-r=8"], "unrecognized arguments: --lora-r=8"),
        (["--batch=8"], "unrecognized arguments: --batch=8"),
    ],
)
def test_refused_by_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags("full", arguments, prog="finetune_full.py")
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"finetune_full.py: {message}")


def test_prepare_refuses_in_one_line_too():
    assert "--data missing.json: no such file" in refusal(run_program("data/prepare.py", "--data", "missing.json"))
