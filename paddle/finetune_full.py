"""Fine-tunes every parameter of a language model with PaddlePaddle: its library's model, paddle's AdamW.

    python paddle/finetune_full.py --model llama-tiny --bsz 8

The loop in `main` is all that is timed. One JSON record is written; summarize.py joins it with Torch's.
"""

import pathlib
import runpy
from typing import Any

BOOTSTRAP = pathlib.Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter_environment"]("paddle")

from tunebench.flags import Flags
from tunebench.forecast.report import answer, say
from tunebench.models.checkpoint import Checkpoint
from tunebench.plan import MicroBatch
from tunebench.recipe import BETAS, EPSILON, WEIGHT_DECAY
from tunebench.run.run import Run, recorded
from tunebench.run.start import importing, start_run

FRAMEWORK, METHOD = "paddle", "full"
# Flags, checkpoint and batch plan. It refuses bad input, and starts the workers of several, before the slow imports.
JOB = start_run(FRAMEWORK, METHOD)

with importing(FRAMEWORK, METHOD, JOB):
    import attention
    import built
    import cpu_kernels
    import device
    import kernels_seen
    import library
    import losses
    import numpy as np
    import paddle
    import parallel
    import precision
    import profiling
    import rms_norm
    import weights


def build_model(flags: Flags, checkpoint: Checkpoint, group: parallel.Group) -> paddle.nn.Layer:
    """The checkpoint as the library's model, with every parameter trainable."""
    config = weights.read_config(checkpoint)
    attention.configure(flags, config)
    config.use_cache = False
    config.fuse_attention_qkv = config.fuse_attention_ffn = flags.fuse_projections
    for name, value in parallel.slicing(flags, group).items():
        setattr(config, name, value)
    model = library.transformers.AutoModelForCausalLM.from_config(config, dtype=flags.weights_dtype)
    weights.load(model, checkpoint)
    attention.use_one_kernel(flags, model)
    parallel.follow_width(flags, model)
    losses.sum_in_head(flags, model)
    cpu_kernels.replace_layers(flags, model)
    rms_norm.use_one_kernel(flags, model)
    precision.autocast_forward(flags, model)
    if flags.recompute:
        library.recompute_layers(model)
    model.train()
    return model


def wrap(
    flags: Flags, model: paddle.nn.Layer, trainable: list[paddle.Tensor], group: parallel.Group
) -> tuple[paddle.nn.Layer, paddle.optimizer.Optimizer]:
    """The model and its optimizer, as they run on several processes."""
    optimizer = paddle.optimizer.AdamW(
        flags.lr,
        *BETAS,
        EPSILON,
        trainable,
        weight_decay=WEIGHT_DECAY,
        grad_clip=group.clip,
        multi_precision=flags.amp == "O2",
    )
    return parallel.wrap(flags, model, optimizer, group)


def to_device(flags: Flags, batch: MicroBatch, device: str) -> tuple[dict[str, Any], paddle.Tensor]:
    """What the model is given and the shifted labels, each (micro_bsz, width); without padding (1, tokens)."""

    def tensor(array: np.ndarray) -> paddle.Tensor:
        return paddle.to_tensor(array, place=device)

    inputs = {"input_ids": tensor(batch.input_ids)}
    if flags.padding_free:
        inputs["position_ids"] = tensor(batch.position_ids)
        inputs["attn_mask_startend_row_indices"] = attention.Samples(batch.lengths, device)
    elif attention.takes_mask(flags):
        inputs["attention_mask"] = tensor(batch.attention_mask)
    if flags.head == "labels":
        inputs |= {"labelled": tensor(batch.labelled), "targets": tensor(batch.targets)}
    return inputs, tensor(batch.labels)


def main(run: Run) -> None:
    flags, checkpoint, plan = run.flags, run.checkpoint, run.plan
    group = parallel.join(flags, run.world)
    paddle.seed(flags.seed)
    model = build_model(flags, checkpoint, group)
    trainable = [p for p in model.parameters() if not p.stop_gradient]
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
