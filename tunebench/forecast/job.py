"""Makes the job of a forecast: flags, the model's config and the plan's batches, without weights and without a GPU."""

import socket
from pathlib import Path

from tunebench.flags import HUB, Flags, fit_to_steps
from tunebench.models.checkpoint import Checkpoint, describe_checkpoint
from tunebench.plan import Plan, load_plan, plan_path, read_plan

# Embedded data in place of data sets that cannot be had, and what that changes. tatsu-lab/alpaca: mean of 2,000 of its
# samples in Antelofski/alpaca-lora @4ca2c8b, alpaca_small.json.
STANDS_IN = {
    "alpaca": ("synthetic-en", "its samples have 175 tokens on average, those of alpaca about 81"),
    "guanaco": ("synthetic-zh", "the lengths of guanaco's samples are not known here"),
}
HUB_HOST, HUB_SECONDS = ("huggingface.co", 443), 3.0


def describe(flags: Flags) -> tuple[Flags, Checkpoint, Plan, list[str]]:
    """The checkpoint and the plan of the flags, and remarks on what stands in for what cannot be had.

    Raises `BadInput` where there is no such model or plan.
    """
    checkpoint = describe_checkpoint(flags.model, flags.weights, flags.seed, flags.layers)
    remarks: list[str] = []
    if flags.data in HUB and not is_here(flags, checkpoint):
        stand_in, differs = STANDS_IN[flags.data]
        remarks.append(f"--data {flags.data}: the hub cannot be reached; {stand_in} stands in: {differs}")
        flags = flags.model_copy(update={"data": stand_in})
    plan = load_plan(flags, checkpoint)
    return fit_to_steps(flags, plan.steps), checkpoint, plan, remarks


def is_here(flags: Flags, checkpoint: Checkpoint) -> bool:
    """Whether the plan of a data set of the hub can be had: it is made already, or the data are here or on the hub."""
    try:
        read_plan(plan_path(flags.model_dump(), checkpoint))
        return True
    except FileNotFoundError:
        pass
    if Path(HUB[flags.data]).is_dir():
        return True
    try:
        socket.create_connection(HUB_HOST, timeout=HUB_SECONDS).close()
        return True
    except OSError:
        return False
