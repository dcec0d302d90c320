"""What tells runs apart: model, setup, work, and where each stands in tables."""

import json
from pathlib import Path
from typing import Any

from tunebench.models.presets import PRESETS
from tunebench.record import Record
from tunebench.report.rounds import flags_of, out_of

METHODS = {"lora": "LoRA", "full": "Finetune"}


def setup_of(record: Record) -> str:
    """How a run was split and computed, in the words of the published record."""
    return ", ".join([*split_of(record), f"{record.setup.dtype} {record.setup.amp or ''}".strip()])


def model_of(record: Record) -> tuple[str, str]:
    """Family and name; of a run whose checkpoint was never read, by its flags."""
    if record.model is not None:
        return record.model.family, record.model.name
    name = flags_of(record).get("--model", "unknown")
    return (PRESETS[name].config["model_type"] if name in PRESETS else "other"), Path(name).name


def rank_of(model: str) -> tuple[int, str]:
    """Where a model stands in tables: presets in their order, then others by name."""
    presets = list(PRESETS)
    return presets.index(model) if model in presets else len(presets), model


def group_of(record: Record) -> tuple[Any, ...]:
    """What rows and comparisons stand together by: family, model, method, GPUs and batch size."""
    return (*model_of(record), record.method, record.devices, record.setup.bsz)


def place_of(group: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where a group stands in tables."""
    return group[0], rank_of(group[1]), list(METHODS).index(group[2]), group[3:]


def attempt_of(record: Record) -> tuple[Any, ...]:
    """What was tried: the setup, the commit and the command but for what changes from round to round."""
    out = out_of(record)
    words = (w for w in record.argv if w not in ("--out", out, f"--out={out}") and not w.startswith("--plan-seed"))
    return setup_of(record), record.git.revision, *words


def split_of(record: Record) -> list[str]:
    """The same but for the precision."""
    setup = record.setup
    replicas = record.devices // setup.mp
    parts = [f"MP {setup.mp}"] * (setup.mp > 1) + [f"ZeRO {setup.zero}"] * (setup.zero > 0)
    parts += [f"DP {replicas}"] * (replicas > 1 and not setup.zero)
    parts += [f"{setup.micro_bsz * replicas}*{setup.accumulation}"] * (setup.accumulation > 1)
    parts += ["recompute"] * setup.recompute
    parts += [f"packed {setup.packing}"] * (setup.packing > 0) + ["grouped"] * (setup.order == "grouped")
    if setup.tuned:
        return [*parts, "tuned"]
    parts += ["padding-free"] * (setup.padding_free and not setup.packing)
    parts += ["labels only"] * (setup.head == "labels") + ["lean"] * setup.lean + ["compiled"] * setup.compile
    parts += ["memory kept"] * setup.keep_memory
    return parts + [f"{setup.attention} attention"] * (setup.attention != "eager")


def work_of(record: Record) -> dict[str, Any]:
    """What must be equal for two runs to have done the same work on the same machine."""
    plan, model, steps, hardware = record.plan, record.model, record.steps, record.hardware
    return {
        # Rounds have batches of their own, drawn from the same samples.
        "plan.drawn_from" if plan and plan.drawn_from else "plan.sha256": plan and (plan.drawn_from or plan.sha256),
        "model.parameters": model and model.parameters,
        "model.trainable_parameters": model and model.trainable_parameters,
        "model.config_sha256": model and model.config_sha256,
        "model.weights_sha256": model and model.weights_sha256,
        "setup.nnodes": record.setup.nnodes,
        "setup.dtype": record.setup.dtype,
        "setup.amp": record.setup.amp,
        "steps": steps and len(steps.seconds),
        "timed_from": record.timed_from,
        "git.revision": record.git.revision,
        "git.changes": record.git.changes,
        "hardware.device": hardware.device,
        **{f"hardware.{name}": value for name, value in hardware.lasting().items()},
    }


def differences(paddle: Record, torch: Record) -> list[str]:
    """Why two runs did not do the same work: each differing field with both values; empty when they did."""
    ours, theirs = work_of(paddle), work_of(torch)
    fields = dict.fromkeys((*ours, *theirs))
    return [
        f"{field}: {_short(ours.get(field))} ≠ {_short(theirs.get(field))}"
        for field in fields
        if ours.get(field) != theirs.get(field)
    ]


def as_key(value: Any) -> str:
    """A value as text, equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
