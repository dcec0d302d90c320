"""Checks an environment that setup.sh has filled: its versions are the pinned ones, and its packages can be imported.

    .venv/torch/bin/python -P tunebench/installed.py REQUIREMENTS

REQUIREMENTS pins direct dependencies as NAME==VERSION. Its comment `# imports: NAME NAME` names the modules to import.
The program prints CPU or the CUDA version that the environment's framework was built for, or nothing without one. Where
a check fails it prints one line on stderr and ends with exit code 2. It needs the standard library alone.
"""

import contextlib
import importlib
import io
import re
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = {"libgomp.so.1": "libgomp1"}  # Debian's package of a library that frameworks load


def main(requirements: Path) -> str:
    """Checks the environment of this interpreter. Returns the kind of its framework's build. Raises `ValueError`."""
    text = requirements.read_text(encoding="utf-8")
    for name, version in re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", text):
        found = installed(name)
        if found is None or found.split("+")[0] != version.split("+")[0]:
            raise ValueError(
                f"{name} is {found or 'missing'}, not {version}: settings of pip or uv diverted the installation"
            )
    modules = " ".join(re.findall(r"(?m)^# imports: (.*)$", text)).split()
    for module in modules:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(module)
        except Exception as error:
            raise ValueError(f"{module} cannot be imported: {explained(error)}") from None
    return kind(modules)


def installed(name: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def explained(error: Exception) -> str:
    """An error's first line, and the package to install where a shared library is missing."""
    line = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    for library, package in PACKAGES.items():
        if library in line:
            return f"{line}; install it (Debian or Ubuntu: apt install {package})"
    return line


def kind(modules: list[str]) -> str:
    """What the imported framework was built for: CPU or CUDA with its version."""
    if "torch" in modules:
        version = sys.modules["torch"].version.cuda
    elif "paddle" in modules:
        version = sys.modules["paddle"].version.cuda()
    else:
        return "no framework"
    return f"CUDA {version}" if version and version != "False" else "CPU"


if __name__ == "__main__":
    try:
        print(main(Path(sys.argv[1])))
    except (OSError, ValueError) as error:
        print(f"setup: {error}", file=sys.stderr)
        sys.exit(2)
