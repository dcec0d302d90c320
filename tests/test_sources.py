"""Samples from files and hub data sets: read in order, and every malformed one named with file and line."""

import json

import pyarrow
import pytest
import sources
from pyarrow import parquet

from tunebench.errors import BadInput

GOOD = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"instruction": "翻译成中文", "input": "good morning", "output": "早上好"},
    {"instruction": "Name a prime.", "output": "7"},
]
PROMPTS = ["Add 2 and 3.", "翻译成中文\ngood morning", "Name a prime."]


def lines(samples):
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples).encode()


def array(samples):
    return b"[\n" + b",\n".join(lines([sample]).rstrip() for sample in samples) + b"\n]\n"


@pytest.mark.parametrize(("name", "content"), [("a.json", array(GOOD)), ("a.jsonl", lines(GOOD))])
def test_json_and_jsonl(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    loaded = sources.load(str(tmp_path / name), None, skip_bad=False)
    assert [sample.prompt for sample in loaded.samples] == PROMPTS
    assert [sample.response for sample in loaded.samples] == ["5", "早上好", "7"]
    assert loaded.skipped == loaded.left_out == []


def test_parquet(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "a.parquet")
    loaded = sources.load(str(tmp_path / "a.parquet"), 2, skip_bad=False)
    assert [sample.prompt for sample in loaded.samples] == PROMPTS[:2]


BAD = {
    "missing": (
        b'{"instruction": "x", "answer": ""}',
        "the field 'output' is missing; there is instruction, answer",
    ),
    "type": (b'{"instruction": "x", "output": 5}', "the field 'output' must be text, not int"),
    "input type": (b'{"instruction": "x", "input": [], "output": "y"}', "the field 'input' must be text"),
    "empty response": (b'{"instruction": "x", "output": " "}', "the response (the field 'output') is empty"),
    "empty prompt": (b'{"instruction": "", "output": "y"}', "the prompt (the fields 'instruction' and 'input')"),
    "utf-8": (b'{"instruction": "caf\xe9", "output": "y"}', "the field 'instruction' is not valid UTF-8"),
    "nul": (b'{"instruction": "x\\u0000", "output": "y"}', "the field 'instruction' contains a NUL byte"),
    "no object": (b'["x", "y"]', "a sample must be an object, not list"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_malformed_is_refused_with_file_and_line_or_skipped_and_counted(tmp_path, fault, ending):
    bad, message = BAD[fault]
    good = [lines([sample]).rstrip() for sample in GOOD]
    everything = [good[0], bad, good[1], good[2], bad]
    path = tmp_path / f"bad{ending}"
    path.write_bytes(b"[\n" + b",\n".join(everything) + b"]" if ending == ".json" else b"\n".join(everything))
    first = f"{path}:{3 if ending == '.json' else 2}: "
    with pytest.raises(BadInput) as refusal:
        sources.load(str(path), None, skip_bad=False)
    assert str(refusal.value).startswith(first + message)
    assert "--skip-bad" in str(refusal.value)
    loaded = sources.load(str(path), None, skip_bad=True)
    assert [sample.prompt for sample in loaded.samples] == PROMPTS
    assert len(loaded.skipped) == 2
    assert f"{path}{loaded.skipped[0]}".startswith(first + message)


STRANGE = {
    "beyond 9999": pyarrow.array([2**60] * 3, pyarrow.timestamp("ms")),
    "decimal256": pyarrow.array([None] * 3, pyarrow.decimal256(70, 2)),
    "nested": pyarrow.array([[{"a": b"\xff"}]] * 3),
    "bytes": pyarrow.array([b"caf\xe9"] * 3),
    "text": pyarrow.array([b"caf\xe9"] * 3).cast(pyarrow.string(), safe=False),
    "output.text": pyarrow.array([{"text": "x"}] * 3),
    "two\nlines": pyarrow.array([1] * 3),
}


def test_other_columns_are_named_and_never_read(tmp_path):
    table = pyarrow.Table.from_pylist(GOOD)
    for name, column in STRANGE.items():
        table = table.append_column(name, column)
    parquet.write_table(table, tmp_path / "a.parquet")
    loaded = sources.load(str(tmp_path / "a.parquet"), None, skip_bad=False)
    assert [sample.prompt for sample in loaded.samples] == PROMPTS
    assert loaded.left_out == sorted(STRANGE)
    assert "\n" not in sources.in_words(loaded.left_out)
    assert sources.in_words(map(str, range(11))) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_other_fields_are_named(tmp_path, ending):
    samples = [GOOD[0] | {"system": "Be brief.", "history": []}, GOOD[1], GOOD[2] | {"history": [["a", "b"]]}]
    path = tmp_path / f"a{ending}"
    path.write_bytes(array(samples) if ending == ".json" else lines(samples))
    assert sources.load(str(path), None, skip_bad=False).left_out == ["history", "system"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"instruction": ["a"], "response": ["b"]}, "the column 'output' is missing; there is instruction, response"),
        ({"output": ["a"]}, "the column 'instruction' is missing; there is output"),
        ({"instruction": ["a"], "output": [[1]]}, "the column 'output' must be text, not list<element: int64>"),
        ({"instruction": ["a"], "output": [b"b"]}, "the column 'output' must be text, not binary"),
        ({"instruction": ["a"], "input": [1], "output": ["b"]}, "the column 'input' must be text, not int64"),
        ({"instruction": ["a"], "input": [1.5], "output": ["b"]}, "a.parquet row 1: the field 'input' must be text"),
    ],
)
def test_columns_that_are_missing_or_no_text(tmp_path, columns, message):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(BadInput) as refusal:
        sources.load(str(tmp_path / "a.parquet"), None, skip_bad=False)
    assert message in str(refusal.value)


def test_columns_of_text_in_other_forms(tmp_path):
    table = pyarrow.table(
        {
            "instruction": pyarrow.array(["a", "b"]).dictionary_encode(),
            "input": pyarrow.array([float("nan")] * 2),
            "output": pyarrow.array(["c", "d"], pyarrow.large_string()),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    samples = sources.load(str(tmp_path / "a.parquet"), None, skip_bad=False).samples
    assert [(sample.prompt, sample.response) for sample in samples] == [("a", "c"), ("b", "d")]


def test_a_column_that_is_there_twice(tmp_path):
    table = pyarrow.Table.from_arrays([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="2 columns are called 'output'; leave one"):
        sources.load(str(tmp_path / "a.parquet"), None, skip_bad=False)


def test_bad_rows_of_a_parquet_file_are_named(tmp_path):
    text = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"instruction": text, "output": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet row 2: the field 'instruction' is not valid UTF-8"):
        sources.load(str(tmp_path / "a.parquet"), None, skip_bad=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"instruction": "x"}', "must be an array of samples; for one object per line name it .jsonl"),
        ("a.json", b" ", "must be an array of samples; it is empty"),
        ("a.json", '[{"instruction": "x"}]'.encode("utf-16"), "must be an array of samples; save it as UTF-8"),
        (
            "a.json",
            b'[{"instruction": "x", "output": "y", "output": "z"}]',
            "a.json:1: not readable: the field",
        ),
        (
            "a.jsonl",
            b'{"instruction": "x", "output": "y", "output": "z"}',
            "a.jsonl:1: not readable: the field 'o",
        ),
        ("a.json", b'[{"instruction": "x", "output": "y"}\n{"a": 1}]', "a.json:2: not JSON: a comma"),
        ("a.json", b'[\n{"instruction": "x",}]', "a.json:2: not JSON"),
        ("a.json", b'[{"instruction": "x", "output": "y"},', "a.json:1: not JSON"),
        ("a.json", b'[{"instruction": "x", "output": "y"}]\n[]', "a.json:2: not JSON: text after the closing bracket"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "a.json:1: not readable"),
        ("a.jsonl", b"9" * 5000, "a.jsonl:1: not readable"),
        ("a.jsonl", b'{"instruction": \n', "a.jsonl:1: not JSON"),
        ("a.jsonl", b"", "no usable sample"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as refusal:
        sources.load(str(tmp_path / name), None, skip_bad=False)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_all_of_a_file_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD) * 3400)
    assert len(sources.load(str(tmp_path / "a.jsonl"), None, skip_bad=False).samples) == 10_200


def test_a_source_says_how_far_it_is(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines(GOOD) + b"{}\n" + lines(GOOD))
    (tmp_path / "a.json").write_text(json.dumps([*GOOD, {"x": 1}, *GOOD]))
    parquet.write_table(
        pyarrow.table({"instruction": ["a"] * 7, "output": ["b", "", *"cdefg"]}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.json", "a.parquet"):
        source = sources.Source(str(tmp_path / name), None, skip_bad=True)
        assert (source.total, source.place) == (7, 0)
        samples = iter(source)
        next(samples)
        assert source.place == 1, "it reads as it is asked"
        assert len(list(samples)) == 5
        assert (source.place, len(source.skipped)) == (7, 1)
        assert sources.Source(str(tmp_path / name), 2, skip_bad=True).total == 2


def test_more_samples_than_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(BadInput, match=r"--samples 4: .* holds 3 usable samples"):
        sources.load(str(tmp_path / "a.jsonl"), 4, skip_bad=False)


@pytest.mark.parametrize("name", ["alpaca", "guanaco"])
def test_hub_data_sets_load_through_the_datasets_library(tmp_path, monkeypatch, name):
    """The real loading code, on a folder that has the data set's name: `datasets` takes it before the hub."""
    folder = tmp_path / sources.HUB[name]
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(GOOD), folder / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    loaded = sources.load(name, 2, skip_bad=False)
    assert [sample.prompt for sample in loaded.samples] == PROMPTS[:2]


ODD = [  # odd rows of the two hub data sets, with an unused column
    {"instruction": "Draw a square", "input": "", "output": "", "text": "x"},
    {"instruction": "", "input": None, "output": "y", "text": ""},
    {"instruction": "x", "input": "", "output": None, "text": None},
    {"instruction": None, "input": "x", "output": "y", "text": "x"},
]


@pytest.mark.parametrize("name", ["alpaca", "guanaco"])
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_malformed_rows_of_hub_data_sets_are_skipped_and_counted(tmp_path, monkeypatch, name, ending):
    folder = tmp_path / sources.HUB[name]
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def write(rows):
        if ending == "jsonl":
            (folder / "train.jsonl").write_bytes(lines(rows))
        else:
            table = pyarrow.Table.from_pylist(rows)
            table = table.append_column("created", pyarrow.array([2**60] * len(rows), pyarrow.timestamp("ms")))
            parquet.write_table(table, folder / "train.parquet")

    write([GOOD[0] | {"text": "x"}, *ODD, *GOOD[1:], *GOOD])
    loaded = sources.load(name, None, skip_bad=False)
    assert [sample.prompt for sample in loaded.samples] == PROMPTS * 2
    assert len(loaded.skipped) == 4
    assert loaded.skipped[0] == " row 2: the response (the field 'output') is empty"
    assert loaded.left_out == ["text"] if ending == "jsonl" else ["created", "text"]
    assert len(sources.load(name, 2, skip_bad=False).skipped) == 4, "it reads on until there are as many as wanted"
    write([*GOOD, *ODD * 30])
    with pytest.raises(BadInput, match=r"120 of the first 123 samples are malformed, the first: .* row 4: "):
        sources.load(name, None, skip_bad=False)
    assert len(sources.load(name, None, skip_bad=True).skipped) == 120
    write(ODD)
    with pytest.raises(BadInput, match="it holds no usable sample; the first: "):
        sources.load(name, None, skip_bad=True)
    write([{"question": "x", "output": "y"}])
    with pytest.raises(BadInput, match="the column 'instruction' is missing; there is question, output"):
        sources.load(name, None, skip_bad=False)


def test_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput) as refusal:
        sources.load("alpaca", 2, skip_bad=False)
    assert "tatsu-lab/alpaca could not be loaded" in str(refusal.value)
    assert "\n" not in str(refusal.value)
