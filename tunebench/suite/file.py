"""What a suite is: its TOML file, and the runs that follow from it, all checked before any starts."""

import contextlib
import fnmatch
import io
import itertools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from tunebench.bootstrap import ROOT
from tunebench.errors import BadInput
from tunebench.flags import Flags, arguments_of, parse_flags, path_of
from tunebench.frameworks import FRAMEWORKS
from tunebench.record import Strict
from tunebench.report.load import KEPT_APART

METHODS: dict[str, str] = {"finetune_lora.py": "lora", "finetune_full.py": "full"}
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of suites and pairs: they name folders


def _check_flags(flags: dict[str, Any]) -> dict[str, Any]:
    for name, value in flags.items():
        if not re.fullmatch("[a-z0-9-]+", name):
            raise ValueError(f"{name!r} is no flag's name without its dashes")
        if name in ("out", "aa", "help"):
            raise ValueError(f"{name} is no flag for a suite")
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{name}: a flag is a text, a number, true or false")
    return flags


def _check_names(pairs: "list[Pair]") -> "list[Pair]":
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"two pairs have the name {max(names, key=names.count)}")
    if "aa" in names:
        raise ValueError("a pair cannot be named aa: that folder is for comparisons of a side with itself")
    for name in set(KEPT_APART) & set(names):
        raise ValueError(f"a pair cannot be named {name}: summarize.py leaves such folders out")
    return pairs


FlagTable = Annotated[dict[str, Any], AfterValidator(_check_flags)]


class Pair(Strict):
    """The same script on each side. A table of a framework's name has flags of that side, which override `flags`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, FlagTable]

    name: str = Field(pattern=NAME)
    script: Literal["finetune_lora.py", "finetune_full.py"]
    flags: FlagTable = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _check_sides(cls, content: Any) -> Any:
        for name in content if isinstance(content, dict) else ():
            if name not in cls.model_fields and name not in FRAMEWORKS:
                raise ValueError(f"{name}: unknown key")
        return content

    @property
    def own_flags(self) -> dict[str, dict[str, Any]]:
        """The flags of one side only, by framework."""
        return self.__pydantic_extra__


class Suite(Strict):
    """A suite file. Flags are named as on the command line, without dashes; true stands for a bare flag, false
    for its opposite."""

    title: str
    repeats: int = Field(default=1, gt=0)  # rounds, unless --repeats says otherwise
    minutes: float | None = Field(default=None, gt=0)  # that one round took on two cores
    defaults: FlagTable = Field(default_factory=dict)
    pair: Annotated[list[Pair], Field(min_length=1), AfterValidator(_check_names)]


@dataclass(frozen=True)
class Planned:
    """One run of a suite, its flags checked. `argv` is as its record will have it, --out last.

    `side` is a or b where a run is compared with itself.
    """

    pair: str
    framework: str
    side: str | None
    round: int
    method: str
    flags: Flags
    argv: list[str]
    record: Path
    log: Path
    cwd: Path

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.pair}/{self.framework}{f' {self.side}' if self.side else ''} r{self.round}"

    @property
    def command(self) -> list[str]:
        """What is executed: the script, by the Python of its environment."""
        python = ROOT / ".venv" / self.framework / "bin" / "python"
        return [str(python), str(ROOT / self.framework / self.argv[0]), *self.argv[1:]]


def find_suite(name: str) -> Path:
    """The file of a suite: suites/NAME.toml, or `name` itself where it is a path."""
    suites = ROOT / "suites"
    path = path_of("suite", name).resolve() if name.endswith(".toml") else suites / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in suites.glob("*.toml")))
        raise BadInput(f"--suite {name}: no such suite; use {known}, or a .toml file")
    if not re.match(NAME, path.stem) or path.stem in (*KEPT_APART, "runs"):
        raise BadInput(f"--suite {name}: {path.stem} cannot name a folder in results/; use another file name")
    return path


def read_suite(path: Path) -> Suite:
    """Reads a suite file. Raises `BadInput` with the file and the first thing wrong in it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return Suite.model_validate(content)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = list(first["loc"])
        if where[:1] == ["pair"] and len(where) > 1 and isinstance(where[1], int):
            pair, number = content["pair"][where[1]], where[1] + 1
            where[:2] = [f"pair {pair.get('name', number) if isinstance(pair, dict) else number}"]
        message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise BadInput(": ".join(map(str, [path, *where, message]))) from None
    except (OSError, ValueError, RecursionError) as error:  # a number of thousands of digits, endless brackets
        raise BadInput(f"{path}: not readable: {error}") from None


def plan_runs(
    path: Path, suite: Suite, folder: Path, repeats: int, only: str | None, aa: bool = False
) -> list[Planned]:
    """The runs in order, all flags checked: in even rounds all runs are in reverse, Torch first and the last pair first
    (ABBA), so that a machine that gets slower or faster favours none.

    With `aa` each side goes against itself in the same way: a first in odd rounds, b in even ones. Each round has
    batches of its own, the same for all sides.
    """
    checked: dict[tuple[str, str], tuple[Flags, list[str]]] = {}
    for pair, framework in itertools.product(suite.pair, FRAMEWORKS):
        table = suite.defaults | pair.flags | pair.own_flags.get(framework, {})
        where = f"{path}: pair {pair.name} ({framework})"
        flags, arguments = _parse(where, METHODS[pair.script], framework, table, path.parent)
        checked[pair.name, framework] = flags, arguments
    wanted = [key for key in checked if only is None or fnmatch.fnmatchcase("/".join(key), only)]
    if not wanted:
        raise BadInput(f"--only {only} fits none of {', '.join(map('/'.join, checked))}")
    runs = []
    sides = list(itertools.product(FRAMEWORKS, ("a", "b") if aa else (None,)))
    in_order = [(pair, framework, side) for pair in suite.pair for framework, side in sides]
    for number in range(1, repeats + 1):
        for pair, framework, side in in_order if number % 2 else reversed(in_order):
            if (pair.name, framework) in wanted:
                flags, arguments = checked[pair.name, framework]
                name, own = (f"{framework}-{side}", [f"--aa={side}"]) if side else (framework, [])
                if number > 1 and "plan_seed" not in flags.given:
                    own = [*own, f"--plan-seed={number - 1}"]
                    flags = flags.model_copy(update={"plan_seed": number - 1})
                record = folder / ("aa" if side else "") / pair.name / f"{name}-r{number}.json"
                argv = [pair.script, *arguments, *own, f"--out={record}"]
                who = (pair.name, framework, side, number, METHODS[pair.script])
                flags = flags.model_copy(update={"aa": side})
                runs.append(Planned(*who, flags, argv, record, record.with_suffix(".log"), path.parent))
    return runs


def _parse(where: str, method: str, framework: str, table: dict[str, Any], folder: Path) -> tuple[Flags, list[str]]:
    """The flags as the script will read them, and as they are spelled on its command line. Raises `BadInput`.

    Relative paths count from the suite file.
    """
    said = io.StringIO()
    try:
        arguments = arguments_of(method, table)
        with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse_flags(method, arguments, prog=where, framework=framework), arguments
    except BadInput as refusal:
        raise BadInput(f"{where}: {refusal}") from None
    except SystemExit:
        raise BadInput(said.getvalue().strip().removesuffix("; see --help")) from None
