"""The embedded data: lengths as in real data, correct answers, and its tokenizer."""

import datetime
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import synthetic
import tokenizer as tokenizers_of
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebench.errors import BadInput

# test_scripts.py shows that the tokens are the same in both environments.
pytestmark = pytest.mark.frameworks

SAMPLES = 10_000
QUANTILES = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1]
REAL = {  # tokens of real instruction data at these quantiles: prompt, response with EOS, total; mean total
    "en": (
        [5, 9, 11, 15, 23, 33, 44, 93, 171],
        [2, 12, 29, 114, 277, 385, 385, 385, 385],
        [15, 33, 50, 139, 294, 394, 399, 409, 556],
        175,
    ),
    "zh": (
        [5, 11, 15, 19, 26, 39, 52, 94, 194],
        [5, 27, 62, 168, 324, 385, 385, 385, 385],
        [16, 51, 89, 194, 342, 401, 406, 419, 453],
        212,
    ),
}
MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
WEEKDAYS = {
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "zh": [f"星期{day}" for day in "一二三四五六日"],
}
both = pytest.mark.parametrize("language", ["en", "zh"])


@pytest.fixture(scope="module")
def records():
    return {language: synthetic.generate(language, SAMPLES) for language in REAL}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers_of.embedded(tmp_path_factory.mktemp("tokenizer"))


TEXTS = st.text(max_size=80) | st.text("aZ09 .\n\t_-é×\x1c", max_size=80)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(TEXTS)
def test_counts_are_the_matches_of_the_pattern(text):
    found = len(re.findall(synthetic.PIECES, text))
    assert synthetic.count(text) == found
    if text.isascii():
        assert synthetic._count_ascii(text.encode()) == found


def test_whole_numbers_are_those_of_the_random_module():
    kit = synthetic.Kit(random.Random(5), "en", 20, 20)
    other = random.Random(5)
    ends = [1, 2, 3, 10, 64, 65, 10**6, *range(1, 300)]
    assert [kit.below(end) for end in ends] == [other.randrange(end) for end in ends]


def prompt(record):
    return record["instruction"] + ("\n" + record["input"] if record["input"] else "")


# --- The data ---------------------------------------------------------------------------------------------------------


@both
def test_lengths_are_those_of_real_data(language, records, tokenizer):
    prompts = [len(e.ids[:256]) for e in tokenizer.encode_batch([prompt(r) for r in records[language]])]
    responses = [len(e.ids[:384]) + 1 for e in tokenizer.encode_batch([r["output"] for r in records[language]])]
    totals = np.add(prompts, responses)
    *tables, mean = REAL[language]
    for lengths, real in zip((prompts, responses, totals), tables, strict=True):
        np.testing.assert_allclose(np.quantile(lengths, QUANTILES), real, rtol=0.1)
    assert totals.mean() == pytest.approx(mean, rel=0.1)


@both
def test_records_are_varied(language, records):
    triples = {(r["instruction"], r["input"], r["output"]) for r in records[language]}
    assert len(triples) > 0.97 * SAMPLES
    assert len({r["instruction"] for r in records[language]}) > 0.7 * SAMPLES
    assert 0.1 < sum(r["input"] != "" for r in records[language]) / SAMPLES < 0.5
    assert all(set(r) == {"instruction", "input", "output"} and r["output"].strip() for r in records[language])


@both
def test_order_does_not_depend_on_length(language, records):
    lengths = np.array([synthetic.count(r["output"]) for r in records[language]])
    halves = lengths[: SAMPLES // 2].mean(), lengths[SAMPLES // 2 :].mean()
    assert halves[0] == pytest.approx(halves[1], rel=0.03)
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.05


@both
def test_fewer_samples_are_the_first_of_more_in_every_process(language, records):
    assert synthetic.generate(language, 700) == records[language][:700]
    assert synthetic.generate(language, 50, seed=1) != records[language][:50]
    command = [sys.executable, str(ROOT / "data/synthetic.py"), "--language", language, "--samples", "700"]
    printed = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "77"}, capture_output=True, check=True).stdout
    assert [json.loads(line) for line in printed.decode().splitlines()] == records[language][:700]


# --- Correct answers, computed in other ways than the generator does --------------------------------------------------


@both
def test_every_equation_holds(language, records):
    checked = dict.fromkeys("+-×÷", 0)
    for record in records[language]:
        for left, right in re.findall(r"(\d+(?: [-+×÷] \d+)+) = (\d+)", record["output"]):
            for sign in set(left) & set("+-×÷"):
                checked[sign] += 1
            expression = left.replace("×", "*").replace("÷", "//")
            value = eval(re.sub(r"\b0+(?=\d)", "", expression))  # digits and operators only
            assert value == int(right), (left, right)
        for a, b, q, r in re.findall(r"(\d+) ÷ (\d+) = (\d+)(?: remainder |余)(\d+)", record["output"]):
            assert int(a) == int(b) * int(q) + int(r)
            assert int(r) < int(b)
    assert min(checked.values()) > 100, checked
    assert sum(checked.values()) > 20_000, checked


@both
def test_asked_sums_are_answered(language, records):
    """The last number of the answer to a bare calculation is its value."""
    checked = 0
    for record in records[language]:
        found = re.search(
            r"(?:What is|Calculate|value of|计算|请算一算：)\s?(\d+(?: [-+×] \d+)+)(?![\d ])", record["instruction"]
        )
        if found:
            assert int(re.findall(r"\d+", record["output"])[-1]) == eval(found[1].replace("×", "*")), record
            checked += 1
    assert checked > 100


@both
def test_sorted_lists_are_sorted(language, records):
    checked = 0
    for record in records[language]:
        if re.search("from (smallest|largest) to|从[大小]到[大小]", record["instruction"]) and record["input"]:
            numbers = sorted(map(int, re.findall(r"\d+", record["input"])))
            down = "largest to smallest" in record["instruction"] or "从大到小" in record["instruction"]
            last = list(map(int, re.findall(r"\d+", record["output"].splitlines()[-1])))
            assert last == (numbers[::-1] if down else numbers), record
            checked += 1
    assert checked > 100


@both
def test_filtered_lists_keep_what_was_asked(language, records):
    checked = 0
    for record in records[language]:
        found = re.search(r"(above|divisible by|大于|能被)\s?(\d+)", record["instruction"])
        if not found or not record["input"]:
            continue
        limit = int(found[2])
        above = found[1] in ("above", "大于")
        kept = [x for x in map(int, re.findall(r"\d+", record["input"])) if (x > limit if above else x % limit == 0)]
        last = re.split("[:：]", record["output"].splitlines()[-1])[-1]
        answer = list(map(int, re.findall(r"\d+", last)))
        counting = re.search("How many|Count|几个|多少", record["instruction"])
        assert answer == ([len(kept)] if counting else kept), record
        checked += 1
    assert checked > 100


@both
def test_dates_have_their_weekday_and_distance(language, records):
    checked = 0
    for record in records[language]:
        if language == "en":
            rows = re.findall(r"(\d+) ([A-Z][a-z]+) (\d{4}),? (?:is )?a (\w+day)", record["output"])
            days = [(datetime.date(int(y), MONTHS.index(m) + 1, int(d)), name) for d, m, y, name in rows]
        else:
            rows = re.findall(r"(\d{4})年(\d+)月(\d+)日[，是](星期.)", record["output"])
            days = [(datetime.date(int(y), int(m), int(d)), name) for y, m, d, name in rows]
        for day, name in days:
            assert WEEKDAYS[language][day.isoweekday() - 1] == name, record
        if len(days) > 1:
            step = int(re.search(r"(\d+) days apart|每(\d+)天", record["instruction"]).expand(r"\1\2"))
            assert {(b - a).days for (a, _), (b, _) in pairwise(days)} == {step}
        checked += len(days)
    assert checked > 1000


@both
def test_json_answers_hold_the_input(language, records):
    checked = 0
    for record in records[language]:
        if "JSON" in record["instruction"]:
            rows, lines = json.loads(record["output"]), record["input"].splitlines()
            assert len(rows) == len(lines)
            for row, line in zip(rows, lines, strict=True):
                numbers = [value for value in row.values() if isinstance(value, int)]
                assert sorted(numbers) == sorted(map(int, re.findall(r"\d+", line))), record
                assert all(value in line for value in row.values() if isinstance(value, str)), record
            checked += len(rows)
    assert checked > 40


def number_of_words(text):
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    values = {word: i for i, word in enumerate((small + " seventeen eighteen nineteen").split())}
    tens = enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)  # noqa: SIM905
    values |= {word: 10 * i for i, word in tens}
    whole = part = 0
    for word in text.replace("-", " ").replace(" and ", " ").split():
        if word == "thousand":
            whole, part = whole + part * 1000, 0
        else:
            part = part * 100 if word == "hundred" else part + values[word]
    return whole + part


def number_of_hanzi(text):
    values = dict(zip("零一二三四五六七八九零壹贰叁肆伍陆柒捌玖", [*range(10)] * 2, strict=True))
    units = dict(zip("十百千拾佰仟", [10, 100, 1000] * 2, strict=True))
    whole = part = digit = 0
    for character in text:
        if character == "万":
            whole, part, digit = (part + digit) * 10_000, 0, 0
        elif character in units:
            part, digit = part + (digit or 1) * units[character], 0
        else:
            digit = values[character]
    return whole + part + digit


@both
def test_numbers_in_words_are_right(language, records):
    pattern, number = {
        "en": (r"^(\d+): ([a-z][a-z -]+)$", number_of_words),
        "zh": (r"^(\d+)：([零一-龥]+)$", number_of_hanzi),
    }[language]
    rows = [row for r in records[language] for row in re.findall(pattern, r["output"], re.MULTILINE)]
    rows = [(digits, words) for digits, words in rows if words not in ("yes", "no", "是", "否")]
    assert all(int(digits) == number(words) for digits, words in rows)
    assert len({words for _, words in rows}) > 2000


@pytest.mark.parametrize(
    ("number", "words", "hanzi"),
    [
        (10, "ten", "十"),
        (305, "three hundred and five", "三百零五"),
        (2016, "two thousand and sixteen", "二千零一十六"),
        (20_500, "twenty thousand five hundred", "二万零五百"),
        (81_040, "eighty-one thousand and forty", "八万一千零四十"),
    ],
)
def test_numbers_are_written_as_people_write_them(number, words, hanzi):
    assert synthetic.in_words(number) == words
    assert synthetic.in_hanzi(number) == hanzi


# --- The tokenizer ----------------------------------------------------------------------------------------------------


def test_vocabulary(tokenizer, records):
    assert tokenizer.get_vocab_size() == len(tokenizer.get_vocab()) == tokenizers_of.VOCAB_SIZE == 8192
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>")] == [0, 1, 2]
    texts = [text for language in REAL for record in records[language][:2000] for text in record.values()]
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
    assert tokens / sum(map(synthetic.count, texts)) == pytest.approx(1, abs=0.005)  # words are tokens
    assert max(max(e.ids, default=0) for e in tokenizer.encode_batch(texts)) < 8192


STRANGE = [
    "",
    " ",
    "a  b\n\n\n\tc\r\n",
    "</s><s> <pad>",
    "Ünïcödé ²½³ ٣٤ __init__",
    "日本語、한국어 русский",
    "👩‍👩‍👧 \x00\x1f\ufeff\u2028",
]


@pytest.mark.parametrize("text", STRANGE)
def test_round_trip_of_any_text(text, tokenizer):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids), "text must not be able to end a response"


@both
def test_round_trip_of_the_data(language, tokenizer, records):
    texts = [text for record in records[language][:2000] for text in record.values()]
    assert tokenizer.decode_batch([e.ids for e in tokenizer.encode_batch(texts)]) == texts
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert len(tokenizer.encode("三百二十")) == 4


def test_training_gives_the_same_bytes_and_the_cache_keeps_them(tmp_path, tokenizer, monkeypatch):
    tokenizers_of.embedded(tmp_path / "new" / "cache")
    (file,) = (tmp_path / "new" / "cache").iterdir()
    assert re.fullmatch(r"tokenizer-[0-9a-f]{12}\.json", file.name)
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(tokenizer.to_str().encode()).digest()

    monkeypatch.setattr(tokenizers_of, "train", lambda: tokenizer)
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"{}"):
        file.write_bytes(broken)
        assert tokenizers_of.embedded(file.parent).encode("Thanks.").ids == tokenizer.encode("Thanks.").ids
        assert file.read_bytes() == whole

    monkeypatch.setattr(tokenizers_of, "train", lambda: pytest.fail("a good file was trained anew"))
    assert tokenizers_of.embedded(file.parent).to_str() == tokenizer.to_str()


def checkpoint(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_embedded_ids(tokenizer):
    assert (tokenizers_of.eos_id(tokenizer, None), tokenizers_of.pad_id(tokenizer, None)) == (2, 0)


@pytest.mark.parametrize(
    ("files", "eos", "pad"),
    [
        ({"config": {"eos_token_id": 7, "pad_token_id": 9}}, 7, 9),
        ({"config": {"eos_token_id": [5, 6]}}, 5, 5),
        ({"config": {"eos_token_id": 7, "pad_token_id": -1}}, 7, 7),
        ({"config": {"eos_token_id": 7, "pad_token_id": 32000, "vocab_size": 32000}}, 7, 7),
        ({"config": {"eos_token_id": 2, "vocab_size": 3}, "tokenizer_config": {"pad_token": "!"}}, 2, 2),
        ({"config": {"eos_token_id": 0, "pad_token_id": None}, "tokenizer_config": {"pad_token": "<s>"}}, 0, 1),
        ({"tokenizer_config": {"eos_token": "</s>", "pad_token": {"content": "<pad>"}}}, 2, 0),
    ],
)
def test_ids_of_a_checkpoint(tmp_path, tokenizer, files, eos, pad):
    folder = checkpoint(tmp_path, **files)
    assert (tokenizers_of.eos_id(tokenizer, folder), tokenizers_of.pad_id(tokenizer, folder)) == (eos, pad)


def test_checkpoints_without_what_is_needed(tmp_path, tokenizer):
    assert tokenizers_of.of_checkpoint(tmp_path) is None
    with pytest.raises(BadInput, match=r"eos_token.*config\.json"):
        tokenizers_of.eos_id(tokenizer, checkpoint(tmp_path, config={}, tokenizer_config={"eos_token": "<unknown>"}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json"):
        tokenizers_of.eos_id(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert tokenizers_of.of_checkpoint(tmp_path).get_vocab_size() == 8192
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json") as refused:
        tokenizers_of.of_checkpoint(tmp_path)
    assert "\n" not in str(refused.value)
