"""Fine-tunes with TRL's SFTTrainer, without padding.

    .venv/peers/bin/python -P peers/with_trl.py JOB.json

`trl-packed` packs samples by best fit into rows, one row per step; `trl-padding-free` writes the samples of a batch one
after the other. Either way transformers keeps attention within the samples by their positions.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("trl", "transformers", "torch", "accelerate", "peft", "datasets")
JOB = common.read_job(("trl-packed", "trl-padding-free"), "peers", PACKAGES)

import hf
import trl


def main(job: common.Job) -> None:
    packed = job.peer == "trl-packed"
    meter = common.Meter(job)
    with common.scratch() as folder:
        arguments = trl.SFTConfig(
            per_device_train_batch_size=1 if packed else job.bsz,
            packing=packed,
            packing_strategy="bfd",
            max_length=job.row_tokens if packed else None,
            padding_free=not packed,
            train_sampling_strategy="sequential" if job.in_order else "random",
            gradient_checkpointing=False,  # TRL's default is True
            **hf.arguments(job, folder),
        )
        trainer = trl.SFTTrainer(
            hf.load_model(job),
            arguments,
            train_dataset=hf.dataset(job),
            processing_class=hf.tokenizer(job),
            peft_config=hf.lora_config(job) if job.lora else None,
            callbacks=[hf.Watch(meter)],
        )
        trainer.train()
    layout = f"packed by best fit into rows of {job.row_tokens}" if packed else "padding-free"
    attention = f"{trainer.model.config._attn_implementation} attention, masked by positions"
    setup = f"{arguments.train_sampling_strategy} sampling, {layout}, {attention}, {arguments.optim.value}"
    meter.write(*hf.counts(trainer.model), PACKAGES, setup)


if __name__ == "__main__":
    main(JOB)
