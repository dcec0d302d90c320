"""Fine-tunes LoRA adapters of a language model with PaddlePaddle: PaddleNLP's model and adapters, paddle's AdamW.

    python paddle/finetune_lora.py --model llama-tiny --bsz 8

The loop in `main` is all that is timed. One JSON record is written; summarize.py joins it with Torch's.
"""

import pathlib
import runpy

BOOTSTRAP = pathlib.Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter"]("paddle")

from tunebench.checkpoint import Checkpoint, lora_a
from tunebench.flags import Flags
from tunebench.optimizer import BETAS, EPSILON, MAX_GRAD_NORM, WEIGHT_DECAY
from tunebench.plan import IGNORED, MicroBatch
from tunebench.presets import LORA_TARGETS
from tunebench.run import Run, read_job, recorded

FRAMEWORK, METHOD = "paddle", "lora"
JOB = read_job(METHOD)  # the flags, the checkpoint and the batch plan; refuses bad input before the slow imports below

import resource

import layer_norm
import paddle
import paddle.nn.functional as F
import weights
from paddle.nn.clip import _squared_l2_norm
from paddlenlp import peft, transformers

GPU = paddle.device.cuda.device_count() > 0


def join_process_group() -> str:
    """The device of this process. One process, for now."""
    return paddle.set_device("gpu" if GPU else "cpu")


def build_model(flags: Flags, checkpoint: Checkpoint) -> paddle.nn.Layer:
    """The checkpoint as PaddleNLP's model, float32, with its LoRA adapters, which alone are trainable."""
    config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder))
    config.use_flash_attention = flags.attention != "eager"
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(config, dtype="float32")
    weights.load(model, checkpoint)
    targets = [f".*{target}" for target in LORA_TARGETS[checkpoint.config["model_type"]]]
    config = peft.LoRAConfig(r=flags.lora_r, lora_alpha=flags.lora_alpha, lora_dropout=0.0, target_modules=targets)
    if flags.recompute:
        model.get_input_embeddings().register_forward_post_hook(require_gradient)
        model.config.recompute = True
        model.recompute_enable()
    model = peft.LoRAModel(model, config)
    model.mark_only_lora_as_trainable()
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_A"):
            start = lora_a(flags.seed, name, tuple(parameter.shape[::-1]))
            parameter.set_value(paddle.to_tensor(start.T))
    model.train()
    return model


def require_gradient(layer: paddle.nn.Layer, inputs: tuple, output: paddle.Tensor) -> None:
    """A hook for the embedding, as peft sets one on the other side: without, PaddleNLP does not recompute layer 0."""
    output.stop_gradient = False


def wrap(flags: Flags, model: paddle.nn.Layer, trainable: list[paddle.Tensor]) -> paddle.optimizer.Optimizer:
    """The optimizer. One process has nothing to shard."""
    layer_norm.mend_frozen_scales(model)
    return paddle.optimizer.AdamW(
        flags.lr, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, weight_decay=WEIGHT_DECAY, parameters=trainable
    )


def to_device(batch: MicroBatch) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Input ids, attention mask and shifted labels as tensors, each (micro_bsz, width)."""
    arrays = (batch.input_ids, batch.attention_mask, batch.labels)
    return tuple(paddle.to_tensor(array) for array in arrays)


def sum_of_losses(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """The sum of the token losses, over the positions that have a label."""
    return F.cross_entropy(
        logits.flatten(0, 1).astype("float32"), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@paddle.no_grad()
def clip_gradients(trainable: list[paddle.Tensor]) -> paddle.Tensor:
    """Scales the gradients to a global norm of at most 1, in place; the norm before that, a scalar.

    As paddle.nn.utils.clip_grad_norm_, but with the kernel of ClipGradByGlobalNorm: on a CPU the other's sums of
    an embedding's gradient are off by more than 1e-4 (tests/test_numerics.py shows it).
    """
    norm = paddle.sqrt(paddle.add_n([_squared_l2_norm(p.grad) for p in trainable]))
    scale = paddle.clip(MAX_GRAD_NORM / (norm + 1e-6), max=1.0)
    for p in trainable:
        p.grad_.multiply_(scale)
    return norm


def synchronize() -> None:
    """Waits until the device has done all that it was given."""
    if GPU:
        paddle.device.synchronize()


def peak_memory_bytes() -> int:
    """The most memory held: by tensors on a GPU, by the whole process on a CPU."""
    if GPU:
        return paddle.device.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(run: Run) -> None:
    flags, checkpoint, plan = run.flags, run.checkpoint, run.plan
    join_process_group()
    paddle.seed(flags.seed)
    model = build_model(flags, checkpoint)
    trainable = [p for p in model.parameters() if not p.stop_gradient]
    name = paddle.device.cuda.get_device_name() if GPU else "cpu"
    run.describe(name, sum(p.size for p in model.parameters()), sum(p.size for p in trainable))
    optimizer = wrap(flags, model, trainable)

    run.start(synchronize)
    for step in range(plan.steps):
        loss = 0.0
        for batch in plan.micro_batches(step, flags.micro_bsz):
            input_ids, attention_mask, labels = to_device(batch)
            logits = model(input_ids=input_ids, attention_mask=attention_mask)[0]
            micro_loss = sum_of_losses(logits, labels) / plan.label_tokens(step)
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = clip_gradients(trainable)
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        run.end_step(loss, grad_norm)
    run.finish(peak_memory_bytes())


if __name__ == "__main__":
    with recorded(FRAMEWORK, METHOD, JOB) as run:
        main(run)
