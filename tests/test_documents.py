"""The documents: generated parts are current, links have targets, and each command is run by a test or listed."""

import os
import re
import shlex
import subprocess
from collections import Counter
from typing import NamedTuple

import pytest
from conftest import ROOT, run_program

from tunebench.flags import parse_flags
from tunebench.report.documents import BEGIN, END, READMES, documents

PAGES = [
    *(ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "results" / "published" / "README.md",
]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_generated_documents_are_current(path):
    assert path.read_text(encoding="utf-8") == documents()[path], "run: python3 summarize.py --docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", READMES)
def test_readme_fits_on_a_few_screens(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert len(text.splitlines()) <= 140
    first_screen = text[: text.index("\n## ")]
    assert first_screen.index("docs/results.md") < first_screen.index(f"{BEGIN}\n![") < first_screen.index("\n| Model ")


class Section(NamedTuple):
    """What a translation of a section keeps: the heading's level, blocks of code, codes in sentences, links, lists, and
    the number of cells of each line of a table."""

    level: str
    blocks: list[str]
    codes: Counter
    links: Counter
    numbers: list[str]
    cells: list[int]


def sections(text):
    """The sections of a README, in order. The link to the other README is the same in both."""
    found = []
    for level, part in re.findall(r"(?ms)^(#+) (.*?)(?=^#+ |\Z)", text):
        prose = re.sub(r"(?s)```.*?```", "", part)
        links = re.findall(r"\]\(([^)]+)\)", prose)
        found.append(
            Section(
                level=level,
                blocks=re.findall(r"(?s)```.*?```", part),
                codes=Counter(re.findall(r"`([^`\n]+)`", prose)),
                links=Counter("README" if link in READMES else link for link in links),
                numbers=re.findall(r"(?m)^\d+\.", prose),
                cells=[line.count("|") for line in prose.splitlines() if line.startswith("|")],
            )
        )
    return found


def test_both_readmes_have_the_same_headings_commands_links_and_tables():
    ours, theirs = (sections((ROOT / name).read_text(encoding="utf-8")) for name in READMES)
    assert [section.level for section in ours] == [section.level for section in theirs]
    assert len(ours) == 8
    for section, other in zip(ours, theirs, strict=True):
        assert section == other


@pytest.mark.parametrize(
    "change",
    [
        ("## One script", "### One script"),
        ("python3 summarize.py\n", ""),
        ("`--sweep`", "`--plan`"),
        ("(docs/planner.md)", "(docs/flags.md)"),
        ("| `suites/` | which runs a suite has |\n", ""),
        ("4. **Pinned versions.**", "**Pinned versions.**"),
    ],
)
def test_a_change_of_one_readme_alone_is_seen(change):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(change[0])
    assert sections(text.replace(*change, 1)) != sections(text)


# The test that runs a command of a page, or why none does. Commands of scripts and of summarize.py are read below.
RUN_ELSEWHERE = {
    "bash run_all.sh": "test_suite.py runs suites; this one takes half an hour",
    "bash run_all.sh --suite cpu": "test_suite.py runs suites; this one takes half an hour",
    "bash run_all.sh --aa": "test_suite.py runs a suite with --aa",
    "bash run_all.sh --cpu": "needs PyTorch's CPU index",
    "bash run_all.sh --check": "test_check.py checks a suite",
    "bash run_all.sh --suite quick": "takes 17 minutes; test_plan.py checks its runs",
    "bash run_all.sh --suite quick --aa": "takes 17 minutes; test_suite.py runs a suite with --aa",
    "bash run_all.sh --suite quick --until 3%": "takes up to an hour; test_versus.py adds rounds until one is narrow",
    "bash run_all.sh --suite quick --versus ../older-checkout": "takes an hour; test_versus.py runs two checkouts",
    "bash run_all.sh --suite quick --versus /opt/nightly/bin/python": "takes half an hour; test_versus.py plans it",
    "python3 benchmarks/resample.py": "takes half a minute; test_regressions.py draws fewer tables",
    "python3 benchmarks/slowed.py": "takes an hour; test_versus.py runs it on a small suite",
    "python3 benchmarks/slowed.py --only 'llama*'": "test_regressions.py has the records of such a series",
    "bash run_all.sh --suite tuned": "takes 44 minutes; test_plan.py checks its runs",
    "bash run_all.sh --suite parity": "takes 20 minutes; test_plan.py checks its runs",
    "bash run_all.sh --suite gpu1-80g": "needs a GPU of 80 GB; test_gpu_suites.py checks its flags",
    "bash run_all.sh --suite gpu1-80g --rehearse": "needs a GPU of 80 GB; test_check.py rehearses a suite",
    "bash run_all.sh --check --suite gpu1-80g": "test_check.py checks a suite",
    "bash run_all.sh --suite gpu1-24g": "needs a GPU of 24 GB; test_gpu_suites.py checks its flags",
    "bash run_all.sh --suite parity --only 'llama-*'": "takes 8 minutes; test_plan.py checks its runs",
    "export TUNEBENCH_TORCH=/opt/conda/bin/python": "test_check.py names an interpreter",
    "bash run_all.sh --suite a100x4": "needs four GPUs; test_gpu_suites.py builds its runs by shapes",
    "bash run_all.sh --suite a100x4-options": "needs four GPUs; test_gpu_suites.py parses its flags",
    "bash run_all.sh --suite h100x8": "needs eight GPUs; test_gpu_suites.py builds its runs by shapes",
    "bash run_all.sh --suite a100x4-as-published": "needs four GPUs; test_gpu_suites.py builds its runs by shapes",
    "bash run_all.sh --suite a100x4 --plan --gpu a100-80g --price 1.79 --out answers.json": "takes ten minutes; "
    "test_suite_forecast.py plans a suite",
    "bash run_all.sh --suite a100x4 --plan --calibrate results/gpu1-80g": "needs records of an A100; "
    "test_calibrate.py calibrates a plan, test_suite_forecast.py plans a suite",
    "bash run_all.sh --suite calibration": "takes five minutes; test_suite.py checks its flags",
    ".venv/torch/bin/python -P benchmarks/calibration.py results/measured/20261130-epyc-2-cores/calibration": "takes "
    "ten seconds; test_calibrate.py runs it on two records",
    ".venv/torch/bin/python -P -m tunebench.forecast.speed_points": "test_speed.py fits the constants anew",
    ".venv/torch/bin/python benchmarks/peaks.py": "test_forecast.py asks for the same points",
    "python3 summarize.py --html report.html": "test_html.py writes pages",
    "bash run_all.sh --suite NAME --aa": "test_suite.py runs a suite with --aa",
    "bash run_tests.sh": "runs this test",
    ".venv/torch/bin/python -P -m pytest tests/test_record.py": "a part of this session of tests",
    ".venv/paddle/bin/python -P -m pytest tests/test_plan.py -k packing": "a part of a session of tests",
    ".venv/torch/bin/python -P -m tunebench.record": "test_record.py compares what it writes",
    "bash setup.sh": "test_setup.py",
    "bash setup.sh --cpu": "needs PyTorch's CPU index",
    "bash run_all.sh --suite peers": "downloads the trainers' environments; test_peers.py runs one of its peers",
    "bash run_all.sh --suite peers-grouped": "takes 24 minutes; test_peers.py runs one of its peers",
    "bash setup.sh paddleformers": "test_paddleformers.py",
    "TUNEBENCH_PADDLE=.venv/paddleformers/bin/python python3 paddle/finetune_full.py --model llama-tiny": "takes two "
    "minutes; test_paddleformers.py trains fewer steps",
    "TUNEBENCH_RESULTS=results-formers bash run_all.sh --only 'llama*' --paddle .venv/paddleformers/bin/python": "20 "
    "minutes; test_paddleformers.py trains with it, test_check.py runs a suite with an interpreter",
    "bash run_all.sh --suite quick --only 'llama*' --versus .venv/paddleformers/bin/python": "takes ten minutes; "
    "test_versus.py plans such a run",
    "bash run_all.sh --suite tuned --only 'tuned*/paddle' --versus .venv/paddleformers/bin/python": "takes ten "
    "minutes; test_versus.py plans such a run",
    "bash setup.sh peers": "downloads an environment; test_setup.py makes others",
    "rm -r .venv/torch": "test_setup.py builds an environment anew",
    ".venv/torch/bin/torchrun --standalone --nproc-per-node 2 torch/finetune_full.py": "test_launch.py",
    ".venv/paddle/bin/python -m paddle.distributed.launch --nproc_per_node 2 paddle/finetune_full.py": "test_launch.py",
    "python3 torch/finetune_full.py --nnodes 2 --node-rank 0 --master HOST:29500 --nproc 4 --bsz 16": "test_launch.py",
    "srun --ntasks 2 python3 torch/finetune_full.py": "needs Slurm; tests/slurm.sh",
    ".venv/torch/bin/python -P tests/stress.py --kills 200": "takes an hour",
    ".venv/torch/bin/python -P tests/two_nodes.py FOLDER": "measures one machine; test_nodes.py uses its nodes",
    "bash tests/fresh_machine.sh bookworm": "needs root, and takes ten minutes",
    "bash tests/slurm.sh": "needs root and Slurm",
    "python3 benchmarks/matmul.py": "measures one machine",
    "python3 benchmarks/data.py": "measures one machine",
    "python3 benchmarks/growth.py": "test_growth.py runs it with small sizes",
    "diff torch/finetune_full.py paddle/finetune_full.py": "prints a difference",
}
PRINTS = {  # and a part of what it prints
    "python3 summarize.py": "no records in",
    "python3 summarize.py results/published": "Multi-GPU record",
    "python3 summarize.py --strict": "no records in",
    "python3 summarize.py --compare results/measured/20261128-epyc-2-cores/quick "
    "results/measured/20261128-epyc-2-cores/cpu": "ADVICE, no verdict",
    "python3 summarize.py --profile": "no records in",
}
NEEDS_RECORDS = (
    "results/quick",
    "results/parity",
    "results/a100x4",
    "results/gpu1-80g",
    "results/peers",
    "results/cpu",
    "results/measured",
)


def commands():
    """The commands of all pages: lines of blocks of bash, and code in a sentence or a table that starts a program."""
    found = set()
    starts = ("bash ", "python3 ", ".venv/", "srun ", "diff ", "rm ")
    for page in PAGES[:-1]:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            found |= {line.split("  #")[0].strip() for line in block.splitlines()}
        inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found |= {code.strip() for code in inline if code.startswith(starts) and " " in code.strip()}
    # docs/results.md names the rounds of each series, and what growth.py was told.
    told = r" --repeats \d+$|(?<=^python3 benchmarks/growth\.py) --.*"
    return {re.sub(told, "", command) for command in found if command and not command.startswith("#")}


def test_each_command_is_known():
    """Parses a script's flags as the script does, or runs the program and looks at what it prints."""
    known = commands()
    assert len(known) > 40
    for command in sorted(known - RUN_ELSEWHERE.keys() - PRINTS.keys()):
        words = shlex.split(command)
        if words[1].endswith((".py",)) and words[1].split("/")[0] in ("torch", "paddle"):
            method = "lora" if "lora" in words[1] else "full"
            parse_flags(method, words[2:], framework=words[1].split("/")[0])
        else:
            assert words[:2] == ["python3", "summarize.py"] or words[1].startswith("data/"), command
            assert (ROOT / words[1]).exists(), command
            assert (
                words[2:3] in (["--docs"], ["--pack"])
                or words[1] == "data/prepare.py"
                or words[2].startswith(NEEDS_RECORDS)
            ), command
    assert not RUN_ELSEWHERE.keys() - known, "no page has these commands any more"


@pytest.mark.parametrize("command", PRINTS)
def test_what_a_command_prints(command, tmp_path):
    done = run_program(*shlex.split(command)[1:], check=True, cwd=ROOT, env={"TUNEBENCH_RESULTS": str(tmp_path)})
    assert PRINTS[command] in done.stdout


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "suite",
    ["cpu", "quick", "tuned", "parity", "calibration", "a100x4", "h100x8", "a100x4-as-published", "a100x4-options"],
)
def test_each_suite_of_a_page_can_be_planned(suite, tmp_path):
    command = ["bash", str(ROOT / "run_all.sh"), "--suite", suite, "--dry-run"]
    env = os.environ | {"TUNEBENCH_RESULTS": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finetune_") >= 8
