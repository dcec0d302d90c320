"""Fine-tunes with PaddleNLP's Trainer: its own sampler, collator and optimizer.

    .venv/paddle/bin/python -P peers/with_paddlenlp.py JOB.json

`paddlenlp-trainer` draws samples at random and pads to the longest of the batch. `paddlenlp-zero-padding` packs them
greedily into rows with PaddleNLP's own data set, one row per step.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp")
JOB = common.read_job(("paddlenlp-trainer", "paddlenlp-zero-padding"), "paddle", ("paddle", "paddlenlp"))

from typing import Any

import paddle
import paddle_parts
import paddlenlp
from paddlenlp import peft, trainer, transformers
from paddlenlp.datasets import ZeroPaddingMapDataset


class Measured(trainer.Trainer):
    """A Trainer that gives each step's loss to the meter. Its optimizer clips, so there is no gradient norm."""

    meter: common.Meter

    def training_step(self, *arguments: Any, **options: Any) -> paddle.Tensor:
        loss = super().training_step(*arguments, **options)
        self.meter.losses.append(loss.clone())  # the Trainer adds to this tensor in place
        return loss

    def _get_train_sampler(self) -> paddle.io.BatchSampler:
        if not self.meter.job.in_order:
            return super()._get_train_sampler()
        return paddle.io.BatchSampler(self.train_dataset, batch_size=self.args.per_device_train_batch_size)


class Watch(trainer.TrainerCallback):
    """Measures the time of each step."""

    def __init__(self, meter: common.Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.end_step()


def load_model(job: common.Job, folder: pathlib.Path) -> paddle.nn.Layer:
    """The checkpoint in float32, with PaddleNLP's default attention, and its adapters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(common.copy_of_checkpoint(job, folder)), dtype="float32", convert_from_torch=True
    )
    if job.lora:
        model = peft.LoRAModel(model, peft.LoRAConfig(**paddle_parts.lora_settings(job)))
        model.mark_only_lora_as_trainable()
    return model


def main(job: common.Job) -> None:
    packed = job.peer == "paddlenlp-zero-padding"
    meter = common.Meter(job)
    paddle.set_device("cpu")
    trainer.set_seed(job.seed)
    words = transformers.PretrainedTokenizerFast(tokenizer_object=paddle_parts.words(job), pad_token=f"<{job.pad_id}>")
    collator = paddlenlp.data.DataCollatorForSeq2Seq(words)

    def counted(rows: list[dict[str, Any]]) -> dict[str, paddle.Tensor]:
        batch = collator(rows)
        meter.count(batch["input_ids"], batch["labels"])
        return batch

    rows: paddle.io.Dataset = paddle_parts.Rows(job, positions=packed)
    if packed:
        rows = ZeroPaddingMapDataset(rows, words, max_length=job.row_tokens, greedy_zero_padding=True)
    with common.scratch() as folder:
        model = load_model(job, folder)
        arguments = trainer.TrainingArguments(
            output_dir=str(folder),
            device="cpu",
            per_device_train_batch_size=1 if packed else job.bsz,
            max_steps=job.steps,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=common.WEIGHT_DECAY,
            max_grad_norm=common.MAX_GRAD_NORM,
            seed=job.seed,
            save_strategy="no",
            report_to=["none"],
        )
        measured = Measured(
            model=model, args=arguments, data_collator=counted, train_dataset=rows, callbacks=[Watch(meter)]
        )
        measured.meter = meter
        measured.train()
    layout = f"packed greedily into rows of {job.row_tokens}" if packed else "padded to the batch's longest"
    order = "in order" if job.in_order else "random sampling"
    setup = f"{order}, {layout}, eager attention, {arguments.optim.value}"
    meter.write(*paddle_parts.counts(model), PACKAGES, setup)


if __name__ == "__main__":
    main(JOB)
