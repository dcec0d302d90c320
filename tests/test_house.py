"""The layout: which imports are allowed, and what the mirrored scripts share."""

import ast
import difflib
import subprocess
import sys

import pytest
from conftest import ROOT

from tunebench import bootstrap

SCRIPTS = [f"{framework}/finetune_{method}.py" for framework in ("torch", "paddle") for method in ("full", "lora")]


@pytest.mark.parametrize("folder", ["torch", "paddle", "data", "tests"])
def test_no_folder_passes_for_a_package(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists(), "it would hide the real framework"


def test_no_module_beside_a_script_has_a_standard_name():
    modules = [file for folder in ("torch", "paddle", "data") for file in (ROOT / folder).glob("*.py")]
    assert len(modules) >= 8
    assert not [file for file in modules if file.stem in sys.stdlib_module_names]


def test_root_is_not_importable_from_the_environment():
    code = "import importlib.util as u, sys; print([u.find_spec(n) for n in ('suites', 'results', 'tests')], sys.path)"
    printed = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("[None, None, None]")
    assert f"'{ROOT}'" not in printed


@pytest.mark.parametrize(
    ("vendor", "flags", "own", "path"),
    [
        ("AuthenticAMD", ["fma avx2 " + " ".join(bootstrap.AVX512)] * 2, None, "7"),
        ("AuthenticAMD", ["fma avx2 avx512f avx512cd"], None, "5"),
        ("AuthenticAMD", [], None, "5"),
        ("AuthenticAMD", ["fma avx2"], "4", "4"),
        ("GenuineIntel", ["fma avx2 " + " ".join(bootstrap.AVX512)], None, None),
    ],
)
def test_which_of_mkls_kernels_the_processor_gets(monkeypatch, vendor, flags, own, path):
    monkeypatch.setattr(bootstrap, "cpuinfo", {"vendor_id": [vendor], "flags": flags}.get)
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE", raising=False)
    if own:
        monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", own)
    assert bootstrap.maths_settings().get("MKL_DEBUG_CPU_TYPE") == path


def test_the_users_settings_for_gpus_stay(monkeypatch):
    names = ("CUDA_DEVICE_ORDER", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert [bootstrap.maths_settings().get(name) for name in names] == ["PCI_BUS_ID", "expandable_segments:True", None]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    settings = bootstrap.maths_settings()
    assert (settings["CUDA_DEVICE_ORDER"], settings.get("PYTORCH_ALLOC_CONF")) == ("FASTEST_FIRST", None)


# Files that everything may import, and that import no folder of tunebench.
GROUND = (
    *(
        "bootstrap",
        "checkout",
        "conditions",
        "digest",
        "errors",
        "files",
        "frameworks",
        "hardware",
        "processes",
        "progress",
    ),
    *("peers", "recipe", "record", "world"),
)


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_by(file, known):
    """The modules of `known` that a file imports anywhere, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imports():
    """What each file of tunebench imports of it, by module."""
    files = {module_of(file): file for file in (ROOT / "tunebench").rglob("*.py")}
    assert len(files) > 40
    return {name: imported_by(file, files) & files.keys() for name, file in files.items()}


def circle_in(graph):
    """A circle of a graph, as a path; None where there is none."""
    done = set()

    def search(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := search(other, [*path, name]):
                    return found
            done.add(name)
        return None

    return next(filter(None, (search(name, []) for name in sorted(graph))), None)


def test_no_files_import_each_other():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in(imports()) is None
    for side in ("torch", "paddle", "data", "peers"):
        files = {file.stem: file for file in (ROOT / side).glob("*.py")}
        assert circle_in({name: imported_by(file, files) & files.keys() for name, file in files.items()}) is None


def test_ground_files_import_no_folder():
    graph, ground = imports(), {f"tunebench.{name}" for name in GROUND}
    assert ground <= graph.keys()
    assert {name: graph[name] - ground for name in ground if graph[name] - ground} == {}


def test_reports_import_neither_runs_nor_suites():
    graph = imports()
    reports = {name for name in graph if name.startswith("tunebench.report.")}
    assert len(reports) > 8
    for name in reports:
        assert not [other for other in graph[name] if other.startswith(("tunebench.run", "tunebench.suite"))], name


def test_no_test_file_imports_from_another():
    files = {file.stem: file for file in (ROOT / "tests").rglob("test_*.py")}
    assert len(files) > 25
    assert {name: found for name, file in files.items() if (found := imported_by(file, {}) & files.keys())} == {}


def test_tunebench_imports_neither_framework():
    for file in (ROOT / "tunebench").rglob("*.py"):
        names = {name.split(".")[0] for name in imported_by(file, {})}
        assert not names & {"torch", "paddle", "paddlenlp", "transformers"}, file


def definitions(script: str) -> list[str]:
    body = ast.parse((ROOT / script).read_text()).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_twins_have_the_same_blocks_in_the_same_order(method):
    torch, paddle = (definitions(f"{framework}/finetune_{method}.py") for framework in ("torch", "paddle"))
    assert torch == [name for name in paddle if name != "require_gradient"]  # peft's work on the other side
    assert len(torch) >= 4  # the loss is in losses.py, all that concerns several processes in parallel.py


@pytest.mark.parametrize("framework", ["torch", "paddle"])
def test_siblings_differ_only_where_lora_does(framework):
    full, lora = ((ROOT / f"{framework}/finetune_{method}.py").read_text().splitlines() for method in ("full", "lora"))
    main = [lines[lines.index("def main(run: Run) -> None:") :] for lines in (full, lora)]
    assert main[0] == main[1], "\n".join(difflib.unified_diff(*main, lineterm=""))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_readable(script):
    assert 80 <= len((ROOT / script).read_text().splitlines()) <= 300


def test_lock_files_name_no_local_build_and_no_host():
    for framework in ("torch", "paddle"):
        lines = (ROOT / framework / "constraints.txt").read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert len(pins) > 50
        assert all("==" in pin for pin in pins)
        assert not [pin for pin in pins if "+" in pin or "://" in pin or "file:" in pin]
        wanted = [line for line in (ROOT / framework / "requirements.txt").read_text().splitlines() if "==" in line]
        locked = {pin.split(" ")[0].lower().replace("_", "-") for pin in pins}
        assert {line.lower().replace("_", "-") for line in wanted} <= locked
