"""Records packed for the repository: whole, by the schema, and without what would identify a person."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from conftest import ROOT, refusal, run_program

from tunebench.errors import BadInput
from tunebench.hardware import Accelerator
from tunebench.record import Taker, json_schema, parse_record, read_record
from tunebench.report.documents import MEASURED
from tunebench.report.pack import CLEANED, StandIns, cleaned, folder_in_flags, folder_name, machine_name, pack
from tunebench.report.rounds import versus_of

LINE = (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()[0]
VALIDATOR = jsonschema.Draft202012Validator(json.loads((ROOT / "tunebench" / "record.schema.json").read_text()))
# Text that the frameworks, vendors or this project chose, and digests.
CHOSEN = {
    *("status", "framework", "method", "peer", "aa", "versions", "sha256"),
    *("git.revision", "git.changes", "hardware.cpu", "hardware.governor", "hardware.device", "hardware.links"),
    *("hardware.accelerators.name", "hardware.driver", "hardware.cuda"),
    *("model.family", "model.config_sha256", "model.weights_sha256", "model.built.activation"),
    *("setup.dtype", "setup.amp", "setup.attention", "setup.head", "setup.order", "setup.sharding"),
    *("kernels.weights", "kernels.matmuls", "kernels.attention", "plan.sha256", "plan.drawn_from"),
    *("conditions.gpus.throttled", "profile.ranks.longest.kind", "profile.ranks.longest.name"),
    "profile.ranks.trace",  # named after the record
}


def real():
    return parse_record(LINE)


def with_path(record, **changes):
    """The record as a run leaves it, with a path of a person, and with changes."""
    argv = [*record.argv[:-1], "--out=/home/somebody/results/quick/pair/paddle-r1.json"]
    return record.model_copy(update={"argv": argv, "log": ["/home/somebody"]} | changes)


def write(record, folder, name="paddle-r1"):
    record.write(folder / "pair" / f"{name}.json")
    return folder


def test_a_packed_record_is_the_same_but_for_its_path_log_and_machine(tmp_path):
    record = real()
    write(with_path(record), tmp_path / "quick")
    done = run_program(
        "summarize.py", "--pack", tmp_path / "quick", check=True, env={"TUNEBENCH_RESULTS": str(tmp_path / "results")}
    )
    day = record.started_at[:10].replace("-", "")
    folder = tmp_path / "results" / "measured" / f"{day}-epyc-2-cores" / "quick"
    assert f"1 records packed: {folder}" in done.stdout
    assert "all logs" in done.stdout
    assert [file.name for file in folder.parent.iterdir()] == ["quick"]
    packed = read_record(folder / "pair" / "paddle-r1.json")
    argv, machine = [*record.argv[:-1], "--out=pair/paddle-r1.json"], packed.hardware.machine
    assert re.fullmatch(r"[0-9a-f]{12}", machine)
    assert machine != record.hardware.machine
    hardware = record.hardware.model_copy(update={"machine": machine})
    assert packed == record.model_copy(update={"argv": argv, "log": [], "hardware": hardware})


def test_packed_runs_of_versus_name_their_suite(tmp_path):
    folder = write(real(), tmp_path / "quick" / "versus-older", "paddle+old-r1")
    packed = pack(folder, tmp_path / "measured", ())
    assert packed.folder.name == "versus-older-of-quick"
    assert [versus_of(record) for record in packed.records] == [("", "pair", "old")]
    for parent, names in ("alice", {"alice"}), ("my runs", ()):
        folder = write(real(), tmp_path / parent / "versus-older")
        with pytest.raises(BadInput, match=r"pack it where it was measured|use a folder name of letters"):
            pack(folder, tmp_path / "measured", names)


@pytest.mark.parametrize("place", [".previous/quick", "measured/20260101-cpu/quick", "quick"])
def test_what_is_no_suite_s_folder_of_results_is_not_packed(tmp_path, place):
    """Results that were set aside, a packed series, and a folder around a suite's folder."""
    folder = write(real(), tmp_path / place / ("" if place != "quick" else "around"))
    with pytest.raises(BadInput, match=r"pack one suite's folder|pack a suite's whole folder"):
        pack(tmp_path / place, tmp_path / "measured", ())
    assert [*tmp_path.rglob("*.json")] == [folder / "pair" / "paddle-r1.json"]


def test_each_machine_keeps_a_digest_of_its_own(tmp_path):
    record, folder = real(), tmp_path / "quick"
    other = record.model_copy(update={"hardware": record.hardware.model_copy(update={"machine": "0123456789ab"})})
    for name, each in (("a-r1", record), ("b-r1", record), ("c-r1", other)):
        write(each, folder, name)
    a, b, c = (each.hardware.machine for each in pack(folder, tmp_path / "measured", ()).records)
    assert a == b != c
    assert {a, c}.isdisjoint({record.hardware.machine, "0123456789ab"})


def test_what_identifies_a_person_gets_stand_ins(tmp_path):
    record = real()
    environment = {
        "LD_LIBRARY_PATH": "/usr/local/cuda/lib64:/home/alice/lib",
        "LD_PRELOAD": "/home/alice/lib",
        "CUDA_VISIBLE_DEVICES": "GPU-8f6e1c2a-1b2c-3d4e-5f60-718293a4b5c6,1",
        "OMP_NUM_THREADS": "2",
    }
    taker = Taker(name="alice-backup", core_seconds=0.1)
    write(
        with_path(
            record,
            status="failed",
            reason="rank 0: OSError: [Errno 13] '/data/alice smith/x': ask bob@example.org or 10.0.0.7; 900 tokens/s",
            argv=[
                "finetune_full.py",
                "--master=alice-box:29500",
                "--data=alice.json",
                "--out",
                "/home/alice/a.json",
                "--profile=/home/alice",
            ],
            hardware=record.hardware.model_copy(update={"environment": environment, "kernel": "6.1.0-Alice"}),
            conditions=record.conditions.model_copy(update={"takers": [taker]}),
        ),
        tmp_path / "quick",
    )
    packed = pack(tmp_path / "quick", tmp_path / "measured", {"alice"})
    assert packed.taken_out == {"path": 2, "address": 2, "GPU": 1, "name": 1}
    kept = packed.records[0]
    assert kept.reason == "rank 0: OSError: [Errno 13] '[path 1]': ask [address 1] or [address 2]; 900 tokens/s"
    assert kept.argv == [
        *(
            "finetune_full.py",
            "--master=HOST:PORT",
            "--data=[name 1].json",
            "--out",
            "pair/paddle-r1.json",
            "--profile=traces",
        )
    ]
    assert kept.hardware.environment == {
        "LD_LIBRARY_PATH": "/usr/local/cuda/lib64:[path 2]",
        "LD_PRELOAD": "[path 2]",
        "CUDA_VISIBLE_DEVICES": "[GPU 1],1",
        "OMP_NUM_THREADS": "2",
    }
    assert kept.hardware.kernel == "6.1.0-[name 1]"
    assert kept.conditions.takers[0].name == "[name 1]-backup"
    assert "alice" not in (packed.folder / "pair" / "paddle-r1.json").read_text().lower()
    assert "[name 1]-backup" in packed.told()


@pytest.mark.parametrize(
    "word",
    [
        "--data=/home/somebody/x.json",
        "/home/somebody/x.json",
        "--model=~/model",
        "--model=../model",
        "--data=client/x.jsonl",
    ],
)
def test_a_record_that_names_a_folder_is_refused_in_one_line(tmp_path, word):
    write(with_path(real(), argv=["finetune_full.py", "--data", word, "--out=a.json"]), tmp_path / "quick")
    line = refusal(
        run_program("summarize.py", "--pack", tmp_path / "quick", env={"TUNEBENCH_RESULTS": str(tmp_path / "results")})
    )
    assert f"quick/pair/paddle-r1.json: its flag {word} names a folder" in line
    assert not (tmp_path / "results").exists()


def edited(folder):
    file = write(real(), folder) / "pair" / "paddle-r1.json"
    file.write_text(
        file.read_text().replace('"status": "ok"', '"status": "oom"').replace('"reason": null', '"reason": "x"')
    )


def on_two_machines(folder):
    record = real()
    write(record, folder)
    more = record.hardware.model_copy(update={"cores": 64})
    write(record.model_copy(update={"hardware": more}), folder, "torch-r1")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (edited, "edited since it was written"),
        (on_two_machines, "2 kinds of machine: epyc-2-cores (pair/paddle-r1.json), epyc-64-cores (pair/torch-r1.json)"),
        (lambda folder: folder.mkdir(), "no records in it"),
        (lambda folder: real().write(folder / "paddle-r1.json"), "no run of a suite in the folder of its pair"),
        (lambda folder: None, "pack one suite's folder"),
        (lambda folder: write(with_path(real(), started_at="my birthday"), folder), "is no time"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_nothing_is_written(tmp_path, make, said):
    make(tmp_path / "quick")
    with pytest.raises(BadInput, match=re.escape(said)):
        pack(tmp_path / "quick", tmp_path / "measured", ())
    assert not (tmp_path / "measured").exists()


def test_a_packed_suite_is_not_overwritten(tmp_path):
    write(real(), tmp_path / "quick")
    pack(tmp_path / "quick", tmp_path / "measured", ())
    with pytest.raises(BadInput, match="exists, and a series that is kept stays as it is; rename "):
        pack(tmp_path / "quick", tmp_path / "measured", ())


@pytest.mark.parametrize(
    ("cpu", "gpus", "name"),
    [
        ("AMD EPYC", [], "epyc-2-cores"),
        ("AMD EPYC 7763 64-Core Processor", [], "epyc-7763-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", [], "xeon-platinum-8375c-2-cores"),
        ("13th Gen Intel(R) Core(TM) i7-13700K", [], "13th-gen-core-i7-13700k-2-cores"),
        ("AMD EPYC", ["NVIDIA A100-SXM4-80GB"] * 4, "4-a100-sxm4-80gb"),
        ("AMD EPYC", ["NVIDIA GeForce RTX 4090", "Tesla T4"], "1-geforce-rtx-4090-1-tesla-t4"),
    ],
)
def test_a_machine_is_named_by_its_hardware(cpu, gpus, name):
    record = real()
    unknown = dict.fromkeys(set(Accelerator.model_fields) - {"name"})
    update = {"cpu": cpu, "accelerators": [Accelerator(name=gpu, **unknown) for gpu in gpus]}
    assert machine_name(record.model_copy(update={"hardware": record.hardware.model_copy(update=update)})) == name


def texts(schema, part, path=()):
    """The dotted names of the fields of a JSON schema that hold text that it does not list."""
    if "$ref" in part:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    for inner in (*part.get("anyOf", ()), *filter(None, [part.get("items")])):
        yield from texts(schema, inner, path)
    if isinstance(part.get("additionalProperties"), dict):
        yield from texts(schema, part["additionalProperties"], path)
    for name, inner in part.get("properties", {}).items():
        yield from texts(schema, inner, (*path, name))
    if part.get("type") == "string":
        yield ".".join(path)


def test_each_text_of_a_record_is_cleaned_or_chosen_by_others_than_the_user():
    schema = json.loads(json_schema())
    assert set(texts(schema, schema)) == CHOSEN | set(CLEANED)


def measured():
    return sorted(MEASURED.glob("*/*/**/*.json"))


def test_records_in_the_repository_are_whole_and_name_nobody():
    """Strictly: by the schema, by the reader (the digest too), and as --pack would write them."""
    assert len(measured()) > 50
    for file in measured():
        content = json.loads(file.read_bytes())
        faults = [error.message for error in VALIDATOR.iter_errors(content)]
        assert not faults, f"{file}: {faults[0]}"
        record, name = read_record(file), file.relative_to(MEASURED)
        assert not folder_in_flags(record.argv), file
        anew = cleaned(record, Path(*name.parts[2:]), StandIns(()), record.hardware.machine)
        # Older records lack the newer fields, whose defaults the reader fills in.
        assert anew == json.loads(record.model_dump_json(by_alias=True)), f"{file}: pack it with summarize.py --pack"


def test_folders_of_records_are_named_by_day_and_machine():
    suites = {file.relative_to(MEASURED).parts[:2] for file in measured()}
    for machine, suite in sorted(suites):
        records = {file: read_record(file) for file in (MEASURED / machine / suite).rglob("*.json")}
        assert folder_name(records) == machine, f"{machine}/{suite}"
    assert not [file for file in MEASURED.rglob("*") if file.is_file() and file.suffix != ".json"]


def test_the_schema_finds_a_fault():
    content = json.loads(LINE) | {"comment": "fast!"}
    assert [error.message for error in VALIDATOR.iter_errors(content)]
