"""Runs a peer on the samples that a script of this project would get, and leaves a record.

    python peers/run_peer.py --peer hf-trainer --method full --model llama-65b-tiny --bsz 8 --no-paired-halves

The other flags are those of the scripts. The peer's script in peers/ trains in its own environment, on the CPU.
"""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch")

import json
import os
import signal
import subprocess
import sys
import tempfile

from tunebench import conditions, processes
from tunebench.bootstrap import python_of
from tunebench.errors import BadInput, one_line_refusals
from tunebench.flags import Flags, Parser, parse_flags
from tunebench.models.checkpoint import Checkpoint, find_checkpoint
from tunebench.models.families import FAMILIES
from tunebench.models.presets import PRESETS
from tunebench.peers import PEERS, check_environment, check_peer_flags
from tunebench.plan import Plan, load_plan
from tunebench.record import LOG_LINES, Model, Record, Steps
from tunebench.run.run import describe_run, new_record_path

PROGRAM = "run_peer.py"
ROW_TOKENS = 1024  # tokens of a packed row, which is one step: about as many as 8 samples have


def main() -> int:
    """Runs the peer of the command line. Returns 0, or 1 where it did not end ok."""
    parser = Parser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--peer", choices=list(PEERS), required=True, help="the trainer")
    parser.add_argument("--method", choices=["full", "lora"], default="full", help="what is trained (default: full)")
    options, rest = parser.parse_known_args()
    # An interrupt raises KeyboardInterrupt, so that the peer is ended and its folder removed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the peers train on the CPU, and parse_flags looks for GPUs
    peer = PEERS[options.peer]
    flags = parse_flags(options.method, rest, prog=PROGRAM, framework=peer.framework)
    check_peer_flags(flags.given, flags.paired_halves)
    check_environment(peer.environment)
    checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed, flags.layers)
    check_model(flags, checkpoint)
    plan = load_plan(flags, checkpoint)
    out = flags.out or new_record_path(options.peer, options.method, flags)
    argv = [PROGRAM, *sys.argv[1:]]
    record = run_peer(options.peer, options.method, flags, checkpoint, plan, argv)
    record.write(out)
    rate = f"ok, {record.effective_tokens_per_second:.0f} effective tokens/s" if record.steps else record.reason
    print(f"{options.peer}: {rate}; record: {out}", flush=True)
    return 0 if record.status == "ok" else 1


def check_model(flags: Flags, checkpoint: Checkpoint) -> None:
    """Raises `BadInput` where the peers do not support the model."""
    config = checkpoint.config
    plain = flags.model in PRESETS and config["model_type"] == "llama" and not config["rope_scaling"]
    if not plain or config["tie_word_embeddings"] or config["num_key_value_heads"] != config["num_attention_heads"]:
        raise BadInput(
            f"--model {flags.model}: the peers are set up for Llama's first releases, without grouped queries, "
            "rotary scaling and a tied head; use llama-tiny or llama-65b-tiny"
        )


def run_peer(name: str, method: str, flags: Flags, checkpoint: Checkpoint, plan: Plan, argv: list[str]) -> Record:
    """Runs a peer's script to its end, or for --timeout seconds, and returns its record."""
    peer = PEERS[name]
    about = describe_run(peer.framework, method, flags, argv)
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        job, measured = pathlib.Path(scratch) / "job.json", pathlib.Path(scratch) / "measured.json"
        content = {
            "peer": name,
            "method": method,
            "plan": str(pass_over_samples(flags, checkpoint, plan).path),
            "checkpoint": str(checkpoint.folder),
            "bsz": flags.bsz,
            "steps": plan.steps,
            "lr": flags.lr,
            "seed": flags.seed,
            "lora_r": flags.lora_r,
            "lora_alpha": flags.lora_alpha,
            "lora_targets": FAMILIES["llama"].lora_targets,
            "row_tokens": ROW_TOKENS,
            "in_order": not peer.packed,  # the plan's own batches
            "out": str(measured),
        }
        job.write_text(json.dumps(content))
        before = conditions.read([os.getpid()])
        script = ROOT / "peers" / peer.script
        said, ended = execute([str(python_of(peer.environment)), "-P", str(script), str(job)], flags.timeout)
        # This includes start-up, unlike the scripts' conditions.
        around = conditions.between(before, conditions.read([os.getpid()]))
        found = json.loads(measured.read_text()) if measured.exists() else None
    steps = None
    if found:
        curves = ("seconds", "effective_tokens", "padded_tokens", "label_tokens", "loss")
        norms = found["grad_norm"] or [0.0] * plan.steps  # PaddleNLP gives none
        squared = None
        if found["effective_tokens"] == [plan.effective_tokens(i) for i in range(plan.steps)]:
            squared = [plan.squared_lengths(i) for i in range(plan.steps)]
        steps = Steps(**{name: found[name] for name in curves}, grad_norm=norms, squared_lengths=squared)
        about["versions"] = found["versions"]
    about["hardware"] = about["hardware"].model_copy(update={"device": "cpu"})
    packing = ROW_TOKENS if peer.packed else 0
    about["setup"] = about["setup"].model_copy(update={"packing": packing, "padding_free": peer.padding_free})
    status, reason = "ok", None
    if steps is None and ended:
        status, reason = "failed", f"last line: {said[-1] if said else 'none'}"
    elif steps is None:
        status, reason = "timeout", f"not ended after --timeout {flags.timeout:g} s"
    return Record(
        **about,
        peer=name,
        status=status,
        reason=reason,
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


def pass_over_samples(flags: Flags, checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan of a whole pass over the samples, from which a peer may choose. It starts with the steps of `plan`."""
    steps = max(plan.info().samples // flags.bsz, plan.steps)
    return load_plan(flags.model_copy(update={"steps": steps, "epochs": None}), checkpoint)


def execute(command: list[str], seconds: float) -> tuple[list[str], bool]:
    """Runs a command for at most `seconds` and ends all it started.

    Returns the lines that it printed, and whether it ended by itself.
    """
    with tempfile.TemporaryFile() as log:
        process = processes.start(command, stdout=log, stderr=subprocess.STDOUT)
        ended = True
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            processes.end(process)
        log.seek(0)
        return log.read().decode(errors="replace").splitlines(), ended


if __name__ == "__main__":
    with one_line_refusals(PROGRAM):
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.exit(130)
