"""Fine-tunes with transformers' Trainer: its own sampler and collator, its default attention and optimizer.

    .venv/peers/bin/python -P peers/with_transformers.py JOB.json

`hf-trainer` draws samples at random and pads to the longest of the batch; `hf-trainer-grouped` draws samples of about
the same length.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("transformers", "torch", "accelerate", "peft", "datasets")
JOB = common.read_job(("hf-trainer", "hf-trainer-grouped"), "peers", PACKAGES)

import hf
import peft
import transformers


def main(job: common.Job) -> None:
    sampling = "group_by_length" if job.peer == "hf-trainer-grouped" else "sequential" if job.in_order else "random"
    meter = common.Meter(job)
    transformers.set_seed(job.seed)
    model = hf.load_model(job)
    if job.lora:
        model = peft.get_peft_model(model, hf.lora_config(job))
    with common.scratch() as folder:
        arguments = transformers.TrainingArguments(
            per_device_train_batch_size=job.bsz, train_sampling_strategy=sampling, **hf.arguments(job, folder)
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            transformers.DataCollatorForSeq2Seq(hf.tokenizer(job)),
            hf.dataset(job),
            callbacks=[hf.Watch(meter)],
        )
        trainer.train()
    attention = model.config._attn_implementation
    setup = f"{sampling} sampling, padded to the batch's longest, {attention} attention, {arguments.optim.value}"
    meter.write(*hf.counts(model), PACKAGES, setup)


if __name__ == "__main__":
    main(JOB)
