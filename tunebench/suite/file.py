"""A suite: its TOML file and the runs that follow from it. All runs are checked before the first one starts."""

import contextlib
import fnmatch
import io
import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from tunebench.bootstrap import ROOT, python_of
from tunebench.errors import BadInput
from tunebench.flags import Flags, arguments_of, parse_flags, path_of
from tunebench.frameworks import FRAMEWORKS
from tunebench.peers import PEERS, check_peer_flags
from tunebench.record import FrameworkName, Strict
from tunebench.report.load import may_hold_records
from tunebench.report.rounds import NEW, OLD
from tunebench.suite.other import Other

METHODS: dict[str, str] = {"finetune_lora.py": "lora", "finetune_full.py": "full"}
MOST_ROUNDS = 1000
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # suites, pairs and contestants name folders and files


def _check_flags(flags: dict[str, Any]) -> dict[str, Any]:
    for name, value in flags.items():
        if not re.fullmatch("[a-z0-9-]+", name):
            raise ValueError(f"{name!r} is no flag's name without its dashes")
        if name in ("out", "aa", "help", "plan", "sweep", "gpu", "link", "price", "calibrate", "until"):
            raise ValueError(f"{name} is no flag for a suite")
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{name}: a flag is a text, a number, true or false")
    return flags


def _check_names(tables: list[Any]) -> list[Any]:
    names = [table.name for table in tables]
    kind = type(tables[0]).__name__.lower() if tables else ""
    if len(set(names)) < len(names):
        raise ValueError(f"two {kind}s have the name {max(names, key=names.count)}")
    if "aa" in names:
        raise ValueError(f"a {kind} cannot be named aa: that folder is for comparisons of a side with itself")
    for name in itertools.filterfalse(may_hold_records, names):
        raise ValueError(f"a {kind} cannot be named {name}: summarize.py finds no records in such a folder")
    return tables


FlagTable = Annotated[dict[str, Any], AfterValidator(_check_flags)]


class Group(Strict):
    """Runs of one script that belong together. `flags` are those of all of them."""

    name: str = Field(pattern=NAME)
    script: Literal["finetune_lora.py", "finetune_full.py"]
    flags: FlagTable = Field(default_factory=dict)


class Pair(Group):
    """The same script on each side. A table named as a framework has that side's flags. They override `flags`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, FlagTable]

    @model_validator(mode="before")
    @classmethod
    def _check_sides(cls, content: Any) -> Any:
        for name in content if isinstance(content, dict) else ():
            if name not in cls.model_fields and name not in FRAMEWORKS:
                raise ValueError(f"{name}: unknown key")
        return content

    @property
    def own_flags(self) -> dict[str, dict[str, Any]]:
        """The flags of single sides, by framework."""
        return self.__pydantic_extra__


class Contest(Group):
    """A script that every contestant runs, unless it is a peer: then the peer trains instead."""


class Contestant(Strict):
    """A peer by its name in `tunebench.peers`, or a framework's script with flags of its own."""

    peer: str | None = None
    name: str = Field(pattern=NAME)
    framework: FrameworkName
    flags: FlagTable = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "peer" not in content:
            return content
        if content["peer"] not in list(PEERS):  # it may be of any type
            raise ValueError(f"peer {content['peer']!r}: use one of {', '.join(PEERS)}")
        for name in {"name", "framework"} & content.keys():
            raise ValueError(f"{name}: a peer has its own")
        return content | {"name": content["peer"], "framework": PEERS[content["peer"]].framework}


class Suite(Strict):
    """A suite file: pairs, or contests and contestants.

    Flags have their names of the command line without leading dashes. True gives the bare flag, false its opposite.
    """

    title: str
    repeats: int = Field(default=1, gt=0, le=MOST_ROUNDS)  # rounds; --repeats overrides it
    minutes: float | None = Field(default=None, gt=0)  # what one round took on two cores
    defaults: FlagTable = Field(default_factory=dict)
    pair: Annotated[list[Pair], AfterValidator(_check_names)] = Field(default_factory=list)
    contest: Annotated[list[Contest], AfterValidator(_check_names)] = Field(default_factory=list)
    contestant: Annotated[list[Contestant], AfterValidator(_check_names)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if bool(self.pair) == bool(self.contest) or bool(self.contest) != bool(self.contestant):
            raise ValueError("a suite has [[pair]] tables, or [[contest]] and [[contestant]] tables")
        return self

    @property
    def entries(self) -> list["Entry"]:
        """The runs of one round, in the order of odd rounds."""
        found: list[Entry] = []
        for pair in self.pair:
            for side in FRAMEWORKS:
                table = self.defaults | pair.flags | pair.own_flags.get(side, {})
                found.append(Entry("pair", pair.name, pair.script, side, side, None, table))
        for contest, one in itertools.product(self.contest, self.contestant):
            table = self.defaults | contest.flags | one.flags
            found.append(Entry("contest", contest.name, contest.script, one.name, one.framework, one.peer, table))
        return found


class Entry(NamedTuple):
    """A side of a pair or a contestant of a contest: its script, or the `peer` in its place, and its flags."""

    kind: Literal["pair", "contest"]
    group: str  # the name of the pair or the contest
    script: str
    member: str  # the framework of a side, or the contestant
    framework: str
    peer: str | None
    table: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name in --only and in messages."""
        return f"{self.group}/{self.member}"

    @property
    def method(self) -> str:
        """The method of the script: full or lora."""
        return METHODS[self.script]

    @property
    def environment(self) -> str:
        """The name of its environment in .venv/."""
        return PEERS[self.peer].environment if self.peer else self.framework

    def with_flags(self, changes: dict[str, Any]) -> "Entry":
        """The entry with these flags in place of its own; None removes a flag."""
        table = {name: value for name, value in (self.table | changes).items() if value is not None}
        return self._replace(table=table)


@dataclass(frozen=True)
class Planned:
    """One run of a suite, with checked flags. `argv` is what its record will hold, with --out last.

    `side` is a or b in a comparison of a run with itself, old or new with --versus, else None. `other` is where an old
    one runs; None: in this checkout.
    """

    entry: Entry
    side: str | None
    round: int
    flags: Flags
    argv: list[str]
    record: Path
    log: Path
    cwd: Path
    other: Other | None = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.entry.name}{f' {self.side}' if self.side else ''} r{self.round}"

    @property
    def measured_with(self) -> tuple[int, str, str]:
        """A key that is equal for runs which are repeated together: a round's two sides. Contestants repeat alone."""
        sides = self.entry.kind == "pair" and not self.side
        return self.round, self.entry.group, "" if sides else self.entry.member

    @property
    def command(self) -> list[str]:
        """The command line: the script and the Python of its environment."""
        framework, peer = self.entry.framework, self.entry.peer
        python = self.other.python_of(framework) if self.other else python_of("torch" if peer else framework)
        return [str(python), str(self.root / ("peers" if peer else framework) / self.argv[0]), *self.argv[1:]]

    @property
    def interpreter(self) -> Path:
        """The Python whose packages train."""
        return self.other.python_of(self.entry.framework) if self.other else python_of(self.entry.environment)

    @property
    def root(self) -> Path:
        """The checkout that runs it."""
        return self.other.root if self.other else ROOT

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables that it has beside those of this process."""
        return self.other.variables() if self.other else {}


def find_suite(name: str) -> Path:
    """The file of a suite: suites/NAME.toml, or `name` itself where it ends in .toml. Raises `BadInput`."""
    suites = ROOT / "suites"
    path = path_of("suite", name).resolve() if name.endswith(".toml") else suites / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in suites.glob("*.toml")))
        raise BadInput(f"--suite {name}: no such suite; use {known}, or a .toml file")
    if not re.match(NAME, path.stem) or not may_hold_records(path.stem) or path.stem == "runs":
        raise BadInput(f"--suite {name}: {path.stem} cannot name a folder in results/; use another file name")
    return path


def read_suite(path: Path) -> Suite:
    """Reads a suite file. Raises `BadInput` with the file and its first fault."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
        return Suite.model_validate(content)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = list(first["loc"])
        if len(where) > 1 and isinstance(where[1], int):
            kind, number = str(where[0]), where[1] + 1
            table = content[kind][where[1]]
            where[:2] = [f"{kind} {table.get('name', number) if isinstance(table, dict) else number}"]
        message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise BadInput(": ".join(map(str, [path, *where, message]))) from None
    except (OSError, ValueError, RecursionError) as error:  # a number of thousands of digits, endless brackets
        raise BadInput(f"{path}: not readable: {error}") from None


def plan_runs(
    path: Path,
    suite: Suite,
    folder: Path,
    repeats: int,
    only: str | None,
    aa: bool = False,
    changes: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    other: Other | None = None,
    until: float | None = None,
) -> list[Planned]:
    """All runs in order, with checked flags. Raises `BadInput`.

    Even rounds reverse the order of all runs (ABBA), so that a machine which gets slower or faster favours no side.
    With `aa` each side runs against itself: a first in odd rounds, b first in even ones. With `other` each side runs
    there, as old, and here, as new: old first in odd rounds. Each round has its own batches, which are the same for all
    sides. `changes` are flags by entry that replace the suite's; None removes one. `until` goes into the records.
    """
    for flag, given in (("aa", aa), ("versus", other), ("until", until)):
        if given and suite.contest:
            raise BadInput(
                f"--{flag}: {path} has contestants, which have no sides; use a suite of pairs, or leave it out"
            )
    entries = [entry.with_flags(changes.get(entry.name, {})) for entry in suite.entries]
    checked = [(entry, *_parse(path, entry)) for entry in entries]
    wanted = [each for each in checked if only is None or fnmatch.fnmatchcase(each[0].name, only)]
    if not wanted:
        raise BadInput(f"--only {only} fits none of {', '.join(entry.name for entry, *_ in checked)}")
    if other:
        wanted = [each for each in wanted if each[0].framework in other.frameworks]
        if not wanted:
            raise BadInput(f"--only {only} fits no run of {other.frameworks[0]}, which --versus names")
    in_order = list(itertools.product(wanted, ("a", "b") if aa else (OLD, NEW) if other else (None,)))
    runs = []
    for number in range(1, repeats + 1):
        for (entry, flags, arguments), side in in_order if number % 2 else reversed(in_order):
            name, own = (f"{entry.member}-{side}", [f"--aa={side}"]) if aa else (entry.member, [])
            if other:
                name = f"{entry.member}+{side}"
            if until:
                own = [*own, f"--until={until * 100:g}%"]
            if number > 1 and "plan_seed" not in flags.given:
                own = [*own, f"--plan-seed={number - 1}"]
                flags = flags.model_copy(update={"plan_seed": number - 1})
            flags = flags.model_copy(update={"aa": side if aa else None, "until": until})
            record = folder / ("aa" if aa else "") / entry.group / f"{name}-r{number}.json"
            rest = arguments
            if flags.profile is not None:  # files of several pairs have one name
                traces = flags.profile / record.parent.relative_to(folder)
                rest = [each for each in arguments if not each.startswith("--profile=")]
                own = [*own, f"--profile={traces}"]
                flags = flags.model_copy(update={"profile": traces})
            script = [entry.script]
            if entry.peer:
                script = ["run_peer.py", f"--peer={entry.peer}", f"--method={entry.method}"]
            argv = [*script, *rest, *own, f"--out={record}"]
            elsewhere = other if side == OLD else None
            log = record.with_suffix(".log")
            runs.append(Planned(entry, side, number, flags, argv, record, log, path.parent, elsewhere))
    return runs


def _parse(path: Path, entry: Entry) -> tuple[Flags, list[str]]:
    """The checked flags of an entry, and their command-line arguments. Raises `BadInput`.

    Relative paths count from the suite file.
    """
    where = f"{path}: {entry.kind} {entry.group} ({entry.member})"
    said = io.StringIO()
    try:
        arguments = arguments_of(entry.method, entry.table)
        with contextlib.chdir(path.parent), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            flags = parse_flags(entry.method, arguments, prog=where, framework=entry.framework)
        if entry.peer:
            check_peer_flags(flags.given, flags.paired_halves)
        return flags, arguments
    except BadInput as refusal:
        raise BadInput(f"{where}: {refusal}") from None
    except SystemExit:
        raise BadInput(said.getvalue().strip().removesuffix("; see --help")) from None
