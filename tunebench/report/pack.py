"""Packs the records of a suite for this repository: whole, and without what would identify a person.

    python3 summarize.py --pack results/a100x4

writes them to results/measured/DATE-MACHINE/a100x4/.
"""

import datetime
import functools
import json
import os
import platform
import pwd
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tunebench.bootstrap import ROOT
from tunebench.digest import digest_of
from tunebench.errors import BadInput, cannot_write
from tunebench.files import results_folder, write_atomically
from tunebench.flags import DATA_NAMES, SUFFIXES
from tunebench.frameworks import FRAMEWORKS
from tunebench.models.presets import PRESETS
from tunebench.record import Record, read_record
from tunebench.report.load import OF_SUITE, PREVIOUS, REHEARSALS, VERSUS, record_files

# The text of a record that its user or machine decides: it is cleaned. `machine` and `started_at` are written anew.
CLEANED = (
    *("argv", "reason", "log", "started_at", "model.name", "plan.data", "plan.remarks", "conditions.takers.name"),
    *("hardware.machine", "hardware.kernel", "hardware.environment"),
)
# Names that identify nobody, although a user or a machine may have them: such as those in the names of models.
OF_MANY = {
    "root",
    "user",
    "users",
    "home",
    "ubuntu",
    "debian",
    "admin",
    "runner",
    "localhost",
    *FRAMEWORKS,
    *DATA_NAMES,
}
OF_MANY |= {word for preset in PRESETS for word in preset.split("-")}
SYSTEM = re.compile(r"/(usr|opt|lib|lib64|bin|sbin|etc|dev|proc|sys)(/|$)")  # folders that every machine has
# Paths of folders, quoted or not. A host's name in an address is no folder, nor is a rate such as tokens/s.
FOLDERS = re.compile(r"(?<=')~?/[^']+|(?<=\")~?/[^\"]+|(?<![\w./\]~])(?:~[\w.-]*)?/(?!/)[^\s:;,'\"()<>|]+")
KINDS = {
    "path": FOLDERS,
    "GPU": re.compile(r"\b(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]+)+", re.IGNORECASE),  # a GPU's UUID
    "address": re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+|(?<![\w.])\d{1,3}(\.\d{1,3}){3}(?![\w.])"),  # e-mail, IPv4
}


class Packed(NamedTuple):
    """A packed suite: its folder, its records, and how many different texts of each kind were taken out."""

    folder: Path
    records: list[Record]
    taken_out: dict[str, int]

    def told(self) -> str:
        """What was done, and what the user does next."""
        out = [f"{number} {kind}(s)" for kind, number in self.taken_out.items()]
        lines = [f"{len(self.records)} records packed: {self.folder}", f"taken out: {', '.join(['all logs', *out])}"]
        takers = {taker.name for record in self.records if record.conditions for taker in record.conditions.takers}
        if takers:
            lines.append(f"names of other programs that stay in the records: {', '.join(sorted(takers))}")
        if disturbed := sum(record.disturbed for record in self.records):
            lines.append(f"disturbed: {disturbed} records, whose rounds say nothing")
        if any(record.git.revision is None or record.git.dirty for record in self.records):
            lines.append("measured with uncommitted changes: say in the pull request what they were")
        lines.append(f"look at them: python3 summarize.py {self.folder}")
        inside = self.folder.is_relative_to(ROOT)
        lines += [f"copy {self.folder.parent} to results/measured/ of this project"] * (not inside)
        lines.append("then: python3 summarize.py --docs, commit, open a pull request (docs/contributing-results.md)")
        return "\n".join(lines)


class StandIns:
    """Puts stand-ins such as `[path 1]` in the place of texts. Equal texts get equal ones, so that runs stay equal."""

    def __init__(self, names: Collection[str]) -> None:
        """`names` are those of the user and of this machine."""
        self.known: dict[tuple[str, str], str] = {}
        words = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self.names = re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])", re.IGNORECASE) if names else None

    def clean(self, text: str) -> str:
        """The text without folders but the system's, GPUs' UUIDs, addresses, and names."""
        for kind, pattern in KINDS.items():
            text = pattern.sub(functools.partial(self._stand_in, kind), text)
        return self.without_names(text)

    def without_names(self, text: str) -> str:
        """The text without the user's and the machine's names."""
        return self.names.sub(functools.partial(self._stand_in, "name"), text) if self.names else text

    def counts(self) -> dict[str, int]:
        """How many different texts of each kind were found."""
        return dict(Counter(kind for kind, _ in self.known))

    def _stand_in(self, kind: str, found: re.Match[str]) -> str:
        text = found[0] if kind == "path" else found[0].lower()
        if kind == "path" and SYSTEM.match(text) and ".." not in text.split("/"):
            return text
        return self.known.setdefault((kind, text), f"[{kind} {self.counts().get(kind, 0) + 1}]")


def pack(folder: Path, measured: Path, names: Collection[str]) -> Packed:
    """Writes the records of a suite's folder to `measured`/DATE-MACHINE/SUITE. All of them or none.

    Those of --versus go to `measured`/DATE-MACHINE/versus-OTHER-of-SUITE.

    Raises `BadInput` where a record is broken or names a folder in its flags, where the records are of several kinds of
    machine, and where the target exists.
    """
    folder = folder.resolve()
    aside = {REHEARSALS, PREVIOUS} & {folder.name, folder.parent.name} or folder.is_relative_to(measured.resolve())
    if not folder.is_dir() or folder == results_folder() or aside:
        raise BadInput(f"--pack {folder}: pack one suite's folder of results, such as {results_folder() / 'quick'}")
    files = {file.relative_to(folder): file for file in record_files(folder)}
    if not files:
        raise BadInput(f"--pack {folder}: no records in it; name a suite's folder of results")
    records = {name: read_record(file) for name, file in files.items()}
    # Runs of --versus lie in their suite's folder, which the name of the kept one has to tell.
    of_suite = f"{OF_SUITE}{folder.parent.name}" if folder.name.startswith(VERSUS) else ""
    stand_ins = StandIns(names)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", f"{folder.name}{of_suite}"):
        raise BadInput(f"--pack {folder}: use a folder name of letters, digits, - and _, as the names of suites are")
    if of_suite and stand_ins.without_names(of_suite) != of_suite:
        raise BadInput(f"--pack {folder}: pack it where it was measured, in the folder of its suite")
    for name, record in records.items():
        if len(name.parts) != (2 if record.aa is None else 3) or (record.aa is not None and name.parts[0] != "aa"):
            raise BadInput(
                f"{folder / name} is no run of a suite in the folder of its pair; pack a suite's whole folder"
            )
        if word := folder_in_flags(record.argv):
            raise BadInput(
                f"{folder / name}: its flag {word} names a folder, so that others cannot repeat the run; measure with "
                "data and models by their names"
            )
    target = measured / folder_name(records) / f"{folder.name}{of_suite}"
    if target.exists():
        raise BadInput(
            f"{target} exists, and a series that is kept stays as it is; rename {folder} where this is another one"
        )
    # A digest of the machine's name can be guessed. Random digests tell machines apart as well.
    machines = {record.hardware.machine: secrets.token_hex(6) for record in records.values()}
    part = target.with_name(f".{target.name}.part")
    with cannot_write(target):
        shutil.rmtree(part, ignore_errors=True)
        try:
            for name, record in records.items():
                content = cleaned(record, name, stand_ins, machines[record.hardware.machine])
                text = json.dumps(content | {"sha256": digest_of(content)}, separators=(",", ":"))
                write_atomically(part / name, f"{text}\n".encode())
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Packed(target, [read_record(target / name) for name in records], stand_ins.counts())


def cleaned(record: Record, file: Path, stand_ins: StandIns, machine: str) -> dict[str, Any]:
    """A record's content without what would identify a person. Its --out is `file`, its machine's digest `machine`.

    `CLEANED` names the fields. Others hold numbers, digests, versions, and words that this project or a vendor chose.
    """
    content = json.loads(record.model_dump_json(by_alias=True))
    clean = stand_ins.clean
    content["argv"] = [_clean_word(word, stand_ins) for word in _with_out(record.argv, file)]
    content["reason"] = record.reason and clean(record.reason)
    content["log"] = []
    content["started_at"] = _start(record).isoformat(timespec="seconds")
    hardware = content["hardware"]
    hardware["machine"] = machine
    hardware["kernel"] = stand_ins.without_names(hardware["kernel"])
    hardware["environment"] = {name: clean(value) for name, value in hardware["environment"].items()}
    if content["model"]:
        content["model"]["name"] = clean(content["model"]["name"])
    if content["plan"]:
        content["plan"]["data"] = clean(content["plan"]["data"])
        content["plan"]["remarks"] = [clean(line) for line in content["plan"]["remarks"]]
    for taker in (content["conditions"] or {}).get("takers", []):
        taker["name"] = clean(taker["name"])
    return content


def folder_in_flags(argv: Iterable[str]) -> str | None:
    """The first word of a command line, but for --out, that names a folder or a file in one; None where none does."""
    for word in _with_out(argv, Path("record.json")):
        value = word.split("=", 1)[-1]
        in_folder = "/" in value and Path(value).suffix in SUFFIXES  # a hub's name has no such suffix
        if value.startswith(("/", "~", "./", "../")) or value in (".", "..") or in_folder:
            return word
    return None


def folder_name(records: dict[Path, Record]) -> str:
    """DATE-MACHINE: the day of the oldest record (UTC), and the machine's GPUs or its processor and cores.

    `records` has each record by its file. Raises `BadInput` where they are of several kinds of machine.
    """
    kinds = {machine_name(record): file for file, record in records.items()}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({file})" for kind, file in sorted(kinds.items()))
        raise BadInput(f"the records are of {len(kinds)} kinds of machine: {found}; pack the records of each alone")
    return f"{min(map(_start, records.values())):%Y%m%d}-{next(iter(kinds))}"


def machine_name(record: Record) -> str:
    """The kind of a record's machine, such as `4-a100-sxm4-80gb` or `epyc-7763-64-cores`."""
    hardware = record.hardware
    nodes = [f"{record.setup.nnodes}-nodes"] * (record.setup.nnodes > 1)
    gpus = Counter(gpu.name for gpu in hardware.accelerators)
    kind = [f"{number}-{_slug(name.replace('NVIDIA', ''))}" for name, number in gpus.items()]
    if not kind:
        brand = re.sub(r"\((R|TM)\)|@.*| with .*|\b(AMD|Intel|CPU|Processor)\b|\S+-Core\b", " ", hardware.cpu)
        kind = [_slug(brand) or "cpu", f"{hardware.cores}-cores"]
    return "-".join([*nodes, *kind])


def own_names() -> set[str]:
    """The names of this user and of this machine that could identify a person."""
    names = {platform.node(), platform.node().split(".")[0]}
    try:
        user = pwd.getpwuid(os.getuid())
    except KeyError:  # a container may run as a user without an entry
        user = None
    if user:
        names |= {user.pw_name, user.pw_gecos.split(",")[0], Path(user.pw_dir).name}
    return {name for name in names if len(name) > 2 and name.lower() not in OF_MANY}


def _with_out(argv: Iterable[str], file: Path) -> Iterator[str]:
    """A command line with `file` as its --out. Traces are not packed, so that --profile names no folder."""
    written, before = {"--out": str(file), "--profile": "traces"}, ""
    for word in argv:
        flag, equals, _ = word.partition("=")
        yield f"{flag}={written[flag]}" if equals and flag in written else written.get(before, word)
        before = word


def _clean_word(word: str, stand_ins: StandIns) -> str:
    """A word of a command line: a flag keeps its name, and --master names no host."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    if word.startswith("--") and not equals:
        return word
    return f"{flag}{equals}{'HOST:PORT' if flag == '--master' else stand_ins.clean(value)}"


def _start(record: Record) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(record.started_at).astimezone(datetime.UTC)
    except ValueError:
        raise BadInput(f"started_at {record.started_at[:40]!r} is no time; use a record as a run wrote it") from None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
