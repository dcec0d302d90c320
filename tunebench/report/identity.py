"""The keys that tell runs apart (model, setup, work), and sort keys for tables."""

import json
from pathlib import Path
from typing import Any

from tunebench.frameworks import other_library
from tunebench.models.presets import PRESETS
from tunebench.record import Record
from tunebench.report.rounds import flags_of, out_of

METHODS = {"lora": "LoRA", "full": "Finetune"}
VARYING = ("--plan-seed", "--until", "--profile=")  # flags that differ between the rounds of one attempt


def setup_of(record: Record) -> str:
    """The words for a run's setup, as in the published record."""
    return ", ".join([*split_of(record), f"{record.setup.dtype} {record.setup.amp or ''}".strip()])


def heading_of(record: Record) -> str:
    """The words for a run's setup in tables, with its library of models where it is not the framework's usual one."""
    library = other_library(record.versions)
    return ", ".join([setup_of(record), *([library] if library else [])])


def model_of(record: Record) -> tuple[str, str]:
    """The model's family and name. Its flags give them where the run did not read a checkpoint."""
    if record.model is not None:
        return record.model.family, record.model.name
    name = flags_of(record).get("--model", "unknown")
    return (PRESETS[name].config["model_type"] if name in PRESETS else "other"), Path(name).name


def rank_of(model: str) -> tuple[int, str]:
    """A sort key for models in tables: presets in their order, then others by name."""
    presets = list(PRESETS)
    return presets.index(model) if model in presets else len(presets), model


def group_of(record: Record) -> tuple[Any, ...]:
    """The key of a group of rows: family, model, method, GPUs and batch size."""
    return (*model_of(record), record.method, record.devices, record.setup.bsz)


def place_of(group: tuple[Any, ...]) -> tuple[Any, ...]:
    """A sort key for groups in tables."""
    return group[0], rank_of(group[1]), list(METHODS).index(group[2]), group[3:]


def attempt_of(record: Record) -> tuple[Any, ...]:
    """The key of an attempt: the setup, the commit, and the command without what changes from round to round."""
    out = out_of(record)
    words = (w for w in record.argv if w not in ("--out", out, f"--out={out}") and not w.startswith(VARYING))
    return heading_of(record), record.git.revision, *words


def split_of(record: Record) -> list[str]:
    """The words of a setup but for the precision."""
    setup = record.setup
    replicas = record.devices // setup.mp
    parts = [f"MP {setup.mp}"] * (setup.mp > 1) + ["sequence parallel"] * setup.sequence_parallel + setup.in_stages
    parts += [f"DP {replicas}"] * (replicas > 1 and not setup.zero)
    parts += [f"{setup.micro_bsz * replicas}*{setup.accumulation}"] * (setup.accumulation > 1)
    parts += ["recompute"] * setup.recompute + ["quick LoRA"] * setup.quick_lora
    parts += ["fused projections"] * setup.fuse_projections
    parts += [f"packed {setup.packing}"] * (setup.packing > 0) + ["grouped"] * (setup.order == "grouped")
    if setup.tuned:
        return [*parts, "tuned"]
    parts += ["padding-free"] * (setup.padding_free and not setup.packing)
    parts += ["labels only"] * (setup.head == "labels") + ["lean"] * setup.lean + ["compiled"] * setup.compile
    parts += ["memory kept"] * setup.keep_memory + ["overlapped"] * setup.overlap
    return parts + [f"{setup.attention} attention"] * (setup.attention != "eager")


def work_of(record: Record) -> dict[str, Any]:
    """The fields that are equal for runs of the same work on the same machine."""
    plan, model, steps, hardware = record.plan, record.model, record.steps, record.hardware
    return {
        # Each round has its own batches of the same samples.
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
    """The fields in which two runs' work differs, with both values. Empty where it is the same."""
    return unequal(work_of(paddle), work_of(torch))


def unequal(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The fields in which two descriptions differ, with both values."""
    fields = dict.fromkeys((*ours, *theirs))
    return [
        f"{field}: {_short(ours.get(field))} ≠ {_short(theirs.get(field))}"
        for field in fields
        if ours.get(field) != theirs.get(field)
    ]


def as_key(value: Any) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
