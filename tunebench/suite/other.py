"""What --versus names: another checkout of this project, or another interpreter for one framework."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunebench.bootstrap import OLDEST_PYTHON, ROOT, UNWANTED, own_python, python_of, variable_of
from tunebench.errors import BadInput
from tunebench.flags import path_of
from tunebench.frameworks import FRAMEWORKS

PROBE_SECONDS = 60
# What an interpreter says of itself: its version, the frameworks that it has, and the folder of its tunebench.
ASK = f"""
import importlib.util, json, os, sys
def origin(name):
    spec = importlib.util.find_spec(name)
    return spec and spec.origin and os.path.realpath(spec.origin)
found = [name for name in {list(FRAMEWORKS)} if origin(name)]
print(json.dumps([list(sys.version_info[:2]), found, origin("tunebench")]))
"""


@dataclass(frozen=True)
class Other:
    """The side `old` of --versus.

    - `path`: what --versus named. `root`: the checkout whose scripts run.
    - `interpreter`: that of the one framework in `frameworks`; None where each environment is the checkout's own.
    """

    path: Path
    root: Path
    frameworks: tuple[str, ...]
    interpreter: Path | None

    @property
    def name(self) -> str:
        """Its name in the name of a folder."""
        folder = self.path
        if self.interpreter:
            folder = self.path.parent.parent if self.path.parent.name == "bin" else self.path
        return re.sub("[^A-Za-z0-9._-]+", "-", folder.name).strip("-.") or "other"

    @property
    def is_checkout(self) -> bool:
        """Whether it is another checkout, not another interpreter for this one's scripts."""
        return self.interpreter is None

    def python_of(self, framework: str) -> Path:
        """The interpreter of its runs."""
        return self.interpreter or own_python(framework) or self.root / ".venv" / framework / "bin" / "python"

    def variables(self) -> Mapping[str, str]:
        """The environment variables that its runs have beside those of this process."""
        return {variable_of(name): str(self.interpreter) for name in self.frameworks} if self.interpreter else {}


def find_other(given: str) -> Other:
    """What --versus names. Raises `BadInput` where it is neither another checkout nor another interpreter."""
    path = Path(os.path.abspath(path_of("versus", given)))  # noqa: PTH100 (links keep their names)
    if path.is_dir():
        return _checkout(given, path)
    if path.is_file() and os.access(path, os.X_OK):
        return _interpreter(given, path)
    raise BadInput(f"--versus {given}: no such folder or Python; name another checkout's folder, or an interpreter")


def _checkout(given: str, path: Path) -> Other:
    scripts = [f"{name}/finetune_{method}.py" for name in FRAMEWORKS for method in ("lora", "full")]
    missing = [name for name in ("setup.sh", "tunebench/bootstrap.py", *scripts) if not (path / name).is_file()]
    if missing:
        python = path / "bin" / "python"
        advice = f"name its Python: --versus {python}" if python.exists() else "name the folder of another checkout"
        raise BadInput(f"--versus {given}: no checkout of this project, for want of {missing[0]}; {advice}")
    if path.resolve() == ROOT:
        raise BadInput(f"--versus {given} is this checkout; name another one, or an interpreter (noise here: --aa)")
    return Other(path, path.resolve(), tuple(FRAMEWORKS), None)


def _interpreter(given: str, path: Path) -> Other:
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    try:
        done = subprocess.run(
            [path, "-c", ASK],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        version, found, tunebench = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        raise BadInput(
            f"--versus {given}: no Python that answers; name a checkout's folder, or an interpreter"
        ) from None
    if tuple(version) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise BadInput(f"--versus {given} is Python {'.'.join(map(str, version))}; name one from {oldest} on")
    if len(found) != 1:
        has = f"has both {' and '.join(found)}" if found else f"has none of {', '.join(FRAMEWORKS)}"
        raise BadInput(f"--versus {given} {has}; name an interpreter with the packages of one framework")
    root = Path(tunebench).parents[1] if tunebench else ROOT
    if root != ROOT:
        raise BadInput(f"--versus {given} has the tunebench of {root}; name that folder: --versus {root}")
    if path == python_of(found[0]):
        raise BadInput(f"--versus {given} is this checkout's own Python of {found[0]}; name another (noise here: --aa)")
    return Other(path, ROOT, (found[0],), path)
