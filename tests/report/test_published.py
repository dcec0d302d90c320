"""The published record: its data give its tables cell by cell, and its rows stand beside a user's own runs."""

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import refusal, run_program

from tunebench.flags import parse_flags
from tunebench.record import Record
from tunebench.report.published import FOLDER, PublishedRecord, against, load, render_against, render_published, tables
from tunebench.run.run import describe_run
from tunebench.suite.file import find_suite, plan_runs, read_suite

FILES = sorted(FOLDER.glob("*.json"))
MP4, ZERO2, ZERO3 = {"mp": 4, "zero": 0}, {"mp": 1, "zero": 2}, {"mp": 1, "zero": 3}


@pytest.fixture(scope="module")
def runs() -> list[PublishedRecord]:
    records, published, broken = load([FOLDER])
    assert (records, broken) == ([], [])
    return published


def printed_tables(markdown: str) -> dict[str, list[list[str]]]:
    """The cells of each table in a text, headings and all, by the heading above it."""
    found, heading = {}, ""
    for line in markdown.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not set(line) <= set("|- "):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def changed(run: PublishedRecord, runs: list[PublishedRecord], rate: float | None) -> list[PublishedRecord]:
    """All runs, with another figure for one of them."""
    other = run.model_copy(update={"effective_tokens_per_second": rate, "reason": None if rate else "oom"})
    return [other if each is run else each for each in runs]


def the(runs: list[PublishedRecord], framework: str, model: str, bsz: int, **setup: int) -> PublishedRecord:
    """The one run with these properties."""
    (run,) = [
        run
        for run in runs
        if (run.framework, run.model, run.method, run.bsz) == (framework, model, "full", bsz)
        and all(getattr(run.setup, name) == value for name, value in setup.items())
    ]
    return run


def test_the_tables_are_those_that_were_published_cell_by_cell(runs):
    published = printed_tables((FOLDER / "README.md").read_text())
    assert [len(rows) - 1 for rows in published.values()] == [3, 5, 9, 3]
    assert printed_tables(render_published(runs, "md")) == published


def test_speedups_and_bold_are_stored_nowhere():
    assert len(FILES) == 31
    for file in FILES:
        text = file.read_text()
        assert not [word for word in ("speedup", "%", "**") if word in text.lower()], file
        assert "best" not in text


def test_each_figure_is_in_one_record_under_its_own_name(runs):
    figures = [run.effective_tokens_per_second for run in runs if run.effective_tokens_per_second]
    assert len(figures) == len(set(figures)) == 29
    names = []
    for run in runs:
        split = [f"mp{run.setup.mp}"] * (run.setup.mp > 1) + [f"zero{run.setup.zero}"] * (run.setup.zero > 0)
        split += ["recompute"] * run.setup.recompute
        names.append("-".join([run.model, run.method, f"bsz{run.bsz}", *split, run.framework]))
    assert names == [file.stem for file in FILES]


def test_rows_and_speedups_follow_the_figures(runs):
    zero3 = the(runs, "paddle", "llama-7b", 8, **ZERO3)
    found = printed_tables(render_published(changed(zero3, runs, 9000.0), "md"))
    (row,) = [row for row in found["Llama"] if row[:4] == ["Llama-7b", "Finetune", "4", "8"]]
    assert row[4:] == ["ZeRO 3", "9000.00", "ZeRO 2", "1331.96", "+576%"]
    rows = {row[1]: row[2:] for row in found["Multi-GPU record: fine-tuning with 4 GPUs"] if row[0] == "LLaMA-7b"}
    assert rows["bsz 8 ZeRO 3"] == ["**9000.00**", "1142.07", "688%"]
    assert rows["bsz 8 MP4"] == ["2213.46", "N/A", "N/A"]
    assert rows["bsz 16 ZeRO 2"] == ["**2804.19**", "2211.25", "27%"]
    found = printed_tables(render_published(changed(zero3, runs, None), "md"))
    (row,) = [row for row in found["Multi-GPU record: fine-tuning with 4 GPUs"] if row[1] == "bsz 8 ZeRO 3"][:1]
    assert row[2:] == ["OOM", "1142.07", "N/A"]


def test_every_setup_of_a_model_is_shown_where_a_side_tried_several(runs):
    shown = [pair.either.model for table in tables(runs) if table.kind == "multi_gpu" for pair in table.pairs]
    assert set(shown) == {"llama-7b", "llama-13b"}
    mp4 = the(runs, "paddle", "bloomz-7b1-mt", 8, **MP4)
    more = [*runs, mp4.model_copy(update={"setup": mp4.setup.model_copy(update=ZERO2)})]
    shown = [pair.either.model for table in tables(more) if table.kind == "multi_gpu" for pair in table.pairs]
    assert shown.count("bloomz-7b1-mt") == 5


def test_csv_and_json_have_the_same_rows_under_stable_names(runs):
    lines = list(csv.DictReader(io.StringIO(render_published(runs, "csv"))))
    rows = json.loads(render_published(runs, "json"))
    assert len(lines) == len(rows) == 20
    assert [line["Table"] for line in lines] == ["bloom"] * 3 + ["llama"] * 5 + ["multi-gpu"] * 9 + ["chatglm"] * 3
    assert [row["table"] for row in rows] == [f"published {line['Table']}" for line in lines]
    for line, row in zip(lines, rows, strict=True):
        assert line["Speedup"] == ("N/A" if row["speedup"] is None else f"{row['speedup']:+.0%}")
    assert [row["model"] for row in rows if row["best"]] == ["llama-7b", "llama-7b", "llama-13b"]
    assert (rows[11]["paddle_setup"], rows[11]["torch_status"], rows[-4]["paddle_status"]) == (
        "(8*2) MP4",
        None,
        "oom",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reason": "oom"}, "a run has either effective_tokens_per_second or a reason"),
        ({"effective_tokens_per_second": None}, "a run has either effective_tokens_per_second or a reason"),
        ({"effective_tokens_per_second": "1.0"}, "effective_tokens_per_second: Input should be a valid number"),
        ({"schema": "published-2"}, "schema: Input should be 'published-1'"),
        ({"status": "ok"}, "status: Input should be 'published'"),
        ({"speedup": 0.1}, "speedup: Extra inputs are not permitted"),
        ({"setup": {"zero": 4}}, "setup.zero: Input should be less than or equal to 3"),
        ({"names": {}}, "names: Dictionary should have at least 1 item"),
        ({"schema": 1}, "status: Input should be 'ok'"),
    ],
)
def test_broken_records_are_named_and_the_others_kept(tmp_path, changes, message):
    content = json.loads(FILES[0].read_text())
    (tmp_path / "good.json").write_text(json.dumps(content))
    (tmp_path / "odd.json").write_text(json.dumps(content | changes))
    records, published, broken = load([tmp_path])
    assert (len(records), len(published)) == (0, 1)
    assert broken[0].startswith(f"{tmp_path / 'odd.json'}: not a record: ")
    assert message in broken[0]


def test_a_run_counts_once_and_has_one_figure(tmp_path):
    content = json.loads(FILES[0].read_text())
    (tmp_path / "other.json").write_text(json.dumps(content | {"effective_tokens_per_second": 1.0}))
    _, published, broken = load([FILES[0], FOLDER, tmp_path])  # the first of them twice
    assert len(published) == 31
    assert len(broken) == 1
    assert "another one of the same published run" in broken[0]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": null}', "\udcff", "[" * 100_000])
def test_other_files_are_left_to_the_ordinary_reading(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    records, published, broken = load([tmp_path])
    assert (records, published, len(broken)) == ([], [], 1)
    assert f"{tmp_path / 'a.json'}: not a record" in broken[0]


def here(framework: str, rate: float, model: str = "llama-7b", status: str = "ok", **setup: object) -> Record:
    """A record of full fine-tuning on four processes with the named rate in effective tokens/s."""
    known = describe_run(framework, "full", parse_flags("full", ["--model=llama-tiny"]), ["finetune_full.py"])
    known |= {"plan": None, "steps": None, "setup_seconds": None, "peak_memory_bytes": [], "log": []}
    known |= {"model": None, "status": "failed", "reason": "unknown"}
    digest, steps = "0" * 64, 3
    content = json.loads(Record(**known).model_dump_json())
    content["hardware"]["device"] = "NVIDIA A100-SXM4-80GB"
    content["setup"] |= {"nproc": 4, "bsz": 8, "micro_bsz": 8, "dtype": "fp16", "amp": "O2"} | setup
    content["model"] = {
        "name": model,
        "family": "llama",
        "parameters": 10,
        "trainable_parameters": 10,
        "config_sha256": digest,
        "weights_sha256": digest,
    }
    if status == "ok":
        content["plan"] = {
            "data": "alpaca",
            "sha256": digest,
            "samples": 8,
            "skipped": 0,
            "effective_tokens": 3000,
            "padded_tokens": 3000,
            "label_tokens": 3000,
        }
        content["steps"] = {"seconds": [1000 / rate] * steps, "loss": [2.0] * steps, "grad_norm": [1.0] * steps}
        content["steps"] |= {f"{kind}_tokens": [1000] * steps for kind in ("effective", "padded", "label")}
        content |= {"setup_seconds": 1.0, "timed_from": 1, "reason": None}
        content["kernels"] = {"weights": ["float16"], "matmuls": ["float16"], "attention": ["softmax"]}
    return Record.model_validate(content | {"status": status, "started_at": f"2026-01-01T00:00:{int(rate) % 60:02}Z"})


def beside(records: list[Record], runs: list[PublishedRecord]) -> dict[tuple[str, str, int], list]:
    """The runs that found a counterpart, by framework, setup and batch size."""
    found = {}
    for row in against(records, runs):
        if row.here_setup is not None:
            found.setdefault((row.framework, row.setup, row.batch_size), []).append(row)
    return found


def test_a_figure_stands_beside_that_of_the_same_setup_and_framework(runs):
    records = [here("paddle", 3000.0, **ZERO2), here("torch", 2000.0, **ZERO2), here("torch", 1500.0, **ZERO3)]
    found = beside(records, runs)
    assert set(found) == {("paddle", "ZeRO 2", 8), ("torch", "ZeRO 2", 8), ("torch", "ZeRO 3", 8)}
    (paddle,), (torch,) = found["paddle", "ZeRO 2", 8], found["torch", "ZeRO 2", 8]
    assert (paddle.here_setup, paddle.published_effective_tokens_per_second) == ("ZeRO 2, fp16 O2", 1781.27)
    assert paddle.here_effective_tokens_per_second == pytest.approx(3000.0)
    assert (paddle.ratio, torch.ratio) == pytest.approx((3000 / 1781.27, 2000 / 1331.96))
    for row in (paddle, torch):
        assert row.here_speedup == pytest.approx(0.5)
        assert row.published_speedup == pytest.approx(1781.27 / 1331.96 - 1)
    (alone,) = found["torch", "ZeRO 3", 8]
    assert (alone.here_speedup, alone.published_speedup) == (None, pytest.approx(1256.82 / 1142.07 - 1))
    assert len(against(records, runs)) == len(runs)


def test_the_suite_a100x4_has_a_counterpart_of_every_run_but_those_of_chatglm(runs):
    suite, unknown = find_suite("a100x4"), {"model": None, "plan": None, "steps": None, "setup_seconds": None}
    unknown |= {"status": "failed", "reason": "unknown", "peak_memory_bytes": [], "log": []}
    records = [
        Record(**describe_run(run.entry.framework, run.entry.method, run.flags, run.argv) | unknown)
        for run in plan_runs(suite, read_suite(suite), Path("results"), 1, None)
    ]
    found = [row for row in against(records, runs) if row.here_status == "failed"]
    assert len(found) == len(runs) - 6
    assert {row.model for row in found} == {"llama-7b", "llama-13b", "bloomz-7b1-mt"}


def test_another_model_batch_recompute_or_accumulation_is_no_counterpart(runs):
    others = [
        here("paddle", 3000.0, model="llama-tiny", **MP4),
        here("paddle", 3000.0, model="chatglm2-6b", **MP4),
        here("paddle", 3000.0, recompute=True, **MP4),
        here("paddle", 3000.0, micro_bsz=4, accumulation=2, **MP4),
        here("paddle", 3000.0, nproc=8, **MP4),
        here("paddle", 3000.0, bsz=32, **MP4),
        here("paddle", 3000.0, mp=4, zero=0).model_copy(update={"aa": "a"}),
    ]
    assert not beside(others, runs)
    assert "No record here has a published counterpart" in render_against(others, runs, "md")
    accumulated = here("paddle", 3000.0, bsz=16, micro_bsz=8, accumulation=2, **MP4)
    assert set(beside([accumulated], runs)) == {("paddle", "MP 4, 8*2", 16)}


def test_sides_that_pair_only_as_the_best_of_each_are_shown_once_without_a_speedup(runs):
    found = beside([here("paddle", 3000.0, **MP4), here("torch", 2000.0, **ZERO2)], runs)
    assert {key: [row.here_speedup for row in rows] for key, rows in found.items()} == {
        ("paddle", "MP 4", 8): [None],
        ("torch", "ZeRO 2", 8): [None],
    }


def test_an_interval_across_zero_tells_nothing(runs):
    rounds = {"paddle": (3000.0, 1900.0), "torch": (2000.0, 2900.0)}
    records = [here(side, rate, **ZERO2) for side, rates in rounds.items() for rate in rates]
    assert "| +34%              | not told apart (" in render_against(records, runs, "md")
    (row,) = beside(records, runs)["paddle", "ZeRO 2", 8]
    assert row.here_interval[0] < 0 < row.here_interval[1]


def test_unequal_precision_and_several_of_it_stand_apart(runs):
    o1 = [here(side, rate, amp="O1", **ZERO2) for side, rate in (("torch", 2000.0), ("paddle", 2500.0))]
    found = beside([*o1, here("paddle", 3000.0, **ZERO2)], runs)
    rows = found["paddle", "ZeRO 2", 8]
    assert {(row.here_setup, row.here_speedup and round(row.here_speedup, 2)) for row in rows} == {
        ("ZeRO 2, fp16 O1", 0.25),
        ("ZeRO 2, fp16 O2", None),
    }


def test_what_ran_out_of_memory_on_either_side(runs):
    records = [here("paddle", 1.0, status="oom", **ZERO3), here("torch", 500.0, model="llama-13b", **ZERO2)]
    found = beside(records, runs)
    text = [[cell.strip() for cell in line.split("|")] for line in render_against(records, runs, "md").splitlines()]
    (ours,) = [cells for cells in text if "1256.82" in cells]
    (theirs,) = [cells for cells in text if "500.00" in cells]
    assert ours[7:11] == ["1256.82", "ZeRO 3, fp16 O2", "OOM", "N/A"]
    assert theirs[7:11] == ["OOM", "ZeRO 2, fp16 O2", "500.00", "N/A"]
    assert [row.ratio for rows in found.values() for row in rows] == [None, None]


def test_the_table_says_what_it_must(runs):
    text = render_against([here("paddle", 3000.0, **MP4)], runs, "md")
    assert "Here on one NVIDIA A100-SXM4-80GB per process" in text
    assert "Published on A100-80G with NVLink" in text
    assert "chatglm2-6b in place of chatglm-6b" in text
    assert "| chatglm-6b    | LoRA" in text
    lines = list(csv.DictReader(io.StringIO(render_against([], runs, "csv"))))
    assert len(lines) == len(json.loads(render_against([], runs, "json"))) == len(runs)


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with a pair of records."""
    for framework, rate in (("paddle", 3000.0), ("torch", 2000.0)):
        here(framework, rate, **ZERO2).write(tmp_path / "own" / f"{framework}.json")
    return tmp_path / "own"


@pytest.mark.frameworks
class TestSummarize:
    def test_the_published_tables(self, runs):
        done = run_program("summarize.py", FOLDER, "--strict", check=True)
        assert done.stdout == render_published(runs, "md") + "\n"
        assert not done.stderr

    def test_published_and_ordinary_paths_together(self, own):
        both = run_program("summarize.py", FOLDER, own, check=True).stdout
        assert both.index("llama-7b | Finetune") < both.index("### Bloom")
        assert run_program("summarize.py", own, check=True).stdout.strip() in both
        rows = json.loads(run_program("summarize.py", FOLDER, own, "--format=json", check=True).stdout)
        assert [row.get("table") for row in rows].count(None) == 1
        assert len(rows) == 21

    def test_a_folder_of_results_leaves_its_published_one_out(self, own):
        (own / "published").mkdir()
        (own / "published" / "a.json").write_bytes(FILES[0].read_bytes())
        assert "### Bloom" not in run_program("summarize.py", own, check=True).stdout

    def test_against_published(self, own):
        plain = run_program("summarize.py", own, check=True).stdout
        beside = run_program("summarize.py", own, "--against=published", check=True).stdout
        assert beside.startswith(plain)
        (line,) = [line for line in beside.splitlines() if "1781.27" in line]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[5:] == ["paddle", "1781.27", "ZeRO 2, fp16 O2", "3000.00", "1.68", "+34%", "+50% (one round)"]
        done = run_program("summarize.py", own, "--against=published", "--format=json", check=True)
        rows = [row for row in json.loads(done.stdout) if row.get("table") == "against published"]
        assert sum(row["ratio"] is not None for row in rows) == 2
        blocks = run_program("summarize.py", own, "--against=published", "--format=csv", check=True).stdout
        assert len(blocks.split("\n\n")) == 2

    def test_broken_ones_and_other_choices(self, own):
        (own / "odd.json").write_text('{"schema": "published-1"}')
        done = run_program("summarize.py", own, "--strict")
        assert done.returncode == 1
        assert f"skipped {own / 'odd.json'}: not a record: status: Field required" in done.stderr
        assert "invalid choice: 'mine'" in refusal(run_program("summarize.py", own, "--against=mine"))
