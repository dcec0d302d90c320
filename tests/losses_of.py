"""Loss and gradient norm of checkpoints: a line of JSON for each folder named on standard input.

    .venv/torch/bin/python -P tests/losses_of.py torch

With the script's own functions: `refused` before anything is built, `unsupported`, or `loss`, `norm` and `built` of one
batch. Anything else is `error`. Models of some thousand weights take milliseconds, where a run of the script takes
seconds.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def main(framework: str) -> None:
    """Answers until standard input ends."""
    sys.path.insert(0, str(ROOT / framework))
    arguments = ["--model=llama-tiny", "--bsz=2", "--samples=2", "--steps=2", "--warmup-steps=1"]
    sys.argv[:] = ["finetune_full.py", *arguments]
    script = runpy.run_path(str(ROOT / framework / "finetune_full.py"))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = measure(framework, script, Path(json.loads(line)))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


def measure(framework: str, script: dict, folder: Path) -> dict:
    """Builds the model of a checkpoint folder and takes its loss and gradient norm on one padded batch."""
    from tunebench.errors import BadInput
    from tunebench.models.checkpoint import open_checkpoint
    from tunebench.plan import IGNORED, MicroBatch
    from tunebench.run.unsupported import not_offered

    flags, parallel, built = script["JOB"].flags, script["parallel"], script["built"]
    try:
        checkpoint = open_checkpoint(folder)
    except BadInput as refusal:
        return {"refused": str(refusal)}
    if reason := not_offered(framework, "full", flags, checkpoint):
        return {"unsupported": reason}
    if checkpoint.config.get("max_position_embeddings", 12) < 12:
        return {"refused": "the samples are longer than max_position_embeddings"}  # as load_plan says
    generator, shape = np.random.default_rng(0), (2, 12)
    ids = generator.integers(0, checkpoint.config["vocab_size"], shape)
    labels = np.where(np.arange(12) < 4, IGNORED, np.roll(ids, -1, axis=1))
    positions = np.broadcast_to(np.arange(12), shape).copy()
    batch = MicroBatch(ids, positions, np.ones(shape, dtype=np.int64), labels, np.flatnonzero(labels != IGNORED), None)
    group = parallel.join(flags, script["JOB"].world)
    model = script["build_model"](flags, checkpoint, group)
    found = built.read(model)
    if contradiction := found.contradiction(checkpoint.expected):
        return {"error": contradiction}
    inputs, labels = script["to_device"](flags, batch, group.device)
    loss = script["losses"].total(flags, model(**inputs), labels, group)
    loss.backward()
    gradients = [p.grad.numpy().astype(np.float64) for p in model.parameters()]
    norm = float(np.sqrt(sum((gradient**2).sum() for gradient in gradients)))
    return {"loss": float(loss), "norm": norm, "built": found.model_dump()}


if __name__ == "__main__":
    main(sys.argv[1])
