"""The batch plan: equal inputs give equal files, and the arrays hold what was planned."""

import itertools
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, refusal, run_program

sys.path.insert(0, str(ROOT / "data"))
import batching
import prepare
import sources
import synthetic
import tokenizer
from tokenizers import normalizers

from tunebench import plan as plans
from tunebench.errors import BadInput
from tunebench.files import cache_folder, write_atomically
from tunebench.flags import parse_flags
from tunebench.models.checkpoint import find_checkpoint
from tunebench.plan import IGNORED, Rows, Samples, load_plan, plan_path, read_plan, write_plan
from tunebench.suite.file import find_suite, plan_runs, read_suite

SAMPLES = [(np.array([11, 12, 13, 21, 2]), 3), (np.array([14, 22, 23, 2]), 1), (np.array([15, 2]), 1)]
ABOUT = {"data": "hand-made", "samples": 3, "skipped": 0, "bsz": 2, "pad_id": 0, "remarks": [], "drawn_from": "x"}
TWO_STEPS = Rows(np.array([0, 1, 2, 0]), np.arange(5))


@pytest.fixture
def plan(tmp_path):
    write_plan(tmp_path / "plan.safetensors", ABOUT, Samples.of(SAMPLES), TWO_STEPS)
    return read_plan(tmp_path / "plan.safetensors")


@pytest.fixture
def packed(tmp_path):
    """One step of two rows: the first two samples in one, the third alone."""
    rows = Rows(np.array([0, 1, 2]), np.array([0, 2, 3]))
    write_plan(tmp_path / "packed.safetensors", ABOUT, Samples.of(SAMPLES), rows)
    return replace(read_plan(tmp_path / "packed.safetensors"), padding_free=True)


def test_counts(plan):
    assert plan.steps == 2
    assert [plan.effective_tokens(step) for step in (0, 1)] == [9, 7]
    assert [plan.padded_tokens(step) for step in (0, 1)] == [10, 10]
    assert [plan.label_tokens(step) for step in (0, 1)] == [2 + 3, 1 + 2]
    info = plan.info()
    assert (info.effective_tokens, info.padded_tokens, info.label_tokens) == (16, 20, 8)


def test_rows_go_through_the_samples_in_order_and_again(plan):
    ((_, batch),) = plan.micro_batches(1, micro_bsz=2)
    assert batch.input_ids.tolist() == [[15, 2, 0, 0, 0], [11, 12, 13, 21, 2]]


def test_padding_mask_and_shifted_labels(plan):
    ((_, batch),) = plan.micro_batches(0, micro_bsz=2)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 2], [14, 22, 23, 2, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.labels.tolist() == [[-100, -100, 21, 2, -100], [22, 23, 2, -100, -100]]
    assert (batch.labels != IGNORED).sum() == plan.label_tokens(0)
    assert {array.dtype for array in (batch.input_ids, batch.attention_mask, batch.labels)} == {np.dtype(np.int64)}


def test_replicas_and_passes_cut_the_global_batch_without_changing_its_padding(plan):
    ((last, whole),) = plan.micro_batches(0, micro_bsz=2)
    for cut in (
        [plan.micro_batches(0, 1, replica, replicas=2)[0] for replica in (0, 1)],
        plan.micro_batches(0, micro_bsz=1),
    ):
        assert np.array_equal(np.concatenate([part.labels for _, part in cut]), whole.labels)
        assert np.array_equal(np.concatenate([part.input_ids for _, part in cut]), whole.input_ids)
    assert last
    assert [last for last, _ in plan.micro_batches(0, micro_bsz=1)] == [False, True]


def test_what_is_made_ahead_is_what_is_made_when_asked(plan):
    plan.micro_batches(0, micro_bsz=2)
    ahead, anew = plan.micro_batches(1, micro_bsz=2), replace(plan, _ahead={}).micro_batches(1, micro_bsz=2)
    assert np.array_equal(ahead[0][1].input_ids, anew[0][1].input_ids)


def test_packed_samples_stand_end_to_end(packed):
    assert (packed.steps, packed.samples(0)) == (1, 3)
    assert (packed.effective_tokens(0), packed.padded_tokens(0), packed.label_tokens(0)) == (11, 11, 6)
    ((_, batch),) = packed.micro_batches(0, micro_bsz=2)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 2, 14, 22, 23, 2, 15, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]
    assert batch.labels.tolist() == [[-100, -100, 21, 2, -100, 22, 23, 2, -100, 2, -100]]
    assert batch.labelled.tolist() == [2, 3, 5, 6, 7, 9]
    assert batch.lengths == [5, 4, 2]
    assert [part.lengths for _, part in packed.micro_batches(0, micro_bsz=1)] == [[5, 4], [2]]


LENGTHS = np.random.default_rng(0).integers(2, 642, 3000)


def test_packing_is_first_fit_decreasing():
    room, rows = [], []  # one sample at a time
    for i in sorted(range(len(LENGTHS)), key=lambda i: -LENGTHS[i]):
        row = next((row for row, left in enumerate(room) if left >= LENGTHS[i]), len(room))
        if row == len(room):
            room.append(1024)
            rows.append([])
        room[row] -= LENGTHS[i]
        rows[row].append(i)
    order, starts = batching.pack(LENGTHS, 1024)
    assert [part.tolist() for part in np.split(order, starts[1:-1])] == [sorted(row) for row in rows]


def test_grouped_batches_hold_each_sample_once_an_epoch_and_depend_on_the_seed_alone():
    epoch = batching.single(len(LENGTHS))
    order = batching.grouped(epoch, 3000, 1, LENGTHS, 8).order
    assert sorted(order) == list(range(3000))
    assert np.array_equal(order, batching.grouped(epoch, 3000, 1, LENGTHS, 8).order)
    assert not np.array_equal(order, batching.grouped(epoch, 3000, 2, LENGTHS, 8).order)
    shares = LENGTHS[order].reshape(-1, 2, 4).sum(axis=2)  # tokens of each of two replicas
    assert np.median(shares.max(axis=1) / shares.min(axis=1)) < 1.01, "replicas get about as many tokens each"
    assert np.array_equal(order[:80], batching.grouped(epoch, 2960, 1, LENGTHS, 8).order[:80]), (
        "a shorter run starts so"
    )
    batches = LENGTHS[order].reshape(-1, 8)
    assert batches.sum() / (8 * batches.max(axis=1)).sum() > 0.95
    assert np.corrcoef(batches.mean(axis=1), np.arange(len(batches)))[0, 1] < 0.2, "batches are in no order of length"


@pytest.mark.frameworks
@pytest.mark.parametrize("data", ["synthetic-en", "synthetic-zh"])
def test_shares_of_real_tokens_on_the_embedded_data(data):
    """Also takes the time to tokenize and plan the 10,000 samples."""
    arguments = ["--model=llama-tiny", f"--data={data}", "--bsz=8", "--epochs=1"]
    run_program("data/prepare.py", *arguments, check=True)
    shares, seconds = {}, {}
    for extra in (["--order=grouped"], ["--packing=1024"], ["--packing=2048"]):
        started = time.perf_counter()
        run_program("data/prepare.py", *arguments, *extra, check=True)
        seconds[extra[0]] = time.perf_counter() - started
        flags = parse_flags("full", [*arguments, *extra])
        plan = load_plan(flags, find_checkpoint(flags.model, flags.weights, flags.seed))
        used = [plan.bsz * (flags.packing or plan.row_lengths(step).max()) for step in range(plan.steps)]
        shares[extra[0]] = plan.info().effective_tokens / sum(used)
        assert len(plan.prompt_lengths) == plan.info().samples or flags.packing, "each sample once"
    assert shares["--order=grouped"] >= 0.95
    assert shares["--packing=1024"] >= 0.98
    assert shares["--packing=2048"] >= 0.98
    print(shares, seconds)


@pytest.mark.parametrize("model", [None, "tokenizer.model"])
def test_tokens_are_those_of_each_sample_alone(tmp_path, model):
    """Over several chunks, with prompts and responses beyond the limits."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    if model:
        shutil.copy(ROOT / "tests" / "data" / model, tmp_path)
    words = tokenizer.of_checkpoint(tmp_path) or tokenizer.embedded(cache_folder())
    texts = [("word " * (i % 300 + 1), f"{i} </s> 好\n" * (i % 130 + 1)) for i in range(2 * prepare.CHUNK + 7)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"instruction": a, "output": b}) + "\n\n" for a, b in texts))
    source = sources.Source(str(file), None, skip_bad=False)
    assert source.total == len(texts)
    found = prepare.encode(words, source, eos_id=2)
    assert source.place == len(texts)
    parts = np.split(found.tokens, found.offsets[1:-1])
    assert len(parts) == len(texts)
    for (prompt, response), tokens, length in zip(texts, parts, found.prompt_lengths, strict=True):
        first, second = (words.encode_batch([text], add_special_tokens=False)[0].ids for text in (prompt, response))
        assert tokens.tolist() == [*first[:256], *second[:384], 2]
        assert length == len(first[:256])
    assert found.lengths.max() == 256 + 385


def test_tokens_of_a_plan_are_copied_in_parts(monkeypatch):
    monkeypatch.setattr(plans, "SLICES", 3)
    tokens, lengths = np.arange(100, 200, dtype=np.int32), np.array([4, 1, 7, 2, 9, 3, 5])
    starts = np.array([10, 90, 0, 50, 33, 10, 95])
    expected = np.concatenate([tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)])
    found = plans._taken(tokens, starts, lengths)
    assert np.array_equal(found, expected)
    assert found.dtype == tokens.dtype


def test_samples_without_tokens_are_named(tmp_path):
    words = tokenizer.embedded(cache_folder())
    words.normalizer = normalizers.Replace("nothing", "")
    lines = [{"instruction": "Say it.", "output": "nothing" if i == 700 else "it"} for i in range(800)]
    (tmp_path / "data.json").write_text(json.dumps(lines))
    with pytest.raises(BadInput, match="sample 701: the tokenizer makes no token of its prompt or response"):
        prepare.encode(words, sources.Source(str(tmp_path / "data.json"), None, skip_bad=False), eos_id=2)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenizer")]


def test_rows_too_short_for_a_sample_are_refused():
    done = run_program("data/prepare.py", "--model=llama-tiny", "--samples=50", "--packing=100")
    assert done.returncode == 2
    assert "--packing 100: a sample has" in done.stderr


def test_damage_is_named(plan):
    plan.path.write_bytes(plan.path.read_bytes()[:-4])
    with pytest.raises(BadInput, match="not a whole batch plan"):
        read_plan(plan.path)


def test_prepared_from_the_embedded_data():
    arguments = ["--model=llama-tiny", "--bsz=4", "--steps=6", "--samples=50"]
    flags = parse_flags("full", arguments)
    checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed)
    plan = load_plan(flags, checkpoint)
    assert plan.steps == 6
    assert plan.info().samples == 50
    tokens = np.split(plan.tokens, plan.offsets[1:-1])
    assert len(tokens) == 24
    assert all(row[-1] == checkpoint.config["eos_token_id"] for row in tokens)
    assert max(plan.prompt_lengths) <= 256
    assert max(map(len, tokens)) <= 256 + 385
    assert plan.tokens.max() < checkpoint.config["vocab_size"]

    before = plan.sha256
    plan.path.unlink()
    assert before == load_plan(flags, checkpoint).sha256, "the same inputs must give the same file"
    assert "plan " + before[:12] in run_program("data/prepare.py", *arguments, check=True).stdout


def test_the_second_half_of_the_timed_steps_has_the_batches_of_the_first_again():
    for steps, warmup, expected in (
        (6, 2, [0, 1, 2, 3, 2, 3]),
        (6, 1, [0, 1, 2, 3, 1, 2]),
        (2, 1, [0, 1]),
        (1, 0, [0]),
    ):
        found = batching.paired_halves(batching.single(steps * 2), 2, warmup)
        assert found.order.reshape(-1, 2)[:, 0].tolist() == [2 * batch for batch in expected]


@pytest.mark.parametrize("extra", [[], ["--order=grouped"], ["--packing=1000"]])
def test_halves_and_other_draws_in_real_plans(extra):
    checkpoint = find_checkpoint("llama-tiny", "random", 0)

    def batches(*flags):
        given = ["--model=llama-tiny", "--samples=60", "--bsz=3", "--steps=8", "--warmup-steps=2", *flags, *extra]
        plan = load_plan(parse_flags("full", given), checkpoint)
        starts = plan.offsets[plan.rows[:: plan.bsz]]
        return plan, [plan.tokens[a:b].tobytes() for a, b in itertools.pairwise(starts)]

    plan, found = batches()
    assert found[2:5] == found[5:8]
    assert len(set(found)) == 5
    unpaired, distinct = batches("--no-paired-halves")
    assert len(set(distinct)) == 8
    assert distinct[:5] == found[:5]
    other, drawn = batches("--plan-seed=1")
    assert drawn != found
    assert plan.info().drawn_from == other.info().drawn_from == unpaired.info().drawn_from
    assert plan.sha256 != other.sha256


def test_whoever_made_a_plan_first_its_rounds_are_drawn_from_the_same():
    checkpoint = find_checkpoint("llama-tiny", "random", 0)
    flags = ["--model=llama-tiny", "--samples=30", "--bsz=3", "--steps=2"]
    plans = [
        load_plan(parse_flags("full", [*flags, *extra]), checkpoint)
        for extra in (["--seed=1"], [], ["--plan-seed=1"], ["--order=grouped"], ["--order=grouped", "--seed=1"])
    ]
    drawn_from = [plan.info().drawn_from for plan in plans]
    assert plans[0].path == plans[1].path
    assert drawn_from[0] == drawn_from[1] == drawn_from[2]
    assert len(set(drawn_from)) == 3


def test_each_input_has_a_plan_of_its_own():
    checkpoint = find_checkpoint("llama-tiny", "random", 0)
    paths = {
        plan_path(parse_flags("full", ["--model=llama-tiny", *extra]).model_dump(), checkpoint)
        for extra in (
            *([], ["--bsz=8"], ["--steps=31"], ["--samples=99"], ["--data=synthetic-zh"], ["--epochs=1"]),
            *(["--plan-seed=1"], ["--no-paired-halves"], ["--warmup-steps=9"]),
            *(["--order=grouped"], ["--order=grouped", "--seed=1"], ["--packing=999"], ["--packing=999", "--seed=1"]),
        )
    }
    assert len(paths) == 13


def test_epochs_say_what_they_leave_out():
    done = run_program("data/prepare.py", "--model=llama-tiny", "--samples=10", "--bsz=4", "--epochs=1", check=True)
    assert "the last 2 samples fill no batch of 4: left out" in done.stdout
    assert "2 steps of 4 from 10 samples" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs=1"], "--epochs 1: 3 samples fill no batch of --bsz 4; use --bsz 3 or less, or --epochs 2 or more"),
        (["--epochs=1", "--packing=640"], "--epochs 1: 1 packed rows fill no batch of --bsz 4; use --bsz 1 or less"),
        (["--steps=2147483647"], "--steps 2147483647: a plan has room for 67108864 rows, and this is 8589934588; "),
        (["--epochs=2147483647"], "--epochs 2147483647: a plan has room for 67108864 rows"),
        (["--bsz=2147483647"], "--bsz 2147483647: a plan has room for 67108864 rows; use a smaller one"),
    ],
)
def test_plans_without_a_batch_or_beyond_memory_are_refused(tmp_path, flags, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"instruction": f"Say {i}.", "output": str(i)} for i in range(3)]))
    assert message in refusal(run_program("data/prepare.py", "--model=llama-tiny", f"--data={path}", *flags))


def test_skipped_samples_are_counted(tmp_path):
    good = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(6)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, [*good[:2], {"instruction": "x"}, *good[2:]])))
    arguments = ["--model=llama-tiny", f"--data={path}", "--bsz=2", "--steps=6"]
    done = run_program("data/prepare.py", *arguments)
    assert done.returncode == 2
    assert f"{path}:3: the field 'output' is missing" in done.stderr
    done = run_program("data/prepare.py", *arguments, "--skip-bad", check=True)
    assert "--data mine.jsonl: 1 malformed sample(s) left out, the first: mine.jsonl:3: the field " in done.stdout
    assert "from 6 samples of mine.jsonl" in done.stdout


def test_what_is_left_out_is_said_in_one_line_each_time(tmp_path):
    samples = [{"instruction": f"Say {i}.", "output": str(i), "system": "", "history": []} for i in range(6)]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(samples))
    for extra in ("--steps=6", "--steps=6", "--steps=5"):  # planned, read again, planned from cached tokens
        done = run_program("data/prepare.py", "--model=llama-tiny", f"--data={path}", "--bsz=2", extra, check=True)
        assert done.stdout.count("--data mine.json: columns left out: history, system\n") == 1
    other = path.rename(tmp_path / "other.json")
    done = run_program("data/prepare.py", "--model=llama-tiny", f"--data={other}", "--bsz=2", "--steps=6", check=True)
    assert "--data other.json: columns left out" in done.stdout, "the same tokens from another file"


@pytest.mark.parametrize("name", ["n" * 250 + ".json", "名" * 83 + ".json"])
def test_a_data_file_may_have_the_longest_name(tmp_path, name):
    (tmp_path / name).write_text(json.dumps([{"instruction": "Say 1.", "output": "1"}] * 4))
    done = run_program("data/prepare.py", "--model=llama-tiny", f"--data={tmp_path / name}", "--bsz=2", check=True)
    assert f"from 4 samples of {name}" in done.stdout


def test_a_file_may_have_the_longest_name(tmp_path):
    for name in ("n" * 255, "名" * 85):
        write_atomically(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null"), Path()):
        with pytest.raises(BadInput, match="is no regular file"):
            write_atomically(path, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def prepared(*extra):
    flags = parse_flags("full", ["--model=llama-tiny", "--warmup-steps=1", "--no-paired-halves", *extra])
    return load_plan(flags, find_checkpoint(flags.model, flags.weights, flags.seed))


@pytest.mark.parametrize("extra", [[], ["--padding-free"]])
def test_widths_are_multiples_where_processes_share_the_tokens(extra):
    flags = ["--bsz=8", "--micro-bsz=2", "--nproc=8", "--mp=4", "--steps=6", *extra]
    plan, whole = prepared(*flags, "--sequence-parallel"), prepared(*flags)
    wider = 0
    for step in range(6):
        passes, plain = ([b for r in range(2) for _, b in each.passes(step, 2, r, 2)] for each in (plan, whole))
        assert all(each.input_ids.shape[1] % 4 == 0 for each in passes)
        assert sum(each.input_ids.size for each in passes) == plan.padded_tokens(step)
        wider += plan.padded_tokens(step) - whole.padded_tokens(step)
        for each, other in zip(passes, plain, strict=True):
            assert each.labels[each.labels != IGNORED].tolist() == other.labels[other.labels != IGNORED].tolist()
            assert (
                each.input_ids[each.attention_mask == 1].tolist() == other.input_ids[other.attention_mask == 1].tolist()
            )
            assert each.lengths is None or sum(each.lengths) == each.input_ids.size
        assert plan.effective_tokens(step) == whole.effective_tokens(step)
    assert wider


def test_a_width_beyond_the_models_positions_is_refused():
    positions = find_checkpoint("llama-tiny", "random", 0).config["max_position_embeddings"]
    flags = [f"--data=fixed:{positions}", "--samples=4", "--bsz=1", "--steps=2", "--sequence-parallel", "--mp=2"]
    assert prepared(*flags).padded_tokens(0) == positions
    with pytest.raises(BadInput, match=f"has {positions} tokens, rounded up to .* for --sequence-parallel, and"):
        prepared(*flags, "--mp=3")
    assert prepared(*flags, "--mp=3", "--padding-free").padded_tokens(0) > positions


def test_samples_of_fixed_length():
    plan = prepared("--data=fixed:512", "--bsz=4", "--steps=6")
    assert (plan.info().data, plan.info().samples) == ("fixed:512", 1000)
    assert set(np.diff(plan.offsets)) == {512}
    assert plan.info().effective_tokens == plan.info().padded_tokens == 4 * 6 * 512
    rows = plan.tokens.reshape(-1, 512)
    assert len(np.unique(rows, axis=0)) == 24, "each sample has text of its own"
    assert (rows == 2).sum() == 24, "only the last token of each is the end"
    assert (rows[:, -1] == 2).all()
    embedded = prepared("--samples=2000", "--bsz=100", "--steps=20")
    share = embedded.prompt_lengths.sum() / len(embedded.tokens)
    assert set(plan.prompt_lengths) == {plan.prompt_lengths[0]}
    assert plan.prompt_lengths[0] == pytest.approx(512 * share, abs=2)
    texts = synthetic.generate("en", 30)
    words = tokenizer.embedded(cache_folder())
    start = "".join(
        f"{text['instruction']}\n{text['input']}" if text["input"] else text["instruction"] for text in texts
    )
    decoded = words.decode(rows[:3, : plan.prompt_lengths[0]].reshape(-1))
    assert decoded == start[: len(decoded)], "the prompts, end to end"
    assert words.decode(rows[0, plan.prompt_lengths[0] : -1]) in "".join(text["output"] for text in texts)


def test_fixed_length_goes_with_the_other_flags():
    base = prepared("--data=fixed:64", "--bsz=4", "--steps=6", "--samples=10")
    assert base.info().samples == 10
    assert np.array_equal(base.tokens[:640], prepared("--data=fixed:64", "--steps=3", "--bsz=8").tokens[:640])
    assert np.array_equal(base.tokens[:640], base.tokens[640:1280]), "10 samples, again and again"
    assert prepared("--data=fixed:64", "--samples=10", "--bsz=2", "--epochs=2").steps == 10
    packed = prepared("--data=fixed:64", "--bsz=2", "--steps=3", "--packing=200", "--samples=30")
    assert packed.samples(0) == 6
    grouped = prepared("--data=fixed:64", "--bsz=2", "--steps=3", "--tuned", "--no-compile")
    assert grouped.padding_free
    assert {len(prepared(f"--data=fixed:{size}", "--bsz=1").tokens) for size in (3, 2048)} == {90, 30 * 2048}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--data=fixed:2049"],
            "--data fixed:2049: the model takes at most 2048 tokens (max_position_embeddings, or Mistral's "
            "sliding_window); use at most that",
        ),
        (["--data=fixed:64", "--packing=63"], "--packing 63: a sample has 64 tokens; use at least 64"),
        (["--data=fixed:2048", "--samples=2147483647"], "--samples 2147483647 of fixed:2048 are too many"),
        (["--data=fixed"], "--data fixed: use synthetic-en, "),
        (["--data=fixed:8.json"], "--data fixed:8.json: no such file"),
    ],
)
def test_fixed_length_out_of_range(extra, message):
    assert message in refusal(run_program("data/prepare.py", "--model=llama-tiny", *extra))


@pytest.mark.parametrize(
    "wrong",
    ["", "0", "1", "2", "-1", "abc", "2048.0", "１２", "+8", " 8", "8 ", "08", "8_0", "9" * 30, "0x10", "8:8", "8\n"],
)
def test_fixed_length_that_is_no_number(wrong):
    with pytest.raises(BadInput) as refused:
        parse_flags("full", ["--model=llama-tiny", f"--data=fixed:{wrong}"])
    assert ": name the tokens of a sample in plain digits, 3 (" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with stand-ins of the hub's data sets that have their oddities: empty outputs (alpaca has 28), missing
    values, columns that are not used."""
    folder = tmp_path_factory.mktemp("hub")
    rows = [
        {"instruction": f"Add {i} to it.", "input": f"{i}" if i % 2 else "", "output": f"{2 * i}", "text": f"Below {i}"}
        for i in range(10_100)
    ]
    for i in range(50, 10_000, 400):
        rows[i]["output"] = ""
        rows[i + 1]["input"] = None
        rows[i + 2] |= {"output": None, "text": None}
        rows[i + 3] |= {"instruction": " ", "input": ""}
    for name in ("tatsu-lab/alpaca", "Chinese-Vicuna/guanaco_belle_merge_v1.0"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("suite", ["a100x4", "a100x4-as-published", "h100x8", "gpu1-80g", "gpu1-24g"])
def test_the_suites_data_as_it_is_on_the_hub(hub, suite):
    """Each run's data flags on a tiny model. What is the same in several runs is made once."""
    runs = plan_runs(find_suite(suite), read_suite(find_suite(suite)), hub, 1, None)
    names = ("data", "samples", "skip_bad", "order", "packing", "steps", "epochs", "seed")
    setups = {tuple((name, run.flags.model_dump()[name]) for name in names) for run in runs}
    assert {dict(setup)["data"] for setup in setups} <= {"alpaca", "guanaco"}
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub / "home"), "PYTHONWARNINGS": "ignore"}
    for setup in setups:
        flags = [
            f"--{name.replace('_', '-')}={value}" for name, value in setup if not isinstance(value, bool) and value
        ]
        flags += ["--skip-bad"] * dict(setup)["skip_bad"]
        done = run_program("data/prepare.py", "--model=llama-tiny", "--bsz=16", *flags, cwd=hub, env=environment)
        assert done.returncode == 0, done.stderr
        data = dict(setup)["data"]
        assert f"--data {data}: 75 malformed sample(s) left out, the first: {data} row 51: the response" in done.stdout
        assert f"--data {data}: columns left out: text\n" in done.stdout
        assert f"from 10000 samples of {data}" in done.stdout


def test_padding_that_a_tokenizer_file_asks_for_is_no_token_of_a_sample(tmp_path):
    import tokenizer as tokenizers_of

    plain = tokenizers_of.embedded(tmp_path)
    texts = ["One word.", "And then a good many more words than that."]
    lengths = [len(plain.encode(text).ids) for text in texts]
    plain.enable_padding()
    plain.enable_truncation(3)
    plain.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers_of.of_checkpoint(tmp_path)
    assert [len(encoded.ids) for encoded in loaded.encode_batch(texts)] == lengths
