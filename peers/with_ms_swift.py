"""Fine-tunes with ms-swift's supervised fine-tuning, as `swift sft` runs it.

    .venv/swift/bin/python -P peers/with_ms_swift.py JOB.json

It draws samples at random and pads to the longest of the batch. The rows are the plan's, in place of a data set that it
would tokenize.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("ms-swift", "transformers", "torch", "accelerate", "peft", "datasets")
JOB = common.read_job(("ms-swift",), "swift", ("swift", *PACKAGES[1:]))
METER = common.Meter(JOB)

from typing import Any

import datasets
import hf
import transformers
from swift.arguments import SftArguments
from swift.pipelines.train.sft import SwiftSft


class Measured(SwiftSft):
    """ms-swift's pipeline, on the plan's rows."""

    def _prepare_dataset(self) -> list[datasets.Dataset | None]:
        return [hf.dataset(JOB), None]

    def train(self, trainer: transformers.Trainer) -> dict[str, Any]:
        trainer.add_callback(hf.Watch(METER))
        return super().train(trainer)


def main(job: common.Job) -> None:
    with common.scratch() as folder:
        model = folder / "model"
        model.mkdir()
        hf.tokenizer(job).save_pretrained(common.copy_of_checkpoint(job, model))
        settings = hf.arguments(job, folder / "out") | {
            "model": str(model),
            "use_hf": True,  # ModelScope's hub would be asked about the model, which takes 10 s without a network
            "model_type": "llama",
            "template": "dummy",  # it would make text of messages
            "torch_dtype": "float32",
            "tuner_type": job.method,
            "dataset": ["plan"],  # required, but not read
            "train_dataloader_shuffle": not job.in_order,
            "dataloader_num_workers": 0,  # its default is 1, but batches are counted in this process
            "gradient_checkpointing": False,
            "per_device_train_batch_size": job.bsz,
            "gradient_accumulation_steps": 1,
            "logging_steps": 5,  # its default
        }
        if job.lora:
            settings |= {"lora_rank": job.lora_r, "lora_alpha": job.lora_alpha, "lora_dropout": 0.0}
            settings["target_modules"] = job.lora_targets
        pipeline = Measured(SftArguments(**settings))
        pipeline.main()
    attention = pipeline.model.config._attn_implementation
    order = "in order" if job.in_order else "random sampling"
    setup = f"{order}, padded to the batch's longest, {attention} attention, {pipeline.args.optim}"
    METER.write(*hf.counts(pipeline.model), PACKAGES, setup)


if __name__ == "__main__":
    main(JOB)
