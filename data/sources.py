"""Reads Alpaca-format samples from the embedded data, a data set of the hub, or a file."""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import synthetic

from tunebench.errors import BadInput
from tunebench.flags import DATA_NAMES, DEFAULT_SAMPLES, HUB

NEEDED = ("instruction", "output")
USED = ("instruction", "input", "output")  # the fields that are read; others are left out
# A hub data set may have this many malformed rows, or this share of the usable ones. Both data sets have some: 28 of
# the 52,002 rows of tatsu-lab/alpaca have an empty output.
FEW, MOST_BAD = 100, 0.1
ROWS_AT_ONCE = 1000  # rows of a table per read


@dataclass(frozen=True)
class Sample:
    """One instruction and its answer."""

    prompt: str
    response: str


class Source:
    """Yields the samples of a source in its order, one at a time. `load` says what it reads and what it refuses.

    `total` is the number of samples that it has at most, malformed ones included. `place` is the number of those read
    so far. `skipped` has the place and fault of each malformed one, and `left_out` the names of the unused fields; both
    grow while it is read.
    """

    def __init__(self, data: str, wanted: int | None, skip_bad: bool) -> None:
        self.skipped: list[str] = []
        self.left_out: set[str] = set()
        self.place = 0
        self._data, self._wanted, self._skip_bad = data, wanted, skip_bad
        self._limit = wanted or (DEFAULT_SAMPLES if data in DATA_NAMES else math.inf)
        self.total, self._raw = _raw_samples(data, self._limit, self.left_out)

    def __iter__(self) -> Iterator[Sample]:
        data, name, usable = self._data, HUB.get(self._data, self._data), 0
        for where, raw in self._raw:
            if usable == self._limit:
                break
            self.place += 1
            try:
                sample = _check(raw)
            except ValueError as fault:
                if not self._skip_bad and data not in HUB:
                    raise BadInput(
                        f"{name}{where}: {fault}; mend it, or leave such samples out with --skip-bad"
                    ) from None
                self.skipped.append(f"{where}: {fault}")
                continue
            self.left_out.update(raw.keys() - USED)
            usable += 1
            yield sample
        skipped = self.skipped
        if not usable:
            first = f"; the first: {name}{skipped[0]}" if skipped else ""
            raise BadInput(f"--data {data}: it holds no usable sample{first}")
        if len(skipped) > max(FEW, MOST_BAD * usable) and not self._skip_bad:
            raise BadInput(
                f"--data {data}: {len(skipped)} of the first {len(skipped) + usable} samples are malformed, the "
                f"first: {name}{skipped[0]}; if that is as it should be, leave them out with --skip-bad"
            )
        if self._wanted is not None and usable < self._wanted:
            raise BadInput(f"--samples {self._wanted}: {data} holds {usable} usable samples; use at most that")


@dataclass(frozen=True)
class Loaded:
    """The first samples of a source, in its order, and what was left out.

    `skipped` has the place and fault of each malformed sample. `left_out` has the names of the unused fields.
    """

    samples: list[Sample]
    skipped: list[str]
    left_out: list[str]


def load(data: str, wanted: int | None, skip_bad: bool) -> Loaded:
    """Reads `wanted` samples of a named source (default: 10,000) or of a file (default: all).

    Raises `BadInput` where a sample of a file is malformed, with file and line, unless `skip_bad` is set; where a hub
    data set has too many malformed samples; and where the source has fewer than `wanted`.
    """
    source = Source(data, wanted, skip_bad)
    samples = list(source)
    return Loaded(samples, source.skipped, sorted(source.left_out))


def _check(raw: Any) -> Sample:
    """Makes a sample of a raw object. Raises ValueError with its fault. `input` may be missing, null or empty."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, dict):
        raise ValueError(f"a sample must be an object, not {type(raw).__name__}")
    for field in NEEDED:
        if field not in raw:
            raise ValueError(f"the field {field!r} is missing; there is {in_words(raw) or 'none'}")
    texts = {}
    for field in USED:
        text = raw.get(field)
        if field == "input" and text is None:
            text = ""
        if not isinstance(text, str):
            raise ValueError(f"the field {field!r} must be text, not {type(text).__name__}")
        if "\x00" in text:
            raise ValueError(f"the field {field!r} contains a NUL byte")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"the field {field!r} is not valid UTF-8")
        texts[field] = text
    if not texts["output"].strip():
        raise ValueError("the response (the field 'output') is empty")
    prompt = f"{texts['instruction']}\n{texts['input']}" if texts["input"] else texts["instruction"]
    if not prompt.strip():
        raise ValueError("the prompt (the fields 'instruction' and 'input') is empty")
    return Sample(prompt, texts["output"])


def in_words(names: Iterable[str], most: int = 8) -> str:
    """The first `most` of some column names, for a message of one line."""
    names = list(names)
    shown = [name if name.isprintable() and 0 < len(name) <= 40 else f"{name[:40]!a}" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _raw_samples(data: str, limit: float, left_out: set[str]) -> tuple[int, Iterator[tuple[str, Any]]]:
    """The number of raw samples, `limit` at most, and an iterator over them.

    It yields each one with its place in the source, or a ValueError in place of an unreadable sample. The unused
    columns of a table go into `left_out` and are not read.
    """
    if data.startswith("synthetic-"):
        generated = synthetic.records(data.removeprefix("synthetic-"))
        return int(limit), ((f" sample {i}", next(generated)) for i in range(1, int(limit) + 1))
    if data in HUB:
        count, samples = _from_hub(HUB[data], left_out)
    elif Path(data).suffix == ".parquet":
        count, samples = _from_parquet(Path(data), left_out)
    elif Path(data).suffix == ".jsonl":
        count, samples = _lines(Path(data)), _from_jsonl(Path(data))
    else:
        text = _text_of(Path(data))
        count, samples = _most_objects(text), _from_json(Path(data), text)
    return int(min(count, limit)), samples


def _columns(name: str, found: list[str], left_out: set[str]) -> list[str]:
    """The used ones of a table's columns. Raises `BadInput` where one is missing or occurs twice."""
    for column in USED:
        if column in NEEDED and column not in found:
            raise BadInput(f"{name}: the column {column!r} is missing; there is {in_words(found) or 'none'}")
        if found.count(column) > 1:
            raise BadInput(f"{name}: {found.count(column)} columns are called {column!r}; leave one")
    left_out.update(set(found) - set(USED))
    return [column for column in USED if column in found]


def _from_hub(name: str, left_out: set[str]) -> tuple[int, Iterator[tuple[str, Any]]]:
    """The rows of a data set: from the hub, from its cache, or from a folder of that name where this runs."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's clients raise many unrelated classes
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise BadInput(f"{name} could not be loaded: {reason}; with no network, pass its file: --data PATH") from None
    table = rows.select_columns(_columns(name, rows.column_names, left_out)).with_format("arrow")
    return len(table), _from_table(name, (part for part in table.iter(ROWS_AT_ONCE)))


def _text_of(path: Path) -> str:
    # Invalid UTF-8 becomes lone surrogates, so that `_check` can name the sample that has it.
    return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")


def _most_objects(text: str) -> int:
    """The number of a JSON array's samples, or more where a text contains what looks like the start of one."""
    return sum(1 for _ in re.finditer(r"\{\s*\"", text))


def _from_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=_no_key_twice)
    position, line = _skip_blank(text, 0), 1
    if not text.startswith("[", position):
        hint = "; for one object per line name it .jsonl" * text.startswith("{", position)
        hint = "; it is empty" if position == len(text) else hint
        hint = "; save it as UTF-8" if "\0" in text[:1000] else hint
        raise BadInput(f"{path}: a .json file must be an array of samples{hint}")
    counted = 0
    position = _skip_blank(text, position + 1)
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            raw, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{line}: not readable: {error}") from None
        yield f":{line}", raw
        position = _skip_blank(text, end)
        if text.startswith(",", position):
            position = _skip_blank(text, position + 1)
        elif not text.startswith("]", position):
            line = 1 + text.count("\n", 0, position)
            raise BadInput(f"{path}:{line}: not JSON: a comma or the closing bracket is missing")
    rest = _skip_blank(text, position + 1)
    if rest < len(text):
        raise BadInput(f"{path}:{1 + text.count(chr(10), 0, rest)}: not JSON: text after the closing bracket")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {max(names, key=names.count)!a} is there twice")
    return found


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _lines(path: Path) -> int:
    """The number of a file's lines that are not blank."""
    with path.open("rb") as lines:
        return sum(not line.isspace() for line in lines)


def _from_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
            if not text.strip():
                continue
            try:
                raw = json.loads(text, object_pairs_hook=_no_key_twice)
            except json.JSONDecodeError as error:
                raw = ValueError(f"not JSON: {error.msg}")
            except (ValueError, RecursionError) as error:
                raw = ValueError(f"not readable: {error}")
            yield f":{number}", raw


def _from_parquet(path: Path, left_out: set[str]) -> tuple[int, Iterator[tuple[str, Any]]]:
    from pyarrow import parquet

    with _readable(path), parquet.ParquetFile(path) as file:
        used, count = _columns(str(path), file.schema_arrow.names, left_out), file.metadata.num_rows

    def rows() -> Iterator[tuple[str, Any]]:
        with _readable(path), parquet.ParquetFile(path) as file:
            yield from _from_table(str(path), file.iter_batches(ROWS_AT_ONCE, columns=used))

    return count, rows()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises `BadInput` where a Parquet file cannot be read in the body."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:200]})") from None


def _from_table(name: str, parts: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yields the rows of Arrow tables or batches. Raises `BadInput` where a used column is no text."""
    number = 0
    for part in parts:
        columns = {column: part.column(column) for column in USED if column in part.schema.names}
        for column, values in columns.items():
            if not _may_be_text(values.type):
                raise BadInput(f"{name}: the column {column!r} must be text, not {' '.join(str(values.type).split())}")
        for row in range(part.num_rows):
            number += 1
            raw: Any = {}
            for column, values in columns.items():
                try:
                    value = values[row].as_py()
                except UnicodeDecodeError:
                    raw = ValueError(f"the field {column!r} is not valid UTF-8")
                    break
                raw[column] = None if isinstance(value, float) and math.isnan(value) else value
            yield f" row {number}", raw


def _may_be_text(kind: Any) -> bool:
    """Whether a column of this Arrow type can hold text.

    A column without values has the type null, or a floating type where its writer spelled missing values as NaN.
    """
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_null(kind) or types.is_floating(kind)
