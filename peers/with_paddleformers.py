"""Fine-tunes with PaddleFormers' Trainer: its own sampler, collator and optimizer.

    .venv/paddleformers/bin/python -P peers/with_paddleformers.py JOB.json

It draws samples at random and pads to the longest of the batch.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("paddlepaddle", "paddleformers", "transformers")
JOB = common.read_job(("paddleformers-trainer",), "paddleformers", ("paddle", "paddleformers"))

from typing import Any

import paddle
import paddle_parts
from paddleformers import peft, trainer, transformers
from paddleformers.data import DataCollatorForSeq2Seq
from paddleformers.transformers.tokenizer_utils import PreTrainedTokenizerFast


class Measured(trainer.Trainer):
    """A Trainer that gives each step's loss to the meter. Its optimizer clips, so there is no gradient norm."""

    meter: common.Meter

    def training_step(self, *arguments: Any, **options: Any) -> paddle.Tensor:
        loss = super().training_step(*arguments, **options)
        self.meter.losses.append(loss.clone())  # the Trainer adds to this tensor in place
        return loss


class Watch(trainer.TrainerCallback):
    """Measures the time of each step."""

    def __init__(self, meter: common.Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.end_step()


def load_model(job: common.Job, folder: pathlib.Path) -> paddle.nn.Layer:
    """The checkpoint in float32, with PaddleFormers' default attention, and its adapters."""
    checkpoint = str(common.copy_of_checkpoint(job, folder))
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.fuse_rms_norm = False  # Paddle's fused kernel is for GPUs alone
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype="float32")
    if job.lora:
        model = peft.LoRAModel(model, peft.LoRAConfig(**paddle_parts.lora_settings(job)))
        model.mark_only_lora_as_trainable()
    return model


def main(job: common.Job) -> None:
    meter = common.Meter(job)
    paddle.set_device("cpu")
    trainer.set_seed(job.seed)
    collator = DataCollatorForSeq2Seq(
        PreTrainedTokenizerFast(tokenizer_object=paddle_parts.words(job), pad_token=f"<{job.pad_id}>")
    )

    def counted(rows: list[dict[str, Any]]) -> dict[str, paddle.Tensor]:
        batch = collator(rows)
        meter.count(batch["input_ids"], batch["labels"])
        return batch

    with common.scratch() as folder:
        model = load_model(job, folder)
        arguments = trainer.TrainingArguments(
            output_dir=str(folder),
            device="cpu",
            per_device_train_batch_size=job.bsz,
            dataloader_shuffle=not job.in_order,
            max_steps=job.steps,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=common.WEIGHT_DECAY,
            max_grad_norm=common.MAX_GRAD_NORM,
            seed=job.seed,
            save_strategy="no",
            report_to=["none"],
            amp_master_grad=False,  # its default, True, is refused in float32
        )
        measured = Measured(
            model=model,
            args=arguments,
            data_collator=counted,
            train_dataset=paddle_parts.Rows(job),
            callbacks=[Watch(meter)],
        )
        measured.meter = meter
        measured.train()
    order = "in order" if job.in_order else "random sampling"
    attention = model.config._attn_implementation
    setup = f"{order}, padded to the batch's longest, {attention} attention, {arguments.optim.value}"
    meter.write(*paddle_parts.counts(model), PACKAGES, setup)


if __name__ == "__main__":
    main(JOB)
