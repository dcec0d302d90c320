"""The record: its schema is the published one, and a contradictory record is refused."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import record

from tunebench.errors import BadInput
from tunebench.record import Steps, json_schema, read_record


def test_schema_in_the_repository_is_current():
    kept = (ROOT / "tunebench" / "record.schema.json").read_text()
    assert kept == json_schema(), "run: python -m tunebench.record"


def test_written_whole_and_read_back(tmp_path):
    written = record()
    written.write(tmp_path / "deep" / "a.json")
    assert read_record(tmp_path / "deep" / "a.json") == written
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.json"]
    stored = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert stored["schema"] == 1
    assert stored["setup"]["accumulation"] == 1
    assert stored["hardware"]["threads"] >= 1


def written(path: Path, **changes) -> None:
    """Puts a record at `path` and edits it."""
    record().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "ok"}, "a run that ended ok has model, plan, steps"),
        ({"reason": None}, "status failed needs a reason"),
        ({"status": "great"}, "status: Input should be"),
        ({"schema": 2}, "schema: Input should be 1"),
        ({"model": {"parameters": 0}}, "model.name: Field required"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"steps": {"seconds": [1.0]}}, "steps.effective_tokens: Field required"),
        ({"timed_from": 6}, "edited since it was written"),
        ({"reason": "killed by SIGKILL (9) "}, "edited since it was written"),
        ({"sha256": None}, "sha256: Field required"),
    ],
)
def test_broken_records_are_named(tmp_path, changes, message):
    path = tmp_path / "a.json"
    written(path, **changes)
    with pytest.raises(BadInput) as refusal:
        read_record(path)
    assert str(path) in str(refusal.value)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_only_its_content_counts(tmp_path):
    written(tmp_path / "a.json")  # the same JSON without line breaks
    assert read_record(tmp_path / "a.json").reason == "killed by SIGKILL (9)"


def test_half_a_file_is_no_record(tmp_path):
    record().write(tmp_path / "a.json")
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:200])
    with pytest.raises(BadInput, match="not a record"):
        read_record(tmp_path / "a.json")


def test_lists_of_unequal_length_are_refused():
    lists = {"effective_tokens": [1], "padded_tokens": [1], "label_tokens": [1], "loss": [1.0], "grad_norm": [1.0]}
    with pytest.raises(ValueError, match="differ in length"):
        Steps(seconds=[1.0, 2.0], **lists)
