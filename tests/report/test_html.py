"""The page as a file: its content against the Markdown tables, what it embeds, its words, and what is refused."""

import base64
import gzip
import html
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import ROOT, refusal, run_program
from pages import mixed_records

from tunebench.record import parse_record
from tunebench.report.html.content import HEADLINE, content_of, padding_share
from tunebench.report.html.page import page_of
from tunebench.report.html.words import FILE, LANGUAGES, Words
from tunebench.report.load import load_records
from tunebench.report.markdown import figure, measured_on
from tunebench.report.memory import memory_rows
from tunebench.report.page import combined
from tunebench.report.pairing import against_itself, join
from tunebench.report.stats import rate_interval
from tunebench.report.tables import COLUMNS, noise_in_words, verdict

QUICK = ROOT / "results" / "measured" / "20261128-epyc-2-cores" / "quick"


@pytest.fixture(scope="module")
def quick():
    """The kept records of the quick suite, A/A runs among them."""
    records, broken = load_records([QUICK])
    assert not broken
    return records


@pytest.fixture(scope="module")
def mixed():
    """Real records of two machines, some edited to every kind of end."""
    return mixed_records()


@pytest.fixture(scope="module")
def pages(mixed):
    """The page of the mixed records in each language."""
    return {language: page_of(mixed, language) for language in LANGUAGES}


class Page(HTMLParser):
    """The tables of a page, each as lines of texts, its scripts by id, and its tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.scripts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("th", "td", "script", "small") else self.inside
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = "" if tag in ("th", "td", "script", "small") else self.inside

    def handle_data(self, data):
        if self.inside in ("th", "td"):
            self.tables[-1][-1][-1] += data.strip()
        elif self.inside == "script":
            name = self.tags[-1][1].get("id") or str(len(self.scripts))
            self.scripts[name] = self.scripts.get(name, "") + data


def test_the_rows_are_those_of_the_markdown_tables(quick):
    (machine,) = content_of(quick, Words("en")).machines
    assert [line.row for line in machine.lines] == join(quick)
    page = Page(page_of(quick))
    head, *lines = page.tables[0]
    places = {title: head.index(title) for title in (column.title for column in COLUMNS)}
    assert len(lines) == len(join(quick)) == 4
    for row, line in zip(join(quick), lines, strict=True):
        for column in COLUMNS:
            assert line[places[column.title]] == column.text(row), column.title
        assert line[head.index("Note")] == (row.note or "")
    assert {column.title for column in HEADLINE} == {column.title for column in COLUMNS}


def test_every_line_of_the_markdown_report_is_on_the_page(quick):
    page = page_of(quick)
    text = html.unescape(re.sub(r"<[^>]+>", "", page[: page.index('<script type="application/json"')]))
    for line in combined(quick).splitlines():
        sentences = [line] if not line.startswith(("|", "#")) else []
        for sentence in filter(None, sentences):
            note = re.sub(r"^\S+ \S+ bsz \d+: ", "", sentence)
            # Caveats are by machine and not by family, so that theirs list more.
            assert note.startswith("Measured on:") or note.replace("`", "") in text, note
    assert "Measured on: no GPU, AMD EPYC with 2 cores" in text
    assert "It compares CPU kernels: it says nothing about GPUs." in text


def test_a_second_machine_has_a_part_of_its_own(mixed):
    content = content_of(mixed, Words("en"))
    assert len(content.machines) == 2
    for machine in content.machines:
        runs = [record for record in mixed if record.hardware.place == machine.key]
        rows = sorted(join([record for record in runs if record.peer is None]), key=lambda row: row.tuned)
        assert [line.row for line in machine.lines] == rows


def test_a_machine_with_another_processor_is_another_one(quick):
    """A virtual machine may keep its name and id. Its noise is not that of the other processor."""
    moved = [r.model_copy(update={"hardware": r.hardware.model_copy(update={"cpu": "Other CPU"})}) for r in quick]
    plain = [record for record in moved if record.aa is None]
    content = content_of([*quick, *plain], Words("en"))
    assert len({machine.key for machine in content.machines}) == len(content.machines) == 2
    noises = {machine.name.split(",")[0]: {line.row.noise for line in machine.lines} for machine in content.machines}
    assert noises.pop("Other CPU") == {None}
    assert None not in noises.popitem()[1]


def test_a_baseline_has_figures_for_the_same_work_alone(mixed):
    content = content_of(mixed, Words("en"))
    known = 0
    assert len(content.ratios) == len(content.cells)
    for cell, ratios in zip(content.cells, content.ratios, strict=True):
        for place in ratios:
            other = content.cells[place]
            assert (other["work"], other["framework"]) == (cell["work"], cell["framework"])
            assert content.works[cell["work"]]["hardware.machine"] == content.works[other["work"]]["hardware.machine"]
            known += "text" in ratios[place]
    assert known >= 8  # ZeRO 2, ZeRO 3 and MP 4 of one batch size


def test_a_baseline_of_another_series_has_none(quick):
    """Two setups of one work: in one series with a figure, an hour later without."""
    first = [r for r in quick if not r.aa and r.model.name == "llama-tiny" and r.method == "full"]
    other = [r.model_copy(update={"setup": r.setup.model_copy(update={"recompute": True})}) for r in first]
    later = [r.model_copy(update={"started_at": r.started_at.replace("-28T", "-29T")}) for r in other]
    near, far = (content_of([*first, *runs], Words("en")).ratios for runs in (other, later))
    found = [[next(iter(ratios.values())) for ratios in cells] for cells in (near, far)]
    assert len(found[0]) == len(found[1]) == 4
    assert [ratio["text"] for ratio in found[0]] == ["within ±3%"] * 4
    assert [ratio["refusal"] for ratio in found[1]] == ["no common round in one series"] * 4


def test_keys_of_rows_stay_when_rounds_are_added(quick):
    ours = [record for record in quick if record.aa is None]
    one, all_rounds = (
        [line.key for line in content_of(records, Words("en")).lines]
        for records in ([r for r in ours if r.argv[-1].endswith("r1.json")], ours)
    )
    assert one == all_rounds
    assert len(set(one)) == len(one) == 4


def test_the_embedded_records_are_whole(mixed, pages):
    page = Page(pages["en"])
    lines = gzip.decompress(base64.b64decode(page.scripts["records"])).decode().split("\n")
    kept = [parse_record(line.encode()) for line in lines]
    assert kept == content_of(mixed, Words("en")).records
    runs = [run["record"] for cell in json.loads(page.scripts["data"])["cells"] for run in cell["runs"]]
    assert sorted(runs) == list(range(len(kept)))


def test_nothing_of_a_record_becomes_markup(pages):
    page = Page(pages["en"])
    assert not [tag for tag in page.tags if tag[0] == "img"]
    assert sum(tag == "script" for tag, _ in page.tags) == 5
    assert pages["en"].count("</script") == 5
    assert any("</script><img src=x onerror=alert(1)>" in cell for line in page.tables[0] for cell in line)


def test_the_page_loads_nothing(pages):
    for tag, attributes in Page(pages["en"]).tags:
        assert not attributes.keys() & {"src", "href", "action"}, (tag, attributes)
    assert "default-src 'none'" in html.unescape(pages["en"][:2000])


def test_the_interval_of_a_rate_is_students_t():
    low, high = rate_interval([100.0, 110.0, 121.0])
    assert low * high == pytest.approx(110.0**2)
    assert high / 110 == pytest.approx(1.2672, abs=1e-3)  # exp(4.3027 × log 1.1 ÷ √3)
    assert rate_interval([100.0]) is None


def test_padding_counts_timed_steps(quick):
    record = quick[0]
    real, padded = (sum(tokens[8:]) for tokens in (record.steps.effective_tokens, record.steps.padded_tokens))
    assert padding_share([record]) == pytest.approx(1 - real / padded)
    assert 0.2 < padding_share([record]) < 0.8


@pytest.fixture(scope="module")
def dictionary():
    """The content of words.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def rare_texts(quick):
    """What reports say of records of a GPU, of other commits, of other losses, of one round, of none."""
    first = [r for r in quick if not r.aa and r.model.name == "llama-tiny" and r.method == "full"]
    paddle, torch = (next(r for r in first if r.framework == side) for side in ("paddle", "torch"))
    hardware = torch.hardware.model_copy(update={"device": "NVIDIA H200"})
    git = torch.git.model_copy(update={"revision": "0" * 40, "dirty": True})
    losses = torch.steps.model_copy(update={"loss": [2 * loss for loss in torch.steps.loss]})
    built = torch.model.built.model_copy(update={"heads": 7})
    others = [
        torch.model_copy(update={"git": git, "hardware": hardware}),
        torch.model_copy(update={"steps": losses}),
        torch.model_copy(update={"model": torch.model.model_copy(update={"built": built})}),
    ]
    once = [r for r in quick if r.aa and r.argv[-1].endswith("r1.json")]
    predicted = torch.model_copy(update={"predicted_peak_memory_bytes": 10**9})
    return [
        *noise_in_words(against_itself(once)),
        measured_on(others[:1]),
        measured_on([]),
        verdict(0.0, (-0.01, 0.01)),
        verdict(0.2, None),
        *(row.refusal or "" for row in memory_rows([predicted])),
        *(row.refusal or "" for other in others for row in join([paddle, other])),
        figure(None, "disturbed"),
    ]


class TestWords:
    def test_both_languages_have_the_same_words_and_fields(self, dictionary):
        for key, texts in dictionary["words"].items():
            assert texts.keys() == set(LANGUAGES), key
            assert all(texts.values()), key
            fields = [sorted(re.findall(r"\{(\w+)\}", text)) for text in texts.values()]
            assert fields[0] == fields[1], key

    def test_every_word_is_used(self, dictionary):
        folder = FILE.parent
        sources = "".join(file.read_text() for file in folder.iterdir() if file.suffix in (".py", ".js", ".jinja"))
        made = ("status_", "kind_", "read_", "work_", "share_", *(f"{name}_" for name in ("rates", "speedups")))
        made += ("steps_", "loss_", "memory_", "profile_")
        unused = [key for key in dictionary["words"] if f'"{key}"' not in sources and f"'{key}'" not in sources]
        assert [key for key in unused if not key.startswith(made)] == []

    def test_headings_and_statuses_are_translated(self, dictionary, pages):
        titles = {column.title for column in COLUMNS}
        assert titles <= dictionary["headings"].keys()
        chinese, english = Page(pages["zh"]), Page(pages["en"])
        assert len(chinese.tables) == len(english.tables)
        for ours, theirs in zip(chinese.tables, english.tables, strict=True):
            assert len(ours) == len(theirs)
            for heading, other in zip(ours[0], theirs[0], strict=True):
                assert heading != other or heading == "MFU" or heading.startswith("÷ "), heading
        texts = {text for lines in chinese.tables for line in lines[1:] for text in line}
        for english_word in (
            "N/A",
            "OOM",
            "like for like",
            "best of each",
            "within ±3%",
            "no complete round",
            "failed",
        ):
            assert english_word not in texts
        assert any(text.startswith("无法区分（") for text in texts)
        assert any(text.endswith("（一轮，A/A 噪声）") for text in texts)

    def test_every_phrase_occurs(self, dictionary, pages, quick):
        """On the page of the mixed records, or in what the functions of reports say of other records."""
        text = html.unescape(re.sub(r"<[^>]+>", "\n", re.sub("</?code>", "`", pages["en"])))
        text = "\n".join([text, *rare_texts(quick)])
        unmatched = [p for p, _ in dictionary["phrases"] if not re.search(p, text, re.MULTILINE)]
        assert unmatched == []


@pytest.mark.frameworks
class TestProgram:
    def test_writes_the_page(self, tmp_path):
        file = tmp_path / "report.html"
        done = run_program("summarize.py", QUICK, "--html", file, "--lang", "zh", check=True)
        assert done.stdout.startswith(f"{file}: 64 records, ")
        assert file.read_text(encoding="utf-8").startswith('<!DOCTYPE html>\n<html lang="zh-CN">')
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize("other", ["--parity", "--memory", "--against=published", "--pack=results/cpu", "--docs"])
    def test_options_of_other_outputs_are_refused(self, tmp_path, other):
        said = refusal(run_program("summarize.py", QUICK, "--html", tmp_path / "a.html", other))
        assert said == f"summarize.py: --html writes a page of its own; leave {other.split('=')[0]} out"
        assert not list(tmp_path.iterdir())

    def test_a_language_without_a_page_is_refused(self):
        said = refusal(run_program("summarize.py", QUICK, "--lang", "zh"))
        assert said == "summarize.py: --lang is the language of a page; give --html FILE too, or leave --lang out"

    def test_no_records_make_no_page(self, tmp_path):
        said = refusal(run_program("summarize.py", tmp_path, "--html", tmp_path / "a.html"))
        assert said.startswith("summarize.py: --html: no records of runs in ")
        assert not list(tmp_path.iterdir())

    def test_published_records_are_left_out_and_counted(self, tmp_path):
        published = ROOT / "results" / "published"
        done = run_program("summarize.py", QUICK, published, "--html", tmp_path / "a.html", check=True)
        assert (
            done.stderr == f"summarize.py: --html leaves {len(list(published.glob('*.json')))} published records out\n"
        )
