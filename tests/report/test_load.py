"""Many record files: helpers compute the digests, and what is read and refused is the same as one file at a time."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from tunebench.errors import BadInput
from tunebench.record import read_record
from tunebench.report.load import MANY, digests_beside, load_records

LINES = (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()
further_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is no further core for a helper")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Copies of measured records, some of them damaged."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(MANY + 20):
        line = LINES[i % len(LINES)]
        damaged = {
            7: line.replace(b'"status":"ok"', b'"status":"oom","reason":"x"'),
            8: line[: len(line) // 2],
            9: line.replace(b'"dirty":false', b'"dirty":true'),  # a valid record that is not what the run wrote
            11: json.dumps(json.loads(line) | {"sha256": "0" * 64}).encode(),
            12: b"[]",
            13: line.replace(b'"tuned":', b'"surprise":1,"tuned":'),
        }
        file = folder / f"pair {i // 40}" / f"torch-r{i}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(damaged.get(i % 50, line))
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")  # to read it would take for ever
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.json").write_bytes(LINES[0])
    (folder / "versus-x").mkdir()
    (folder / "versus-x" / "a.json").write_bytes(LINES[0])
    return folder


@pytest.fixture(params=["one core", "all cores"])
def cores(request):
    """The cores that this process may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)} if request.param == "one core" else allowed)
    yield
    os.sched_setaffinity(0, allowed)


def helpers() -> list[psutil.Process]:
    """The helpers of this process that run. Beside them there may be servers of tests/fork_server.py."""
    return [each for each in psutil.Process().children() if "tunebench.digest" in each.cmdline()]


def test_as_one_file_at_a_time(folder, cores):
    found, faults = [], []
    for file in sorted(file for file in folder.rglob("*.json") if file.parent.name not in (".hidden", "versus-x")):
        if file.is_fifo():
            continue
        try:
            found.append(read_record(file))
        except BadInput as fault:
            faults.append(str(fault))
    records, broken = load_records([folder])
    assert len(found) + len(faults) == MANY + 21
    assert len(faults) > 50
    different = [record for i, record in enumerate(found) if record not in found[:i]]
    copies = len(found) - len(different)
    assert copies > 400
    assert broken[:-1] == faults
    assert broken[-1].endswith(f"torch-r0.json, which counts once, and {copies - 1} more such files")
    assert records == sorted(different, key=lambda record: record.started_at)
    assert not helpers()


@further_cores
def test_digests_that_a_killed_helper_did_not_give(folder):
    files = sorted(folder.rglob("torch-r*.json"))
    with digests_beside(files) as wait:
        for helper in helpers():
            helper.send_signal(signal.SIGKILL)
        digests = wait()
    assert len(digests) < len(files)
    with pytest.raises(KeyError), digests_beside(files):
        raise KeyError  # an interrupt
    assert not helpers()
