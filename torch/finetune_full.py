"""Fine-tunes every parameter of a language model with PyTorch: transformers' model, torch's AdamW.

    python torch/finetune_full.py --model llama-tiny --bsz 8

The loop in `main` is all that is timed. One JSON record is written; summarize.py joins it with Paddle's.
"""

import pathlib
import runpy
from typing import Any

BOOTSTRAP = pathlib.Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter_environment"]("torch")

from tunebench.flags import Flags
from tunebench.forecast.report import answer, say
from tunebench.models.checkpoint import Checkpoint
from tunebench.plan import MicroBatch
from tunebench.recipe import BETAS, EPSILON, WEIGHT_DECAY
from tunebench.run.run import Run, recorded
from tunebench.run.start import importing, start_run

FRAMEWORK, METHOD = "torch", "full"
# Flags, checkpoint and batch plan. It refuses bad input, and starts the workers of several, before the slow imports.
JOB = start_run(FRAMEWORK, METHOD)

with importing(FRAMEWORK, METHOD, JOB):
    import attention
    import built
    import compiling
    import device
    import kernels_seen
    import losses
    import numpy as np
    import parallel
    import precision
    import profiling
    import torch
    import weights


def build_model(flags: Flags, checkpoint: Checkpoint, group: parallel.Group) -> torch.nn.Module:
    """The checkpoint as transformers' model, with every parameter trainable."""
    config = weights.read_config(checkpoint)
    config.use_cache = False
    with parallel.loading_arguments(flags, checkpoint) as arguments:
        model = weights.load(
            config,
            checkpoint,
            dtype=getattr(torch, flags.weights_dtype),
            attn_implementation=attention.implementation(flags, checkpoint),
            **arguments,
        )
    parallel.take_heads(model, group)
    attention.use_one_kernel(flags, model)
    losses.sum_in_head(flags, model)
    precision.autocast_forward(flags, model, group.device)
    if flags.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiling.compile_layers(flags, model)
    return parallel.place(flags, model, group).train()


def wrap(
    flags: Flags, model: torch.nn.Module, trainable: list[torch.nn.Parameter], group: parallel.Group
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, fused as transformers has it by default, as they run on several processes."""
    optimizer = torch.optim.AdamW(
        parallel.optimizer_groups(trainable), flags.lr, BETAS, EPSILON, WEIGHT_DECAY, fused=True
    )
    return parallel.wrap(flags, model, optimizer, group)


def to_device(flags: Flags, batch: MicroBatch, device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """What the model is given and the shifted labels, each (micro_bsz, width); without padding (1, tokens)."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    inputs = {"input_ids": tensor(batch.input_ids)}
    if flags.padding_free:
        inputs["position_ids"] = tensor(batch.position_ids)
        inputs["samples"] = attention.Samples(batch.lengths, device)
    else:
        inputs["attention_mask"] = tensor(batch.attention_mask)
    if flags.head == "labels":
        inputs |= {"labelled": tensor(batch.labelled), "targets": tensor(batch.targets)}
    return inputs, tensor(batch.labels)


def main(run: Run) -> None:
    flags, checkpoint, plan = run.flags, run.checkpoint, run.plan
    group = parallel.join(flags, run.world)
    torch.manual_seed(flags.seed)
    model = build_model(flags, checkpoint, group)
    trainable = [p for p in model.parameters() if p.requires_grad]
    matmul_flops = device.matmul_flops(flags)
    parameters = (parallel.count(each, group) for each in (model.parameters(), trainable))
    run.describe(device.name(), *parameters, built.read(model))
    kernels_seen.watch(model, run.check_kernels)
    model, optimizer = wrap(flags, model, trainable, group)
    device.reset_peak_memory()

    run.start(device.synchronize)
    for step in run.steps(device.peak_memory_bytes, profiling.tracer(model)):
        loss = 0.0
        for last, batch in plan.micro_batches(step, flags.micro_bsz, group.replica, group.replicas):
            parallel.sync_gradients(model, last, group)
            inputs, labels = to_device(flags, batch, group.device)
            outputs = model(**inputs)
            micro_loss = losses.total(flags, outputs, labels, group) / plan.label_tokens(step)
            parallel.backward(model, micro_loss, group)
            loss += micro_loss.detach()
        grad_norm = parallel.update(model, optimizer, trainable, group)
        run.end_step(loss, grad_norm)
    measured = (parallel.gather(value, group) for value in (run.peak_memory_bytes, matmul_flops))
    profiles = parallel.gather_objects(run.profile, group) if flags.profile else []
    run.finish(parallel.sum_over_replicas(run.meter.losses, group), *measured, profiles)


if __name__ == "__main__" and JOB.flags.plan:
    from forecast import forecast

    say(answer(FRAMEWORK, METHOD, JOB, lambda job: forecast(job, build_model, wrap, to_device)), JOB.flags.out)
elif __name__ == "__main__":
    with recorded(FRAMEWORK, METHOD, JOB) as run:
        main(run)
