"""Fine-tunes every parameter of a language model with PaddlePaddle: PaddleNLP's model, paddle's AdamW.

    python paddle/finetune_full.py --model llama-tiny --bsz 8

The loop in `main` is all that is timed. One JSON record is written; summarize.py joins it with Torch's.
"""

import pathlib
import runpy

BOOTSTRAP = pathlib.Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter"]("paddle")

from tunebench.checkpoint import Checkpoint
from tunebench.flags import Flags
from tunebench.hardware import peak_resident_bytes
from tunebench.optimizer import BETAS, EPSILON, WEIGHT_DECAY
from tunebench.plan import MicroBatch
from tunebench.run import Run, read_job, recorded

FRAMEWORK, METHOD = "paddle", "full"
JOB = read_job(FRAMEWORK, METHOD)  # flags, checkpoint, batch plan; before the slow imports it refuses or starts workers

import attention
import built
import compute
import head
import lean
import paddle
import parallel
import precision
import weights
from paddlenlp import transformers

GPU = paddle.device.cuda.device_count() > 0


def build_model(flags: Flags, checkpoint: Checkpoint, group: parallel.Group) -> paddle.nn.Layer:
    """The checkpoint as PaddleNLP's model, with every parameter trainable."""
    config = weights.read_config(checkpoint)
    attention.configure(flags, config)
    config.use_cache = False
    for name, value in parallel.slicing(group).items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=flags.weights_dtype)
    weights.load(model, checkpoint)
    attention.fuse(flags, model)
    head.fuse(flags, model)
    lean.fuse(flags, model)
    precision.autocast_forward(flags, model)
    if flags.recompute:
        model.config.recompute = True
        model.recompute_enable()
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


def to_device(batch: MicroBatch) -> tuple[dict[str, paddle.Tensor], paddle.Tensor]:
    """What the model is given and the shifted labels, each (micro_bsz, width); without padding (1, tokens)."""
    attention.expect(batch)
    head.expect(batch)
    lean.expect(batch)
    names = ("input_ids", "position_ids") if batch.lengths else ("input_ids", "attention_mask")
    inputs = {name: paddle.to_tensor(getattr(batch, name)) for name in names}
    return inputs, paddle.to_tensor(batch.labels)


def synchronize() -> None:
    """Waits until the device has done all that it was given, on every process."""
    if GPU:
        paddle.device.synchronize()
    parallel.barrier()


def peak_memory_bytes() -> int:
    """The most memory held: by tensors on a GPU, by the whole process on a CPU."""
    if GPU:
        return paddle.device.cuda.max_memory_allocated()
    return peak_resident_bytes()


def main(run: Run) -> None:
    flags, checkpoint, plan = run.flags, run.checkpoint, run.plan
    group = parallel.join(flags, run.world)
    paddle.seed(flags.seed)
    model = build_model(flags, checkpoint, group)
    trainable = [p for p in model.parameters() if not p.stop_gradient]
    name = paddle.device.cuda.get_device_name() if GPU else "cpu"
    matmul_flops = compute.matmul_flops(flags, synchronize)
    run.describe(name, parallel.count(model.parameters(), group), parallel.count(trainable, group), built.read(model))
    compute.watch(model, run.check_kernels)
    model, optimizer = wrap(flags, model, trainable, group)

    run.start(synchronize)
    for step in range(plan.steps):
        loss = 0.0
        for last, batch in plan.micro_batches(step, flags.micro_bsz, group.replica, group.replicas):
            parallel.sync_gradients(model, last, group)
            inputs, labels = to_device(batch)
            logits = model(**inputs)[0]
            micro_loss = parallel.sum_of_losses(logits, labels, group) / plan.label_tokens(step)
            parallel.backward(model, micro_loss, group)
            loss += micro_loss.detach()
        grad_norm = parallel.update(model, optimizer, trainable, group)
        run.end_step(loss, grad_norm)
    measured = (parallel.gather(value, group) for value in (peak_memory_bytes(), matmul_flops))
    run.finish(parallel.sum_over_replicas(run.losses, group), *measured)


if __name__ == "__main__":
    with recorded(FRAMEWORK, METHOD, JOB) as run:
        main(run)
