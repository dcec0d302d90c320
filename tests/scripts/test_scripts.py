"""The four scripts: both frameworks do the same work, the records that they leave, and how they end."""

import csv
import datetime
import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, assert_one_curve, assert_one_model, refusal, run_program, train, train_altered

from tunebench.bootstrap import maths_settings
from tunebench.hardware import Accelerator
from tunebench.models.families import FAMILIES as MODEL_FAMILIES
from tunebench.models.families import family_of
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import write_random
from tunebench.record import Conditions, Device, Record, Taker, read_record
from tunebench.report.pairing import join
from tunebench.report.parity import parity
from tunebench.report.peers import render_peers
from tunebench.report.tables import COLUMNS, render

pytestmark = pytest.mark.frameworks

FAMILIES, METHODS, FRAMEWORKS = ("llama", "bloom"), ("full", "lora"), ("torch", "paddle")
SHORT = ["--model=llama-tiny", "--bsz=2", "--samples=10", "--steps=3", "--warmup-steps=1", "--lr=5e-4", "--seed=1"]


@pytest.fixture(scope="module")
def records(alone):
    """The records of 10 steps by (family, method, framework), all from the same start weights on the same tokens."""
    return {
        (family, method, framework): alone(framework, family, method)
        for family in FAMILIES
        for method in METHODS
        for framework in FRAMEWORKS
    }


@pytest.fixture(scope="module")
def folder(alone, tmp_path_factory):
    """Where they lie as files, and nothing else."""
    folder = tmp_path_factory.mktemp("records")
    for family, method, framework in itertools.product(FAMILIES, METHODS, FRAMEWORKS):
        *_, file = alone(framework, family, method).argv
        shutil.copy(file, folder / f"{family}-{method}-{framework}.json")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
class TestPairs:
    def test_the_loss_curves_are_one(self, records, family, method):
        torch, paddle = (records[family, method, framework] for framework in FRAMEWORKS)
        assert len(torch.steps.loss) == len(paddle.steps.loss) == 10
        assert_one_curve(torch, paddle)
        assert parity(paddle, torch) < 1e-4

    def test_they_learn(self, records, family, method):
        """The second half of the eight timed steps repeats the batches of the first."""
        loss = records[family, method, "torch"].steps.loss
        assert all(again < first for first, again in zip(loss[2:6], loss[6:], strict=True))

    def test_the_same_work(self, records, family, method):
        torch, paddle = (records[family, method, framework] for framework in FRAMEWORKS)
        assert torch.plan == paddle.plan
        assert_one_model(torch, paddle)
        assert torch.setup == paddle.setup
        assert torch.hardware.threads == paddle.hardware.threads
        assert torch.hardware.environment == paddle.hardware.environment
        for part in ("effective_tokens", "padded_tokens", "label_tokens"):
            assert getattr(torch.steps, part) == getattr(paddle.steps, part)

    def test_what_is_trainable(self, records, family, method):
        model = records[family, method, "paddle"].model
        shapes = family_of(PRESETS[f"{family}-tiny"].config).tensors(PRESETS[f"{family}-tiny"].config)
        adapters = [
            8 * sum(shape)
            for name, shape in shapes.items()
            if name.endswith(".weight") and name.split(".")[-2] in MODEL_FAMILIES[family].lora_targets
        ]
        assert len(adapters) == (12 if family == "llama" else 4)
        assert model.trainable_parameters == (sum(adapters) if method == "lora" else model.parameters)


def test_a_record_says_what_it_ran_on(records):
    for (_, _, framework), record in records.items():
        package = {"torch": "torch", "paddle": "paddlepaddle"}[framework]
        pins = (ROOT / framework / "requirements.txt").read_text()
        assert f"{package}=={record.versions[package].split('+')[0]}" in pins
        assert record.timed_from == 2
        assert len(record.steps.seconds) == 10
        assert all(seconds > 0 for seconds in record.steps.seconds)
        assert 0 < record.setup_seconds < 300
        assert record.peak_memory_bytes[0] > record.model.parameters * 4
        assert record.peak_memory_counter == "resident memory"
        assert record.hardware.threads == int(maths_settings()["OMP_NUM_THREADS"])
        assert record.hardware.device == "cpu"
        chosen = (os.environ | maths_settings()).get("MKL_DEBUG_CPU_TYPE")
        assert record.hardware.environment.get("MKL_DEBUG_CPU_TYPE") == chosen


def test_a_record_has_the_predicted_peak(records):
    """In fp32 a run holds 4 bytes of each weight, and 12 more of each trained one: its gradient and two moments."""
    for (_, method, _), record in records.items():
        model = record.model
        held = 4 * model.parameters + (16 if method == "lora" else 12) * model.trainable_parameters
        assert held <= record.predicted_peak_memory_bytes < 2**31


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("method", "flags"), [("lora", []), ("full", ["--zero=3"]), ("full", ["--mp=2"])], ids=str)
def test_a_forked_run_is_the_run_of_a_user(forked, tmp_path, framework, method, flags):
    """Many tests take their runs from tests/fork_server.py. All but times and memory is as of a run that is started."""
    files = [tmp_path / name / "r.json" for name in ("started", "forked")]
    started = train(framework, method, files[0], *SHORT, *flags)
    fork = forked.train(framework, method, files[1], *SHORT, *flags)
    assert fork.steps.model_dump(exclude={"seconds"}) == started.steps.model_dump(exclude={"seconds"})
    for name in ("model", "setup", "plan", "kernels", "versions", "git", "hardware", "timed_from"):
        assert getattr(fork, name) == getattr(started, name), name
    assert (fork.devices, len(fork.peak_memory_bytes)) == (started.devices, len(started.peak_memory_bytes))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("bloom", "full")])
def test_accumulation_and_recompute_change_nothing(forked, records, short, tmp_path, framework, family, method):
    whole = records[family, method, framework].steps
    flags = [f"--model={family}-tiny", *short, "--steps=3", "--micro-bsz=4", "--recompute"]
    record = forked.train(framework, method, tmp_path / "r.json", *flags)
    assert (record.setup.accumulation, record.setup.recompute) == (2, True)
    assert record.steps.loss == pytest.approx(whole.loss[:3], rel=1e-5)
    assert record.steps.grad_norm == pytest.approx(whole.grad_norm[:3], rel=1e-5)


@pytest.mark.parametrize(("family", "method"), [("llama", "full"), ("bloom", "lora")])
def test_recompute_saves_memory_and_nothing_else(tmp_path, family, method):
    """With this batch, activations are most of a run's memory. Samples have ordinary lengths.

    When the backward pass begins, those of all layers are held; with recompute, those of the layer that is at work.
    Eager attention's probabilities (samples x heads x width x width) are a part of them that the backward pass cannot
    do without. So those of all layers but one are the least that is saved; what else a layer holds is the margin.
    """
    config, bsz = PRESETS[f"{family}-tiny"].config, 4
    layers = config.get("num_hidden_layers") or config["n_layer"]
    heads = config.get("num_attention_heads") or config["n_head"]
    flags = [f"--model={family}-tiny", f"--bsz={bsz}", "--samples=40", "--steps=2", "--warmup-steps=1", "--seed=1"]
    # Freed large blocks go back to the system. By default glibc keeps some, and peaks of equal runs differ by 100 MB.
    env = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    both = {}
    for framework in FRAMEWORKS:
        plain = both[framework] = train(framework, method, tmp_path / "plain.json", *flags, env=env)
        recomputed = train(framework, method, tmp_path / "recomputed.json", *flags, "--recompute", env=env)
        assert (plain.setup.recompute, recomputed.setup.recompute) == (False, True)
        assert recomputed.steps.loss == pytest.approx(plain.steps.loss, rel=1e-6)
        assert recomputed.steps.grad_norm == pytest.approx(plain.steps.grad_norm, rel=1e-6)
        width = max(plain.steps.padded_tokens) // bsz
        assert width > 100
        saved = plain.peak_memory_bytes[0] - recomputed.peak_memory_bytes[0]
        assert saved > (layers - 1) * bsz * heads * width * width * 4, framework
    paddle, torch = both["paddle"], both["torch"]
    assert paddle.plan == torch.plan
    assert_one_curve(torch, paddle)


def test_a_checkpoint_folder_in_shards_with_its_own_tokenizer(forked, tmp_path):
    """--weights pretrained on both sides: shards, half precision on the disk, the checkpoint's own tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    source = PRESETS["bloom-tiny"]
    write_random(tmp_path, type(source)(source.config, "float16"), seed=5, shard_bytes=1 << 21)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["a few words to learn from"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    flags = [f"--model={tmp_path}", "--bsz=2", "--samples=8", "--steps=3", "--warmup-steps=1"]
    torch, paddle = (
        forked.train(framework, "full", tmp_path / f"{framework}.json", *flags) for framework in FRAMEWORKS
    )
    assert_one_model(torch, paddle)
    assert torch.model.name == tmp_path.name
    assert torch.plan == paddle.plan
    assert_one_curve(torch, paddle)


def test_both_environments_prepare_the_same_plans(tmp_path):
    """Each trains the embedded tokenizer anew. A plan's digest covers all tokens."""
    digests = {}
    for framework, data in itertools.product(FRAMEWORKS, ("synthetic-en", "synthetic-zh")):
        python, flags = ROOT / f".venv/{framework}/bin/python", ["--model=llama-tiny", "--samples=300"]
        done = subprocess.run(
            [python, ROOT / "data/prepare.py", *flags, f"--data={data}"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"TUNEBENCH_CACHE": str(tmp_path / framework)},
        )
        digests.setdefault(framework, []).append(done.stdout.rsplit("plan ", 1)[1].split(":")[0])
    assert digests["torch"] == digests["paddle"]
    assert len(set(digests["torch"])) == 2


def slower(record: Record, factor: float, mp: int = 1, zero: int = 0) -> Record:
    """The record of a run that took `factor` times as long, with another split if given."""
    steps = record.steps.model_copy(update={"seconds": [second * factor for second in record.steps.seconds]})
    setup = record.setup.model_copy(update={"mp": mp, "zero": zero, "nproc": 4 if mp > 1 or zero else 1})
    return record.model_copy(update={"steps": steps, "setup": setup})


def with_setup(record: Record, **changes) -> Record:
    """The record of a run with other flags."""
    return record.model_copy(update={"setup": record.setup.model_copy(update=changes)})


SECONDS_PER_TOKEN = {"torch": 0.002, "paddle": 0.0022}


def steady(record: Record) -> Record:
    """The record of this run with set times on a quiet machine: how fast this machine was decides no test."""
    cost = SECONDS_PER_TOKEN[record.framework]
    steps = record.steps.model_copy(update={"seconds": [count * cost for count in record.steps.padded_tokens]})
    return at(record.model_copy(update={"steps": steps, "conditions": conditions()}), 0.0)


def conditions(others: float = 0.0, **changes) -> Conditions:
    """Conditions of ten seconds on two cores of which other programs took `share` cores."""
    known = {"seconds": 10.0, "cores": 2, "busy_core_seconds": 20.0, "steal_core_seconds": 0.0}
    known |= {"idle_core_seconds": 0.0, "own_core_seconds": 20.0 - 10.0 * others, "run_delay_seconds": 0.1}
    known |= {"takers": [], "involuntary_switches": 3, "major_faults": 0, "swapped_bytes": 0, "gpus": []}
    return Conditions(**(known | {"memory_stall_seconds": 0.0, "mhz": None} | changes))


def at(record: Record, minutes: float, number: int = 0) -> Record:
    """The record of a run that a suite's round `number` started so many minutes after a moment."""
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(minutes=minutes)
    argv = [*record.argv[:-1], f"--out=x/{record.framework}-r{number}.json"] if number else record.argv
    return record.model_copy(update={"started_at": moment.isoformat(timespec="seconds"), "argv": argv})


class TestTables:
    @pytest.fixture
    def records(self, records):
        return {key: steady(record) for key, record in records.items()}

    def test_every_pair_has_a_speedup(self, records):
        rows = join(list(records.values()))
        assert [(row.family, row.method) for row in rows] == [
            ("bloom", "lora"),
            ("bloom", "full"),
            ("llama", "lora"),
            ("llama", "full"),
        ]
        for row in rows:
            torch, paddle = (records[row.family, row.method, framework] for framework in FRAMEWORKS)
            rates = [sum(r.steps.effective_tokens[2:]) / sum(r.steps.seconds[2:]) for r in (paddle, torch)]
            assert row.paddle_effective_tokens_per_second == pytest.approx(rates[0])
            assert row.torch_effective_tokens_per_second == pytest.approx(rates[1])
            assert row.speedup == pytest.approx(rates[0] / rates[1] - 1)
            assert row.parity < 1e-4
            assert (row.note, row.interval, row.compared) == (None, None, "like for like")

    @pytest.fixture
    def folder(self, records, tmp_path_factory):
        """Where they lie as files, and nothing else."""
        folder = tmp_path_factory.mktemp("steady")
        for key, record in records.items():
            record.write(folder / f"{'-'.join(key)}.json")
        return folder

    def test_printed_from_the_records_alone(self, records, folder):
        printed = run_program("summarize.py", folder, check=True).stdout
        heading = [cell.strip() for cell in printed.split("\n| ")[1].splitlines()[0].strip(" |").split("|")]
        assert heading == [column.title for column in COLUMNS]
        assert printed.index("### Bloom") < printed.index("### Llama")
        assert printed.count("| none: one round ") == 4
        assert printed.count(" (one round) ") == 4
        assert "Noise: not measured" in printed
        assert "One round is a look" in printed
        with_parity = run_program("summarize.py", folder, "--parity", check=True).stdout
        assert " | Parity (first loss, loss, norm) " in with_parity
        assert "no GPU" in printed

        rows = json.loads(run_program("summarize.py", folder, "--format=json", check=True).stdout)
        assert len(rows) == 4
        lines = list(
            csv.DictReader(io.StringIO(run_program("summarize.py", folder, "--format=csv", check=True).stdout))
        )
        for line, row in zip(lines, rows, strict=True):
            assert float(line["Speedup"].removesuffix("% (one round)")) / 100 == pytest.approx(
                row["speedup"], abs=0.0051
            )

    def test_other_work_is_not_compared(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        for field in ("sha256", "drawn_from"):
            other = paddle.model_copy(update={"plan": paddle.plan.model_copy(update={field: "0" * 64})})
            (row,) = join([torch, other])
            assert row.speedup is None
            assert row.refusal == "not the same work"
            assert f"plan.{field}: {'0' * 12} ≠ {getattr(torch.plan, field)[:12]}" in row.note

    @pytest.mark.parametrize(
        ("part", "changes", "said"),
        [
            ("hardware", {"machine": "0123456789ab"}, "hardware.machine: 0123456789ab ≠ "),
            ("hardware", {"governor": "powersave"}, "hardware.governor: powersave ≠ "),
            ("hardware", {"kernel": "1.0"}, "hardware.kernel: 1.0 ≠ "),
            ("hardware", {"environment": {}}, "hardware.environment.OMP_NUM_THREADS: None ≠ "),
            ("git", {"revision": "abc"}, "git.revision: abc ≠ "),
            ("git", {"changes": "abc"}, "git.changes: abc ≠ "),
            ("model", {"parameters": 7}, "model.parameters: 7 ≠ "),
            ("model", {"trainable_parameters": 7}, "model.trainable_parameters: 7 ≠ "),
            ("model", {"weights_sha256": "1" * 64}, "model.weights_sha256: 111111111111 ≠ "),
        ],
    )
    def test_other_machines_code_and_models_are_not_compared(self, records, part, changes, said):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        other = paddle.model_copy(update={part: getattr(paddle, part).model_copy(update=changes)})
        (row,) = join([torch, other])
        assert (row.speedup, row.refusal) == (None, "not the same work")
        assert said in row.note

    def test_gpus_with_another_power_limit_are_not_compared(self, records):
        """A GPU's description is set by hand here: this machine need not have one."""
        gpu = {"name": "A100", "memory_bytes": 1, "max_sm_clock_mhz": 1, "max_memory_clock_mhz": 1, "ecc": True}
        sides = []
        for framework, watts, clock in (("torch", 400.0, 100), ("paddle", 300.0, 200)):
            record = records["llama", "full", framework]
            accelerator = Accelerator(**gpu, power_limit_watts=watts, sm_clock_mhz=clock)
            hardware = record.hardware.model_copy(update={"accelerators": [accelerator]})
            sides.append(record.model_copy(update={"hardware": hardware}))
        (row,) = join(sides)
        assert row.note.endswith("not the same work: hardware.accelerators.0.power_limit_watts: 300.0 ≠ 400.0")

    def test_steps_that_drift_are_named(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        timed = len(torch.steps.seconds) - torch.timed_from
        steps = enumerate(torch.steps.padded_tokens)
        steady = [0.001 * tokens * (1 + 0.001 * (i % 3)) for i, tokens in steps]
        warming = [s * (1.2 if i < torch.timed_from + timed // 2 else 1.0) for i, s in enumerate(steady)]
        for seconds, said in ((steady, False), (warming, True)):
            other = torch.model_copy(update={"steps": torch.steps.model_copy(update={"seconds": seconds})})
            note = join([other, paddle])[0].note or ""
            told = "torch was not warm: steps took -17% in the second half of the timed ones" in note
            assert told == said, note
            ratio = "paddle's steps ÷ torch's changed by +20% in the second half of the timed ones" in note
            assert ratio == said, note
            # Without repeated batches there is no statement.
            tokens = [count + i for i, count in enumerate(other.steps.effective_tokens)]
            steps = other.steps.model_copy(update={"effective_tokens": tokens})
            note = join([other.model_copy(update={"steps": steps}), paddle])[0].note or ""
            assert "second half" not in note

    def test_a_round_that_stands_apart_is_marked_and_kept(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        factors = (1.0, 1.01, 0.99, 1.0, 2.0)
        (row,) = join([slower(side, factor) for factor in factors for side in (torch, paddle)])
        assert "torch run 5 of 5 stands apart" in row.note
        assert "torch-llama-full.json): see what else ran then" in row.note
        assert "stands apart by its ratio" not in row.note
        (row,) = join([r for f in factors for r in (slower(torch, f), paddle)])
        assert "round 5 stands apart by its ratio (+" in row.note
        (row,) = join([slower(side, factor) for factor in factors for side in (torch, paddle)])
        assert (row.torch_runs, row.paddle_runs) == (5, 5)
        assert row.torch_spread == pytest.approx(statistics.stdev(map(math.log, factors)))

    def test_other_losses_are_not_compared(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        loss = [*paddle.steps.loss[:-1], paddle.steps.loss[-1] * 1.01]
        (row,) = join([torch, paddle.model_copy(update={"steps": paddle.steps.model_copy(update={"loss": loss})})])
        assert row.speedup is None
        assert row.refusal == "losses differ"
        assert row.parity == pytest.approx(0.01, rel=0.01)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"rotary": [1.0, 0.5]}, "paddle model.built.rotary: 2 numbers ≠ 16 numbers"),
            ({"rotary": [2.0] * 16}, "paddle model.built.rotary[0]: 2 ≠ 1"),
            ({"norm_epsilon": 1e-5}, "model.built.norm_epsilon: 1e-05 ≠ 1e-06"),
            ({"tied": True}, "model.built.tied: True ≠ False"),
            ({"padding_row": 0}, "model.built.padding_row: 0 ≠ None"),
            (None, "model.built: known of one side alone"),
        ],
        ids=lambda part: part if isinstance(part, str) else "",
    )
    def test_other_models_are_not_compared(self, records, changes, said):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        built = None if changes is None else paddle.model.built.model_copy(update=changes)
        other = paddle.model_copy(update={"model": paddle.model.model_copy(update={"built": built})})
        for runs in ([torch, other], [torch, paddle, torch, other]):
            (row,) = join(runs)
            assert (row.speedup, row.refusal) == (None, "models differ")
            assert said.removeprefix("paddle ") in row.note

    def test_other_gradients_and_later_runs_count_too(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        norms = [norm * 1.002 for norm in paddle.steps.grad_norm]
        odd = paddle.model_copy(update={"steps": paddle.steps.model_copy(update={"grad_norm": norms})})
        (row,) = join([torch, paddle, torch, odd])
        assert (row.speedup, row.refusal, row.paddle_runs) == (None, "losses differ", 2)
        assert "steps.grad_norm of step " in row.note
        assert "2.0e-03 apart, allowed are 0.0001" in row.note

    def test_low_precision_has_its_own_tolerance(self, records):
        torch, paddle = (with_setup(records["llama", "full", side], dtype="bf16", amp="O2") for side in FRAMEWORKS)
        loss = [paddle.steps.loss[0], *(loss * 1.005 for loss in paddle.steps.loss[1:])]
        other = paddle.model_copy(update={"steps": paddle.steps.model_copy(update={"loss": loss})})
        (row,) = join([torch, other])
        assert (row.refusal, row.compared, row.paddle_setup) == (None, "like for like", "bf16 O2")
        (row,) = join([with_setup(torch, dtype="fp32", amp=None), with_setup(other, dtype="fp32", amp=None)])
        assert row.refusal == "losses differ"

    def test_unequal_precision_stands_side_by_side_without_a_speedup(self, records):
        torch = with_setup(records["llama", "full", "torch"], dtype="fp16", amp="O1")
        paddle = with_setup(records["llama", "full", "paddle"], dtype="fp16", amp="O2")
        (row,) = join([torch, paddle])
        assert (row.paddle_setup, row.torch_setup) == ("fp16 O2", "fp16 O1")
        assert (row.speedup, row.refusal, row.compared) == (None, "not the same work", None)
        assert "setup.amp: O2 ≠ O1" in row.note

    def test_steps_that_one_side_skipped_are_other_work(self, records):
        torch, paddle = (with_setup(records["llama", "full", side], dtype="fp16", amp="O2") for side in FRAMEWORKS)

        def skipping(record):
            norms = [None, *record.steps.grad_norm[1:]]
            return record.model_copy(update={"steps": record.steps.model_copy(update={"grad_norm": norms})})

        (row,) = join([torch, skipping(paddle)])
        assert row.refusal == "losses differ"
        assert "steps.grad_norm: the skipped steps differ: [1] ≠ none" in row.note
        (row,) = join([skipping(torch), skipping(paddle)])
        assert row.refusal is None
        assert "paddle skipped 1 steps (float16 overflowed); torch skipped 1 steps" in row.note

    def test_attention_is_part_of_the_setup_and_its_kernel_is_named(self, records):
        torch, paddle = (with_setup(records["llama", "full", side], attention="flash") for side in FRAMEWORKS)
        rows = join([torch, paddle, records["llama", "full", "torch"], records["llama", "full", "paddle"]])
        assert [row.paddle_setup for row in rows[:2]] == ["flash attention, fp32", "fp32"]
        assert {row.compared for row in rows[:2]} == {"like for like"}
        assert "paddle ran softmax; torch ran softmax" in rows[0].note

    def test_other_versions_are_no_repeats(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        newer = paddle.model_copy(update={"versions": paddle.versions | {"paddlenlp": "9.9"}})
        rows = join([torch, paddle, newer])
        assert [row.paddle_runs for row in rows] == [1, 1]
        assert sum(row.speedup is not None for row in rows) == 1
        assert any("paddle 9.9" in row.note for row in rows)

    def test_the_interval_is_students_t_of_the_rounds(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        rounds = [(slower(paddle, a), slower(torch, b)) for a, b in ((2.0, 1.0), (2.2, 1.1), (2.5, 1.0))]
        (row,) = join([record for pair in rounds for record in pair])
        rates = paddle.effective_tokens_per_second / torch.effective_tokens_per_second
        ratios = [math.log(rates / factor) for factor in (2.0, 2.0, 2.5)]
        middle, spread = statistics.mean(ratios), 4.302653 * statistics.stdev(ratios) / math.sqrt(3)
        assert math.log1p(row.speedup) == pytest.approx(middle)
        assert [math.log1p(end) for end in row.interval] == pytest.approx([middle - spread, middle + spread])
        assert row.torch_spread == pytest.approx(statistics.stdev([0, math.log(1.1), 0]))
        interval = f"{row.interval[0]:+.1%} to {row.interval[1]:+.1%}"
        assert f"{interval} | {row.round_noise:.1%}       | 3 " in render([row], "md", [torch, paddle])
        assert row.round_noise == pytest.approx(statistics.stdev(ratios))

    def test_a_round_that_was_run_again_keeps_its_place(self, records):
        """The first round was measured last. The files' names, not the times, number the rounds."""
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        rounds = []
        for number, (factor, minute) in enumerate(((1.0, "09"), (2.0, "02"), (3.0, "03")), 1):
            for side, when in ((paddle, minute), (torch, minute)):
                argv, started_at = [*side.argv[:1], f"--out=x/{side.framework}-r{number}.json"], f"2026-01-01T00:{when}"
                rounds.append(slower(side, factor).model_copy(update={"argv": argv, "started_at": started_at}))
        (row,) = join(sorted(rounds, key=lambda record: record.started_at))
        assert row.interval == pytest.approx((row.speedup, row.speedup))  # each round has the same ratio

    def test_an_interval_across_zero_is_within_3_percent_or_tells_nothing(self, records):
        torch = records["llama", "full", "torch"]
        paddle = torch.model_copy(update={"framework": "paddle"})
        (row,) = join([slower(paddle, 1.1), torch, paddle, slower(torch, 1.2)])
        assert row.interval[0] < 0 < row.interval[1]
        said = f"not told apart ({row.interval[0] * 100:+.1f} to {row.interval[1]:+.1%})"
        assert f"| {said} |" in render([row], "md", [torch, paddle])
        (row,) = join([slower(paddle, 1.001), torch, paddle, slower(torch, 1.001)])
        assert "| within ±3% |" in render([row], "md", [torch, paddle])
        (row,) = join([slower(paddle, 1.02), torch, slower(paddle, 1.021), torch])
        assert "| -2.0%   |" in render([row], "md", [torch, paddle])

    def test_a_speedup_comes_from_complete_rounds_alone(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        whole = [at(slower(side, f), n, n) for n, f in ((1, 1.0), (2, 1.5)) for side in (paddle, torch)]
        alone = at(slower(paddle, 9.0), 3, 3)
        stitched = [at(slower(paddle, 9.0), 4, 4), at(torch, 64, 4)]
        (expected,), (row,) = join(whole), join([*whole, alone, *stitched])
        assert (row.speedup, row.interval, row.rounds, row.dropped) == (expected.speedup, expected.interval, 2, 2)
        assert row.paddle_effective_tokens_per_second == expected.paddle_effective_tokens_per_second
        assert "2 round(s) left out" in row.note
        (row,) = join(stitched)
        assert (row.speedup, row.refusal) == (None, "no complete round")
        # Runs of half an hour: up to three of them may lie between two starts.
        long = [r.model_copy(update={"setup_seconds": 1800.0}) for r in stitched]
        assert join(long)[0].rounds == 1

    def test_rounds_of_other_batches_are_one_comparison(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]

        def of_round(record, number):
            plan = record.plan.model_copy(update={"sha256": str(number) * 64})
            return at(record.model_copy(update={"plan": plan}), number, number)

        rounds = [of_round(slower(side, f), n) for n, f in ((1, 1.0), (2, 1.5)) for side in (paddle, torch)]
        (row,) = join(rounds)
        assert (row.rounds, row.refusal) == (2, None)
        (row,) = join([of_round(paddle, 1), of_round(torch, 2).model_copy(update={"argv": rounds[1].argv})])
        assert row.refusal == "not the same work"

    @pytest.mark.parametrize("side", FRAMEWORKS)
    def test_what_others_took_is_marked_and_then_there_is_no_speedup(self, records, side):
        pair = {framework: records["llama", "full", framework] for framework in FRAMEWORKS}

        def row_with(found):
            runs = pair | {side: pair[side].model_copy(update={"conditions": found})}
            (row,) = join(list(runs.values()))
            return row, [render([row], form, list(runs.values())) for form in ("md", "csv", "json")]

        row, _ = row_with(conditions(0.009))
        assert (row.note, row.refusal) == (None, None)
        row, texts = row_with(conditions(0.02, takers=[Taker(name="backup", core_seconds=0.2)]))
        assert row.refusal is None
        assert all(f"{side} was marked: others took 2.0% of a core (backup 2.0%)" in text for text in texts)
        row, texts = row_with(conditions(0.98))
        assert (row.speedup, row.interval) == (None, None)
        assert all(f"disturbed: {side}: others took 98.0% of a core" in text for text in texts)
        assert getattr(row, f"{side}_disturbance") == pytest.approx(0.98)
        assert row_with(conditions(0.0, steal_core_seconds=0.6))[0].refusal.endswith("(the hypervisor 6.0%)")
        apart = [at(pair["paddle"], 0), at(pair["torch"], 5)]
        apart = [run.model_copy(update={"conditions": conditions(0.5)}) for run in apart]
        assert join(apart)[0].refusal.startswith("disturbed: "), "also where it waited between the two"
        row, _ = row_with(None)
        assert row.note == f"conditions not recorded ({side})"
        assert row.speedup is not None
        assert "was timed for 1.2 s alone" in row_with(conditions(seconds=1.2))[0].note
        assert f"{side} 7 MiB were swapped" in row_with(conditions(swapped_bytes=7 << 20))[0].note

    def test_what_others_took_of_a_gpu_counts_and_idle_cores_beside_it_do_not(self, records):
        """A GPU is set by hand here: this machine need not have one."""
        gpu = {"memory_bytes": 0, "sm_clock_mhz": 1410, "throttled": ["power limit"]}
        sides = [records["llama", "full", framework] for framework in FRAMEWORKS]
        for idle, share, refused in ((30.0, 0.0, False), (1.0, 0.0, True), (30.0, 0.2, True)):
            found = conditions(0.98, idle_core_seconds=idle, gpus=[Device(processes=0, share=share, **gpu)])
            runs = [
                record.model_copy(
                    update={"conditions": found, "hardware": record.hardware.model_copy(update={"device": "A100"})}
                )
                for record in sides
            ]
            (row,) = join(runs)
            assert (row.refusal is not None) == refused
        assert "other processes took 20% of GPU 0" in row.refusal
        gpu["throttled"] = ["thermal (hardware)"]
        device = Device(processes=2, share=None, **gpu)
        assert conditions(gpus=[device]).remarks() == [
            "GPU 0 was throttled: thermal (hardware)",
            "GPU 0 was shared with 2 other process(es)",
            "what others took of GPU 0 is not known",
        ]
        assert conditions(run_delay_seconds=1.0).remarks() == []
        assert "waited for a core for 10% of the time" in conditions(run_delay_seconds=1.0, gpus=[device]).remarks()[0]

    def test_one_round_is_worth_what_the_noise_of_the_machine_allows(self, records):
        pair = [records["llama", "full", framework] for framework in FRAMEWORKS]
        factors = {("torch", "a"): (1, 1.02, 1.04), ("torch", "b"): (1.01, 1.01, 1.01)}
        factors |= {("paddle", "a"): (1, 1, 1), ("paddle", "b"): (1, 1.03, 1.0)}
        itself = []
        for (framework, side), by_round in factors.items():
            for number, factor in enumerate(by_round, 1):
                run = at(slower(records["llama", "full", framework], factor), number, number)
                itself.append(run.model_copy(update={"aa": side}))
        (row,) = join([*pair, *itself])
        rows = [[math.log(a / b) for a, b in zip(factors[f, "a"], factors[f, "b"], strict=True)] for f in FRAMEWORKS]
        pooled = math.sqrt(statistics.fmean([statistics.variance(ratios) for ratios in rows]))
        assert row.noise == pytest.approx(math.expm1(2.776445 * pooled))  # t of four degrees of freedom
        text = render([row], "md", [*pair, *itself])
        assert f" ± {row.noise:.0%} (one round, A/A noise) |" in text
        assert "0 of 2 comparisons claimed a difference where there is none; chance makes 0.1 of them" in text

    def test_the_runner_up_and_a_tie_stand_beside_the_best_of_each(self, records):
        sides = {framework: records["llama", "full", framework] for framework in FRAMEWORKS}
        times = {
            (4, 0): {"paddle": (1.0, 1.0, 1.0), "torch": (1.3, 1.3, 1.3)},
            (1, 3): {"paddle": (1.02, 0.99, 1.01), "torch": (1.0, 1.01, 1.0)},
        }
        runs = [
            at(slower(record, times[split][framework][n - 1] / sum(record.steps.seconds[2:]), *split), 5 * n + i, n)
            for framework, record in sides.items()
            for i, split in enumerate(times)
            for n in (1, 2, 3)
        ]
        *_, row = join(runs)
        assert row.compared == "best of each"
        assert "paddle's runner-up is ZeRO 3, fp32 (-0.7%, a tie)" in row.note
        assert "torch's runner-up is MP 4, fp32 (-22.8%, told apart)" in row.note
        assert "minutes apart" not in row.note
        far = [at(r, 40 * n + 8 * bool(r.setup.zero), n) for n, r in zip((1, 2, 3) * 4, runs, strict=True)]
        long = [r.model_copy(update={"setup_seconds": 1800.0}) for r in far]  # then there is no pause between them
        *_, row = join(long)
        assert "its sides ran up to 8 minutes apart" in row.note
        one = [r.model_copy(update={"conditions": conditions(0.5)}) if i == 6 else r for i, r in enumerate(runs)]
        assert join(one)[-1].refusal.startswith("disturbed: paddle: "), "the best is not hidden by one disturbed round"
        later = [at(r, 600 + 5 * n, n) if r.setup.zero else r for n, r in zip((1, 2, 3) * 4, runs, strict=True)]
        assert all(row.compared != "best of each" for row in join(later)), "hours lie between the two"

    def test_like_for_like_first_then_the_best_of_each_side(self, records):
        sides = {framework: records["llama", "full", framework] for framework in FRAMEWORKS}
        times = {(4, 0): {"paddle": 1.0, "torch": 1.2}, (1, 3): {"paddle": 1.5, "torch": 1.1}}
        runs = [
            slower(record, times[split][framework] / sum(record.steps.seconds[2:]), *split)
            for framework, record in sides.items()
            for split in times
        ]
        rows = join(runs)
        assert [(row.compared, row.paddle_setup, row.torch_setup) for row in rows] == [
            ("like for like", "MP 4, fp32", "MP 4, fp32"),
            ("like for like", "ZeRO 3, fp32", "ZeRO 3, fp32"),
            ("best of each", "MP 4, fp32", "ZeRO 3, fp32"),
        ]
        assert [row.speedup for row in rows] == pytest.approx([0.2, 1.1 / 1.5 - 1, 0.1])
        *_, first, second, _ = render(rows, "md", runs).split("with 4 GPUs")[1].split("Bold")[0].splitlines()
        assert [cell.strip() for cell in first.strip("|").split("|")][:2] == ["llama-tiny", "bsz 8 MP 4 fp32"]
        assert (first.count("**"), second.count("**")) == (2, 0)
        assert "+20%" in first
        assert "-27%" in second

    def test_other_trainers_stand_beside_ours_by_rounds_of_one_series(self, records):
        ours = records["llama", "full", "torch"]
        rounds = [
            at(run, 3 * n + i, n)
            for n, factor in ((1, 2.0), (2, 2.2))
            for i, run in enumerate((ours, slower(ours, factor).model_copy(update={"peer": "hf-trainer"})))
        ]
        later = [at(run, 999 * i, 3) for i, run in enumerate((ours, rounds[1]))]
        disturbed = at(ours, 12, 4).model_copy(update={"conditions": conditions(0.5)})
        text = render_peers([*rounds, *later, disturbed])
        (line,) = (line for line in text.splitlines() if line.startswith("| ours: fp32 "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert (cells[5], cells[-1]) == (f"{math.sqrt(2.0 * 2.2):.2f}", "3")
        assert "ours was disturbed, and left out: others took 50.0% of a core" in text

    def test_one_side_alone_and_one_that_failed(self, records):
        torch, paddle = records["llama", "full", "torch"], records["llama", "full", "paddle"]
        (row,) = join([torch])
        assert (row.paddle_status, row.speedup, row.torch_status) == (None, None, "ok")
        failed = paddle.model_copy(update={"status": "oom", "reason": "Out of memory", "steps": None})
        (row,) = join([torch, failed])
        assert (row.paddle_status, row.speedup) == ("oom", None)
        assert "paddle oom: Out of memory" in row.note

    def test_broken_and_missing_records(self, records, folder, tmp_path):
        empty = run_program("summarize.py", tmp_path, check=True)
        assert "no records in" in empty.stdout
        good = folder / "llama-full-torch.json"
        (tmp_path / "good.json").write_bytes(good.read_bytes())
        (tmp_path / "cut.json").write_bytes(good.read_bytes()[:500])
        (tmp_path / "other.json").write_text('{"a": 1}')
        done = run_program("summarize.py", tmp_path, check=True)
        assert "llama-tiny" in done.stdout
        assert f"skipped {tmp_path}/cut.json" in done.stderr
        assert f"skipped {tmp_path}/other.json" in done.stderr
        assert run_program("summarize.py", tmp_path, "--strict").returncode == 1
        assert "no such file or folder" in refusal(run_program("summarize.py", tmp_path / "nowhere"))


class TestEnds:
    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_a_loss_that_is_no_number(self, forked, tmp_path, framework):
        out = tmp_path / "r.json"
        flags = [f"--out={out}", *SHORT[:-3], "--steps=6", "--lr=1e20"]
        exit_code, printed = forked.run(framework, "full", *flags)
        record = read_record(out)
        assert exit_code == 1
        assert record.status == "failed"
        assert f"of step {len(record.steps.loss) + 1} is not a finite number" in record.reason
        assert "Traceback" not in printed
        assert 1 <= len(record.steps.loss) < 6

    def test_timeout_ends_a_run_and_says_so(self, tmp_path):
        out = tmp_path / "r.json"
        started = time.monotonic()
        flags = ["--model=llama-tiny", "--samples=40", "--steps=500", "--timeout=8", f"--out={out}"]
        done = run_program("torch/finetune_full.py", *flags)
        assert done.returncode == 124
        assert time.monotonic() - started < 60
        record = read_record(out)
        assert record.status == "timeout"
        assert "--timeout 8 s" in record.reason

    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_bad_input_is_one_line_from_any_script(self, tmp_path, framework):
        script = f"{framework}/finetune_full.py"
        assert "no such preset" in refusal(run_program(script, "--model=lama"))
        assert "argument --bsz: 0 is out of range" in refusal(run_program(script, "--bsz=0"))
        assert "config.json is missing" in refusal(run_program(script, f"--model={tmp_path}"))
        write_random(tmp_path, PRESETS["llama-tiny"], seed=0)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        assert "not a whole safetensors file" in refusal(run_program(script, f"--model={tmp_path}"))
        (tmp_path / "bad.json").write_text('[{"instruction": "x"}]')
        bad_data = run_program(script, "--model=llama-tiny", f"--data={tmp_path / 'bad.json'}")
        assert "bad.json:1: the field 'output' is missing" in refusal(bad_data)

    def test_ctrl_c_leaves_no_record_and_no_process(self, tmp_path):
        out = tmp_path / "r.json"
        flags = ["--model=llama-tiny", "--samples=40", "--steps=500", f"--out={out}"]
        command = [sys.executable, str(ROOT / "torch/finetune_full.py"), *flags]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in running.stdout:
            if line.startswith("step 1/"):
                break
        children = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 130
        assert "interrupted" in errors
        assert "Traceback" not in errors
        assert not out.exists()
        assert not psutil.wait_procs(children, timeout=5)[1]


SPY = """
import atexit, importlib.util, json
def tell():
    found = {{n: getattr(importlib.util.find_spec(n), "origin", None) for n in ("torch", "paddle", "suites")}}
    open({seen!r}, "w").write(json.dumps([sys.path, found]))
atexit.register(tell)
sys.path.insert(0, {root!r})
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_root_is_not_on_the_path_of_a_process_that_trains(tmp_path, framework):
    """Also where sys.path starts with the root, as some editors set it."""
    code = SPY.format(seen=str(tmp_path / "seen.json"), root=str(ROOT))
    train_altered(code, framework, "lora", tmp_path / "r.json", *SHORT)
    path, found = json.loads((tmp_path / "seen.json").read_text())
    assert str(ROOT) not in path
    other = {"torch": "paddle", "paddle": "torch"}[framework]
    assert ".venv" in found[framework]
    assert found[other] is None
    assert found["suites"] is None


def test_scripts_run_from_a_shell_with_no_environment_activated(tmp_path):
    python = next(p for p in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable) if Path(p).exists())
    env = {"PATH": "/usr/bin:/bin", "TUNEBENCH_CACHE": os.environ["TUNEBENCH_CACHE"], "HOME": str(tmp_path)}
    env["PYTHONSAFEPATH"] = "1"  # without the script's folder on sys.path
    flags = [*SHORT, f"--out={tmp_path / 'r.json'}"]
    subprocess.run([python, ROOT / "torch/finetune_lora.py", *flags], env=env, check=True, capture_output=True)
    assert read_record(tmp_path / "r.json").status == "ok"
    done = subprocess.run(
        [python, ROOT / "summarize.py", tmp_path], env=env, check=True, capture_output=True, text=True
    )
    assert "llama-tiny" in done.stdout
