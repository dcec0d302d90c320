"""Runs the peers and this project's scripts by turns on the same samples, and prints how they compare.

    bash peers/run.sh [--rounds 5] [--methods full lora] [--only GLOB ...] [--samples 96] [--steps N] [--fresh]

Records go to results/peers/METHOD/NAME-rROUND.json; what is there already, of the same flags, commit and machine, is
not run again.
"""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch")

import fnmatch
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from tunebench import conditions, processes
from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import results_folder
from tunebench.flags import Flags, Parser, parse_flags, positive
from tunebench.models.checkpoint import Checkpoint, find_checkpoint
from tunebench.models.families import FAMILIES
from tunebench.models.presets import PRESETS
from tunebench.plan import Plan, load_plan
from tunebench.record import LOG_LINES, Model, Record, Steps, read_record
from tunebench.report.page import print_tables
from tunebench.run.run import describe_run
from tunebench.suite.resume import record_before, set_aside

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the peers train on the CPU, so the scripts beside them do too
SAMPLES, BSZ = 96, 8  # by default
ROW_TOKENS = 1024  # of a packed row, one a step: about as many as 8 samples have
TIMEOUT = 1800.0  # seconds of one run


class Setting(NamedTuple):
    """A row of the table: `flags` of this project's script, or a peer's `script` and environment."""

    name: str
    framework: str
    flags: list[str]
    script: str | None = None
    environment: str | None = None


SETTINGS = [  # parity: with the attention that the framework's own Trainer has by default
    Setting("torch-parity", "torch", ["--attention=sdpa"]),
    Setting("torch-tuned", "torch", ["--tuned"]),
    Setting("hf-trainer", "torch", [], "with_transformers.py", "peers"),
    Setting("hf-trainer-grouped", "torch", [], "with_transformers.py", "peers"),
    Setting("trl-padding-free", "torch", [], "with_trl.py", "peers"),
    Setting("trl-packed", "torch", [], "with_trl.py", "peers"),
    Setting("torchtune", "torch", [], "with_torchtune.py", "torchtune"),
    Setting("torchtune-packed", "torch", [], "with_torchtune.py", "torchtune"),
    Setting("llamafactory", "torch", [], "with_llamafactory.py", "llamafactory"),
    Setting("paddle-parity", "paddle", ["--attention=eager"]),
    Setting("paddle-tuned", "paddle", ["--tuned"]),
    Setting("paddlenlp-trainer", "paddle", [], "with_paddlenlp.py", "paddle"),
    Setting("paddlenlp-zero-padding", "paddle", [], "with_paddlenlp.py", "paddle"),
]


def main() -> int:
    """Runs what is not done and prints the tables; 1 where a run did not end ok."""
    parser = Parser(prog="run.sh", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="llama-65b-tiny", help="a Llama preset (default: llama-65b-tiny, of 34M parameters)")
    add("--data", default="synthetic-en", help="as in the scripts")
    add("--samples", type=positive, help=f"how many of it (default: {SAMPLES}, or what --steps need)")
    add(
        "--steps",
        type=positive,
        help="the first so many of a pass over the samples (default: all of them); hf-trainer-grouped sorts pools of "
        "at most 50, the longest samples first, so take whole pools",
    )
    add("--bsz", type=positive, help=f"samples of a step (default: {BSZ}, or all of fewer)")
    add("--warmup-steps", type=positive, help="first steps, not timed (default: 2, or all but the last)")
    add("--rounds", type=positive, default=5, help="how often, every second time in reverse (default: 5)")
    add("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    add(
        "--only", metavar="GLOB", nargs="+", default=["*"], help=f"of {', '.join(setting.name for setting in SETTINGS)}"
    )
    add("--fresh", action="store_true", help="from the start; earlier records move to results/.previous/")
    options = parser.parse_args()
    settings = [
        setting for setting in SETTINGS if any(fnmatch.fnmatchcase(setting.name, glob) for glob in options.only)
    ]
    if not settings:
        raise BadInput(
            f"--only {' '.join(options.only)} fits none of {', '.join(setting.name for setting in SETTINGS)}"
        )
    folder = results_folder() / "peers"
    options.bsz = options.bsz or min(BSZ, max((options.samples or math.inf) // (options.steps or 1), 1))
    options.samples = options.samples or max(SAMPLES, (options.steps or 1) * options.bsz)
    whole = options.samples // options.bsz
    steps = options.steps or max(whole, 1)
    if steps > whole:
        raise BadInput(
            f"--samples {options.samples} has {whole} steps of --bsz {options.bsz}; "
            f"{steps} need {steps * options.bsz} samples"
        )
    warmup = options.warmup_steps or min(2, steps - 1)
    shared = [f"--model={options.model}", f"--data={options.data}", f"--samples={options.samples}"]
    shared += [f"--bsz={options.bsz}", f"--steps={steps}", f"--warmup-steps={warmup}", "--no-paired-halves"]
    jobs = {}
    for method in options.methods:
        for setting in settings:
            parse_flags(method, [*shared, *setting.flags], framework=setting.framework)  # refuses before anything runs
        flags = parse_flags(method, shared)
        checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed)
        config = checkpoint.config
        plain = options.model in PRESETS and config["model_type"] == "llama" and not config["rope_scaling"]
        if not plain or config["tie_word_embeddings"] or config["num_key_value_heads"] != config["num_attention_heads"]:
            raise BadInput(
                f"--model {options.model}: the peers are set up for Llama's first releases, without grouped queries, "
                "rotary scaling and a tied head; use llama-tiny or llama-65b-tiny"
            )
        every_sample = load_plan(parse_flags(method, [*shared, f"--steps={whole}"]), checkpoint)
        jobs[method] = flags, checkpoint, load_plan(flags, checkpoint), every_sample.path
    if options.fresh:
        set_aside(folder, *folder.glob("*"))
    todo = [
        (number, method, setting, folder / method / f"{setting.name}-r{number}.json")
        for number in range(1, options.rounds + 1)
        for method in options.methods
        for setting in (settings if number % 2 else reversed(settings))
    ]
    frameworks = {setting.framework for setting in settings}
    # Of other steps a record would get into the same table.
    for out in sorted({*folder.glob("*/*.json")} - {out for *_, out in todo}):
        record = read_record(out)
        if record.framework in frameworks and not set(shared) <= set(record.argv):
            raise BadInput(
                f"{out} is of a run with other flags; use --fresh, or set TUNEBENCH_RESULTS to another folder"
            )
    bad = 0
    for i, (number, method, setting, out) in enumerate(todo, 1):
        record, why = record_before(out, arguments(setting, method, shared, out), nproc=1)
        title = f"[{i}/{len(todo)}] {method} {setting.name} r{number}"
        if record is not None:
            bad += record.status != "ok"
            continue
        if why:
            print(f"{title}: again, since {why}; the old one moves to {set_aside(folder, out)}/", flush=True)
        started = time.monotonic()
        run = run_peer if setting.script else run_ours
        record = run(setting, method, jobs[method], shared, out)
        bad += record.status != "ok"
        rate = f"{record.effective_tokens_per_second:.0f} effective tokens/s" if record.steps else record.reason
        print(f"{title}: {rate}, {time.monotonic() - started:.0f} s", flush=True)
    print_tables([folder])
    return 1 if bad else 0


def arguments(setting: Setting, method: str, shared: list[str], out: pathlib.Path) -> list[str]:
    """A run's command line, as its record has it."""
    script, own = f"finetune_{method}.py", setting.flags
    if setting.script:
        script, own = setting.script, [f"--peer={setting.name}"]
    return [script, *own, *shared, f"--out={out}"]


def run_ours(setting: Setting, method: str, _: Any, shared: list[str], out: pathlib.Path) -> Record:
    """This project's own script, which writes its record."""
    python = ROOT / ".venv" / setting.framework / "bin" / "python"
    script, *flags = arguments(setting, method, shared, out)
    said = execute([python, ROOT / setting.framework / script, *flags])
    try:
        return read_record(out)
    except BadInput:
        raise BadInput(f"{setting.name} left no record; it said: {said[-1] if said else 'nothing'}") from None


def run_peer(
    setting: Setting,
    method: str,
    job: tuple[Flags, Checkpoint, Plan, pathlib.Path],
    shared: list[str],
    out: pathlib.Path,
) -> Record:
    """A peer's script in its environment, and the record of it. It gets all samples, also for few steps."""
    flags, checkpoint, plan, every_sample = job
    about = describe_run(setting.framework, method, flags, arguments(setting, method, shared, out))
    packed = setting.name.endswith(("packed", "zero-padding"))
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        measured = pathlib.Path(scratch) / "measured.json"
        content = {
            "peer": setting.name,
            "method": method,
            "plan": str(every_sample),
            "checkpoint": str(checkpoint.folder),
            "bsz": flags.bsz,
            "steps": plan.steps,
            "lr": flags.lr,
            "seed": flags.seed,
            "lora_r": flags.lora_r or 8,
            "lora_alpha": flags.lora_alpha or 32,
            "lora_targets": FAMILIES["llama"].lora_targets,
            "row_tokens": ROW_TOKENS,
            "in_order": not packed,  # the plan's own batches
            "out": str(measured),
        }
        (pathlib.Path(scratch) / "job.json").write_text(json.dumps(content))
        python = ROOT / ".venv" / setting.environment / "bin" / "python"
        if not python.exists():
            where = "setup.sh" if setting.environment == "paddle" else "peers/setup.sh"
            raise BadInput(
                f"the environment .venv/{setting.environment} is missing; run: bash {where} {setting.environment}"
            )
        before = conditions.read([os.getpid()])
        said = execute([python, "-P", ROOT / "peers" / setting.script, f"{scratch}/job.json"])
        around = conditions.between(before, conditions.read([os.getpid()]))  # of the whole run, start-up too
        found = json.loads(measured.read_text()) if measured.exists() else None
    steps = None
    if found:
        curves = ("seconds", "effective_tokens", "padded_tokens", "label_tokens", "loss")
        norms = found["grad_norm"] or [0.0] * plan.steps  # PaddleNLP's are not to be had
        squared = None
        if found["effective_tokens"] == [plan.effective_tokens(i) for i in range(plan.steps)]:
            squared = [plan.squared_lengths(i) for i in range(plan.steps)]
        steps = Steps(**{name: found[name] for name in curves}, grad_norm=norms, squared_lengths=squared)
        about["versions"] = found["versions"]
    about["hardware"] = about["hardware"].model_copy(update={"device": "cpu"})
    about["setup"] = about["setup"].model_copy(
        update={"packing": ROW_TOKENS if packed else 0, "padding_free": packed or "padding-free" in setting.name}
    )
    record = Record(
        **about,
        peer=setting.name,
        status="ok" if steps else "failed",
        reason=None if steps else f"last line: {said[-1] if said else 'none'}",
        model=Model(
            name=flags.model_name,
            family="llama",
            parameters=checkpoint.parameters,
            trainable_parameters=found and found["trainable_parameters"],
            config_sha256=checkpoint.config_sha256,
            weights_sha256=checkpoint.weights_sha256,
            work=checkpoint.work,
        ),
        plan=plan.info(),
        steps=steps,
        conditions=around if steps else None,
        setup_seconds=None,
        peak_memory_bytes=[found["peak_memory_bytes"]] if found else [],
        log=[found["setup"]] if found else said[-LOG_LINES:],
    )
    record.write(out)
    return record


def execute(command: list[object]) -> list[str]:
    """Runs a command to its end, or for 30 minutes, and gives the lines it printed; nothing of it is left running."""
    with tempfile.TemporaryFile() as log:
        process = processes.start([*map(str, command)], stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            processes.end(process)
        log.seek(0)
        return log.read().decode(errors="replace").splitlines()


if __name__ == "__main__":
    with one_line_refusals("run.sh"):
        sys.exit(main())
