"""The tables that benchmarks/growth.py measures. It writes them as JSON, and docs/results.md shows them."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.report.markdown import markdown


class GrowthTable(BaseModel):
    """One series of measurements. `conditions` names the machine and the commit; `note` follows the table."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    heading: str
    conditions: str
    columns: list[str]
    lines: list[list[str]]
    note: str | None = None

    def text(self) -> str:
        """The heading, conditions, table and note as Markdown."""
        parts = [f"### {self.heading}", self.conditions, markdown(self.columns, self.lines), self.note]
        return "\n\n".join(part for part in parts if part)


class Growth(BaseModel):
    """The tables of one run of benchmarks/growth.py and the command that started it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    command: str
    tables: list[GrowthTable]


def read_growth(file: Path) -> Growth:
    """The tables in a file. Raises `BadInput` where it cannot be read."""
    try:
        return Growth.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise BadInput(f"{file}: no tables of growth.py: {str(error).splitlines()[0]}") from None


def write_growth(file: Path, growth: Growth) -> None:
    """Writes the tables to `file`."""
    write_atomically(file, f"{growth.model_dump_json(indent=1)}\n".encode())
