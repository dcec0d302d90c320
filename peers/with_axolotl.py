"""Fine-tunes with axolotl, as `axolotl train` runs it.

    .venv/axolotl/bin/python -P peers/with_axolotl.py JOB.json

It draws samples at random and pads to the longest of the batch, rounded up to a multiple of 64.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("axolotl", "transformers", "torch", "accelerate", "peft", "datasets")
JOB = common.read_job(("axolotl",), "axolotl", PACKAGES)
os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}

from typing import Any

import hf
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.train import execute_training, setup_model_and_trainer
from axolotl.utils.dict import DictDefault


def configuration(job: common.Job, folder: pathlib.Path) -> dict[str, Any]:
    """axolotl's config, as a YAML file would hold it."""
    model = folder / "model"
    model.mkdir()
    hf.tokenizer(job).save_pretrained(common.copy_of_checkpoint(job, model))
    config = {
        "base_model": str(model),
        "datasets": [{"path": "plan", "type": "alpaca"}],  # required, but not read
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": job.config["max_position_embeddings"],
        "sample_packing": False,
        "curriculum_sampling": job.in_order,
        "micro_batch_size": job.bsz,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": job.lr,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch_fused",  # its default
        "adam_beta1": common.BETAS[0],
        "adam_beta2": common.BETAS[1],
        "adam_epsilon": common.EPSILON,
        "weight_decay": common.WEIGHT_DECAY,
        "max_grad_norm": common.MAX_GRAD_NORM,
        "seed": job.seed,
        "attn_implementation": "sdpa",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "float32": True,
        "device": "cpu",
        "use_cpu": True,
        "dataloader_num_workers": 0,  # its default is 1, but batches are counted in this process
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    if job.lora:
        config |= {"adapter": "lora", "lora_r": job.lora_r, "lora_alpha": job.lora_alpha, "lora_dropout": 0.0}
        config["lora_target_modules"] = job.lora_targets
    return config


def main(job: common.Job) -> None:
    meter = common.Meter(job)
    with common.scratch() as folder:
        config = load_cfg(DictDefault(configuration(job, folder)))
        trainer, model, *_ = setup_model_and_trainer(
            config, TrainDatasetMeta(hf.dataset(job), total_num_steps=job.steps)
        )
        trainer.add_callback(hf.Watch(meter))
        execute_training(config, trainer, None)
    order = "in order" if job.in_order else "random sampling"
    attention = model.config._attn_implementation
    setup = f"{order}, padded to the batch's longest in 64s, {attention} attention, {trainer.args.optim.value}"
    meter.write(*hf.counts(model), PACKAGES, setup)


if __name__ == "__main__":
    main(JOB)
