"""Any flag, data file or record is accepted or refused in one line, never with a traceback."""

import contextlib
import gc
import io
import itertools
import json
import os
import warnings
from pathlib import Path

import pyarrow
import pytest
import sources
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tunebench.digest import digest_of
from tunebench.errors import BadInput
from tunebench.flags import Flags, parse_flags
from tunebench.record import parse_record
from tunebench.report.pairing import join
from tunebench.report.published import FOLDER, load, render_against, render_published
from tunebench.report.tables import render

pytestmark = pytest.mark.filterwarnings("error")  # a user would see the warning
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,  # the same inputs in every run
    database=None,
    suppress_health_check=list(HealthCheck),
)
RECORDS = ROOT / "tests" / "data" / "quick.jsonl"


@pytest.fixture(autouse=True)
def without_garbage_of_others():
    """Frees what other files' tests left, such as open pipes: a warning about it would be an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Generated relative paths start at an empty folder."""
    monkeypatch.chdir(tmp_path)


def one_line(text: str) -> None:
    assert len(text.splitlines()) == 1, text


# Values for flags, by form. None makes the test look up a host name or write a file elsewhere.
TEXTS = st.text(max_size=12) | st.text(st.characters(codec=None, categories=["Cs", "L"]), min_size=1, max_size=4)
NUMBERS = st.integers() | st.floats() | st.sampled_from(["1e3", "٣", "0x1", "1_0", " 4", "+2", "9" * 5000, "-0"])
PATHS = st.sampled_from(
    [
        "~",
        "~nobody/x.json",
        "x" * 300 + ".json",
        "a/" * 2000 + "b.json",
        ".json",
        "..",
        "/dev/null",
        "a\0b.jsonl",
        "x/y/z",
        "fixed:16",
    ]
)
VALUES = st.one_of(
    NUMBERS.map(str),
    TEXTS,
    PATHS,
    NUMBERS.map("fixed:{}".format),
    TEXTS.map("fixed:{}".format),
    st.sampled_from(["llama-tiny", "lora", "O1", "bf16", "synthetic-en", "a", "random"]),
)
HOSTS = st.text("0123456789:[].", max_size=12) | st.sampled_from(
    ["localhost:1", "localhost:99999", ":1", "localhost:٣"]
)
OUTS = st.text(max_size=12).filter(lambda text: not text.startswith(("/", "~")) and ".." not in text)
NAMES = (
    "model weights data samples skip-bad bsz steps epochs seed micro-bsz nproc nnodes node-rank zero mp dtype amp "
    "plan-seed paired-halves recompute attention warmup-steps lr timeout aa until lora-r lora-alpha help"
)
FLAGS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(NAMES.split()), VALUES),
        st.tuples(st.just("master"), HOSTS),
        st.tuples(st.just("out"), OUTS),
        st.tuples(st.text("abc-=é", max_size=6), VALUES),
    ).flatmap(lambda pair: st.sampled_from([[f"--{pair[0]}={pair[1]}"], [f"--{pair[0]}", pair[1]], [f"--{pair[0]}"]])),
    max_size=6,
).map(lambda groups: list(itertools.chain.from_iterable(groups)))


@FUZZ
@given(FLAGS, st.sampled_from(["full", "lora"]))
@example(["--data=~nobody/x.json"], "full")
@example(["--model=~nobody/x"], "full")
@example([f"--data={'x' * 300}.json"], "full")
@example([f"--model={'x' * 300}"], "full")
@example(["--model=owner/name", f"--out={'x' * 300}"], "full")
@example([f"--out={'x/' * 3000}y"], "full")
@example(["--bsz=100000000000000000000", "--micro-bsz=7"], "full")
@example(["--nproc=100000000000000000000", "--mp=7"], "full")
def test_flags(arguments, method):
    said, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
            flags = parse_flags(method, arguments, prog="x")
    except BadInput as refusal:
        one_line(str(refusal))
    except SystemExit as end:
        assert end.code in (0, 2)
        if end.code:
            one_line(complaint.getvalue())
    else:
        assert isinstance(flags, Flags)
        assert flags.accumulation * flags.micro_bsz * flags.replicas == flags.bsz


SAMPLES = st.fixed_dictionaries(
    {}, optional={name: st.none() | TEXTS | st.integers() for name in ("instruction", "input", "output", "a\nb")}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
PIECES = st.one_of(
    (SAMPLES | JSON).map(lambda value: json.dumps(value).encode()),
    SAMPLES.map(lambda value: json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")),
    st.binary(max_size=8),
    st.sampled_from(
        [b"[", b"]", b",", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b'{"instruction": "', b"[" * 5000, b"9" * 5000]
    ),
)


def read_whatever(path: Path, wanted: int | None, skip_bad: bool) -> None:
    try:
        loaded = sources.load(str(path), wanted, skip_bad)
    except BadInput as refusal:
        one_line(str(refusal))
        assert path.name in str(refusal)
    else:
        assert loaded.samples
        assert skip_bad or not loaded.skipped
        for line in (*loaded.skipped, sources.in_words(loaded.left_out) or "none"):
            one_line(line)


@FUZZ
@given(
    st.lists(PIECES, max_size=8).map(b"".join)
    | st.lists(SAMPLES, max_size=5).map(lambda samples: json.dumps(samples).encode())
    | st.lists(PIECES, max_size=5).map(b"\n".join),
    st.sampled_from([".json", ".jsonl"]),
    st.none() | st.integers(1, 3),
    st.booleans(),
)
def test_json_data(content, ending, wanted, skip_bad):
    path = Path(f"data{ending}").resolve()
    path.write_bytes(content)
    read_whatever(path, wanted, skip_bad)


COLUMNS = st.lists(TEXTS.filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)) | st.none(), max_size=4)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["instruction", "input", "output", "other", "output.x", "a\nb"]),
        st.one_of(
            COLUMNS,
            *(st.lists(kind, max_size=4) for kind in (st.integers(0, 9), st.floats(), st.binary(), st.datetimes())),
            st.lists(st.lists(st.text(max_size=2), max_size=2), max_size=4),
        ),
        max_size=4,
    ),
    st.integers(0, 60),
    st.booleans(),
)
def test_parquet_data(columns, cut, skip_bad):
    path = Path("data.parquet").resolve()
    length = min(map(len, columns.values()), default=0)
    parquet.write_table(pyarrow.table({name: values[:length] for name, values in columns.items()}), path)
    content = path.read_bytes()
    if cut % 3 == 0:
        content = content[: len(content) - cut] + b"\x00" * (cut % 2)
    path.write_bytes(content)
    read_whatever(path, None, skip_bad)


def paths_of(value, path=()) -> list[tuple]:
    """All places in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *itertools.chain.from_iterable(paths_of(each, (*path, key)) for key, each in inner)]


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    """Two rounds of a pair: real records."""
    contents = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    rounds = [content for content in contents if content["argv"][-1].startswith("--out=llama-tiny-lora-bsz4/")]
    assert [row.speedup is not None for row in join([parse_record(json.dumps(r).encode()) for r in rounds])] == [True]
    return rounds


@pytest.fixture(scope="module")
def published() -> dict:
    """The record of a published run, as JSON."""
    return json.loads((FOLDER / "llama-7b-full-bsz8-mp4-paddle.json").read_text())


def edited(content: dict, edits: list) -> dict:
    """A copy in which some places have other values or are removed."""
    content = json.loads(json.dumps(content))
    for where, value in edits:
        places = [path for path in paths_of(content) if path]
        *way, last = places[where % len(places)]
        target = content
        for key in way:
            target = target[key]
        if value == "cut":
            del target[last]
        else:
            target[last] = value
    return content


ODD = st.one_of(
    JSON,
    st.sampled_from(["cut", "a", "b", "fp16", "ok", "oom", "paddle", "torch", 0, 1, -1, 2**63, 2**5000, 1e-308, 1e308]),
)
EDITS = st.lists(st.tuples(st.integers(0, 5000), ODD), max_size=4)


@FUZZ
@given(st.data())
def test_record_files(measured, published, data):
    """Any file in the results: each file that is no record is named, and the others make tables."""
    folder = Path("results").resolve()
    folder.mkdir(exist_ok=True)
    for i, content in enumerate(measured):
        content = edited(content, data.draw(EDITS))
        kind = data.draw(st.sampled_from(["signed", "signed", "edited", "bytes"]))
        if kind == "signed":  # with the digest of a run's own record
            content.pop("sha256", None)
            content["sha256"] = digest_of(content)
        text = json.dumps(content).encode()
        if kind == "bytes":
            cut = data.draw(st.integers(0, len(text)))
            text = text[:cut] + data.draw(st.binary(max_size=4)) + text[cut + data.draw(st.integers(0, 4)) :]
        (folder / f"r{i}.json").write_bytes(text)
    (folder / "p.json").write_text(json.dumps(edited(published, data.draw(EDITS))))
    records, published_ones, broken = load([folder])
    assert len(records) + len(published_ones) + len(broken) == len(measured) + 1
    for line in broken:
        one_line(line)
        assert line.startswith(str(folder))
    show(records)
    for form in ("md", "csv", "json"):
        assert isinstance(render_published(published_ones, form), str)
        assert isinstance(render_against(records, published_ones, form), str)


def show(records) -> None:
    """Joins the records and prints them in every form. JSON has no NaN."""
    rows = join(records)
    for form in ("md", "csv", "json"):
        printed = render(rows, form, records, parity=True)
        if form == "json":
            json.loads(printed, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


@pytest.mark.frameworks
def test_every_place_of_a_record(measured):
    """Each field set to each odd value, as if a run had written that."""
    others = [parse_record(json.dumps(content).encode()) for content in measured[1:]]
    taken = 0
    for where, _ in enumerate(paths_of(measured[0])[1:]):
        for value in ("cut", "a", "fp16", "ok", None, True, [], {}, 0, 1, -1, 2**63, 2**5000, 1e-300, 1e300, "1" * 300):
            content = edited(measured[0], [(where, value)])
            content["sha256"] = digest_of({name: each for name, each in content.items() if name != "sha256"})
            try:
                record = parse_record(json.dumps(content).encode())
            except ValueError as fault:
                one_line(" ".join(str(fault).split()))
            else:
                taken += 1
                show([record, *others])
                show([record.model_copy(update={"aa": side}) for side in "ab"])
    assert taken > 100


def test_arguments_that_are_no_text(tmp_path):
    """A file name may be any bytes; a record is text."""
    name = os.fsdecode(b"caf\xe9.json")
    (tmp_path / name).write_text("[]")
    with pytest.raises(SystemExit) as end:
        parse_flags("full", [f"--data={tmp_path / name}"])
    assert end.value.code == 2
