"""Where samples come from: the embedded data, the hub's data sets, or a file. All give Alpaca-format samples."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import synthetic

from tunebench.errors import BadInput
from tunebench.flags import DATA_NAMES, DEFAULT_SAMPLES

HUB = {"alpaca": "tatsu-lab/alpaca", "guanaco": "Chinese-Vicuna/guanaco_belle_merge_v1.0"}


@dataclass(frozen=True)
class Sample:
    """One instruction and its answer."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Loaded:
    """The first samples of a source, in its order, and what was left out of it under --skip-bad."""

    samples: list[Sample]
    skipped: list[str]


def load(data: str, wanted: int | None, skip_bad: bool) -> Loaded:
    """Reads `wanted` samples of a named source (default: 10,000) or of a file (default: all).

    Raises `BadInput` for a malformed sample, with file and line, unless `skip_bad`; and where `wanted` are not there.
    """
    samples: list[Sample] = []
    skipped: list[str] = []
    limit = wanted or (DEFAULT_SAMPLES if data in DATA_NAMES else math.inf)
    for where, raw in _raw_samples(data, limit):
        if len(samples) == limit:
            break
        try:
            samples.append(_check(raw))
        except ValueError as fault:
            if not skip_bad:
                raise BadInput(f"{where}: {fault}; mend it, or leave such samples out with --skip-bad") from None
            skipped.append(f"{where}: {fault}")
    if not samples:
        raise BadInput(f"--data {data}: it holds no usable sample")
    if wanted is not None and len(samples) < wanted:
        raise BadInput(f"--samples {wanted}: {data} holds {len(samples)} usable samples; use at most that")
    return Loaded(samples, skipped)


def _check(raw: Any) -> Sample:
    """A raw object as a sample; ValueError says what is malformed. `input` may be missing, null or empty."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, dict):
        raise ValueError(f"a sample must be an object, not {type(raw).__name__}")
    for field in ("instruction", "output"):
        if field not in raw:
            raise ValueError(f"the field {field!r} is missing")
    texts = {}
    for field in ("instruction", "input", "output"):
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


def _raw_samples(data: str, limit: float) -> Iterator[tuple[str, Any]]:
    """Each raw sample with where it stands; a ValueError in a sample's place is one that could not be read."""
    if data.startswith("synthetic-"):
        generated = synthetic.generate(data.removeprefix("synthetic-"), int(limit))
        return ((f"{data} sample {i}", sample) for i, sample in enumerate(generated, 1))
    if data in HUB:
        return _from_hub(HUB[data])
    path = Path(data)
    readers = {".json": _from_json, ".jsonl": _from_jsonl, ".parquet": _from_parquet}
    return readers[path.suffix](path)


def _from_hub(name: str) -> Iterator[tuple[str, Any]]:
    """A data set of the hub (or its cache, or a folder of that name in the working directory)."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's clients raise many unrelated classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{name} could not be loaded: {reason}; with no network, pass its file: --data PATH") from None
    return ((f"{name} row {i}", row) for i, row in enumerate(rows, 1))


def _from_json(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes that are not UTF-8 become lone surrogates here, so that the sample that holds them can be named.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    decoder = json.JSONDecoder()
    position, line = _skip_blank(text, 0), 1
    if not text.startswith("[", position):
        raise BadInput(f"{path}: a .json file must be an array of samples; for one object per line name it .jsonl")
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
        yield f"{path}:{line}", raw
        position = _skip_blank(text, end)
        if text.startswith(",", position):
            position = _skip_blank(text, position + 1)
        elif not text.startswith("]", position):
            line = 1 + text.count("\n", 0, position)
            raise BadInput(f"{path}:{line}: not JSON: a comma or the closing bracket is missing")
    rest = _skip_blank(text, position + 1)
    if rest < len(text):
        raise BadInput(f"{path}:{1 + text.count(chr(10), 0, rest)}: not JSON: text after the closing bracket")


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _from_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
            if not text.strip():
                continue
            try:
                raw = json.loads(text)
            except json.JSONDecodeError as error:
                raw = ValueError(f"not JSON: {error.msg}")
            except (ValueError, RecursionError) as error:
                raw = ValueError(f"not readable: {error}")
            yield f"{path}:{number}", raw


def _from_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    for row in range(table.num_rows):
        raw: dict[str, Any] = {}
        try:
            for name in table.column_names:
                value = table.column(name)[row].as_py()
                raw[name] = None if isinstance(value, float) and math.isnan(value) else value
        except UnicodeDecodeError:
            yield f"{path} row {row + 1}", ValueError(f"the field {name!r} is not valid UTF-8")
            continue
        yield f"{path} row {row + 1}", raw
