"""Fine-tunes every parameter of a language model with PyTorch: transformers' model, torch's AdamW.

    python torch/finetune_full.py --model llama-tiny --bsz 8

The loop in `main` is all that is timed. One JSON record is written; summarize.py joins it with Paddle's.
"""

import pathlib
import runpy

BOOTSTRAP = pathlib.Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter"]("torch")

from tunebench.checkpoint import Checkpoint
from tunebench.flags import Flags
from tunebench.hardware import peak_resident_bytes
from tunebench.optimizer import BETAS, EPSILON, WEIGHT_DECAY
from tunebench.plan import MicroBatch
from tunebench.run import Run, read_job, recorded

FRAMEWORK, METHOD = "torch", "full"
JOB = read_job(FRAMEWORK, METHOD)  # flags, checkpoint, batch plan; before the slow imports it refuses or starts workers

import attention
import built
import compiling
import compute
import head
import parallel
import precision
import torch
import weights

GPU = torch.cuda.is_available()


def build_model(flags: Flags, checkpoint: Checkpoint, group: parallel.Group) -> torch.nn.Module:
    """The checkpoint as transformers' model, with every parameter trainable."""
    config = weights.read_config(checkpoint)
    config.use_cache = False
    model = weights.load(
        config,
        checkpoint,
        dtype=getattr(torch, flags.weights_dtype),
        attn_implementation=attention.implementation(flags, checkpoint),
        **parallel.loading(flags, checkpoint),
    )
    parallel.take_heads(model, group)
    attention.fuse(flags, model)
    head.fuse(flags, model)
    precision.autocast_forward(flags, model, group.device)
    if flags.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiling.fuse(flags, model)
    return model.to(group.device).train()


def wrap(
    flags: Flags, model: torch.nn.Module, trainable: list[torch.nn.Parameter], group: parallel.Group
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, fused as transformers has it by default, as they run on several processes."""
    optimizer = torch.optim.AdamW(
        parallel.optimizer_groups(trainable), flags.lr, BETAS, EPSILON, WEIGHT_DECAY, fused=True
    )
    return parallel.wrap(flags, model, optimizer, group)


def to_device(batch: MicroBatch, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model is given and the shifted labels, each (micro_bsz, width); without padding (1, tokens)."""
    attention.expect(batch, device)
    head.expect(batch, device)
    names = ("input_ids", "position_ids") if batch.lengths else ("input_ids", "attention_mask")
    inputs = {name: torch.from_numpy(getattr(batch, name)).to(device) for name in names}
    return inputs, torch.from_numpy(batch.labels).to(device)


def synchronize() -> None:
    """Waits until the device has done all that it was given, on every process."""
    if GPU:
        torch.cuda.synchronize()
    parallel.barrier()


def peak_memory_bytes() -> int:
    """The most memory held: by tensors on a GPU, by the whole process on a CPU."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def main(run: Run) -> None:
    flags, checkpoint, plan = run.flags, run.checkpoint, run.plan
    group = parallel.join(flags, run.world)
    torch.manual_seed(flags.seed)
    model = build_model(flags, checkpoint, group)
    trainable = [p for p in model.parameters() if p.requires_grad]
    name = torch.cuda.get_device_name() if GPU else "cpu"
    matmul_flops = compute.matmul_flops(flags, synchronize)
    run.describe(name, parallel.count(model.parameters(), group), parallel.count(trainable, group), built.read(model))
    compute.watch(model, run.check_kernels)
    model, optimizer = wrap(flags, model, trainable, group)

    run.start(synchronize)
    for step in range(plan.steps):
        loss = 0.0
        for last, batch in plan.micro_batches(step, flags.micro_bsz, group.replica, group.replicas):
            parallel.sync_gradients(model, last, group)
            inputs, labels = to_device(batch, group.device)
            logits = model(**inputs).logits
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
