"""Fine-tunes with LLaMA-Factory's supervised fine-tuning, as `llamafactory-cli train` runs it.

    .venv/llamafactory/bin/python -P peers/with_llamafactory.py JOB.json

It draws samples at random and pads to the longest of the batch, rounded up to a multiple of 8.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("llamafactory", "transformers", "torch", "accelerate", "peft", "datasets")
JOB = common.read_job(("llamafactory",), "llamafactory", PACKAGES)

import importlib.machinery
import types

# LLaMA-Factory imports torchaudio for audio samples. PyPI has no torchaudio for this torch.
torchaudio = types.ModuleType("torchaudio")
torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = torchaudio

from typing import Any

import datasets
import hf
from llamafactory.train.tuner import run_exp


class Watch(hf.Watch):
    """Writes the result when the training ends."""

    def on_train_end(self, arguments: Any, *_: Any, model: Any, **__: Any) -> None:
        attention = model.config._attn_implementation
        layout = "padded to the batch's longest in eights"
        order = "in order" if self.meter.job.in_order else "random sampling"
        setup = f"{order}, {layout}, {attention} attention, {arguments.optim.value}"
        self.meter.write(*hf.counts(model), PACKAGES, setup)


def main(job: common.Job) -> None:
    with common.scratch() as folder:
        model = folder / "model"
        model.mkdir()
        hf.tokenizer(job).save_pretrained(common.copy_of_checkpoint(job, model))
        datasets.DatasetDict(train=hf.dataset(job)).save_to_disk(folder / "tokens")
        settings = hf.arguments(job, folder / "out") | {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(model),
            "finetuning_type": job.method,
            "dataset": "plan",  # required, but not read
            "tokenized_path": str(folder / "tokens"),
            "template": "empty",
            "disable_shuffling": job.in_order,
            "disable_gradient_checkpointing": True,
            "per_device_train_batch_size": job.bsz,
            "gradient_accumulation_steps": 1,
            "logging_steps": 10,  # as in its examples
        }
        if job.lora:
            settings |= {"lora_rank": job.lora_r, "lora_alpha": job.lora_alpha, "lora_dropout": 0.0}
            settings["lora_target"] = ",".join(job.lora_targets)
        run_exp(settings, [Watch(common.Meter(job))])


if __name__ == "__main__":
    main(JOB)
