"""Fine-tunes with torchtune's recipes for one device, full_finetune_single_device and lora_finetune_single_device.

    .venv/torchtune/bin/python -P peers/with_torchtune.py JOB.json

`torchtune` draws samples at random and pads to the longest of the batch; `torchtune-packed` packs them in order into
rows, one row per step. What the recipes' configs name `__main__.…` is here.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

PACKAGES = ("torchtune", "torchao", "torch")
JOB = common.read_job(("torchtune", "torchtune-packed"), "torchtune", PACKAGES)
METER = common.Meter(JOB)

import runpy
from functools import partial
from importlib.util import find_spec
from typing import Any

import omegaconf
import torch
from torchtune.datasets import PackedDataset
from torchtune.training.metric_logging import DiskLogger

# The recipes are installed beside torchtune as files to run; importing them is forbidden by their __init__.py.
RECIPES = pathlib.Path(find_spec("recipes").origin).parent


class Done(Exception):
    """The job's steps are done: a recipe counts in epochs."""


class Tokenizer:
    """What a recipe asks of its tokenizer where the data are tokens already."""

    pad_id = JOB.pad_id


class Rows(torch.utils.data.Dataset):
    """The plan's rows."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": JOB.samples[index].tokens, "labels": JOB.samples[index].labels}

    def __len__(self) -> int:
        return len(JOB.samples)


def rows(tokenizer: Tokenizer, packed: bool) -> torch.utils.data.Dataset:
    """The data set of a recipe's config."""
    return PackedDataset(Rows(), max_seq_len=JOB.row_tokens, padding_idx=tokenizer.pad_id) if packed else Rows()


def constant(optimizer: torch.optim.Optimizer, num_training_steps: int, last_epoch: int) -> Any:
    """A schedule for the LoRA recipe, which cannot do without."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


class Logger(DiskLogger):
    """The recipes' default logger, which they call at the end of every step, telling the meter too."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        super().log_dict(payload, step)
        METER.losses.append(payload["loss"])
        METER.grad_norms.append(payload["grad_norm"])
        METER.end_step()
        if step == JOB.steps:
            raise Done


def configuration(job: common.Job, folder: pathlib.Path) -> omegaconf.DictConfig:
    """A recipe's config: torchtune's for Llama 2, with the job's numbers."""
    shape = job.config
    builder = "lora_llama2" if job.lora else "llama2"
    model = {
        "_component_": f"torchtune.models.llama2.{builder}",
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "max_seq_len": shape["max_position_embeddings"],
        "intermediate_dim": shape["intermediate_size"],
        "norm_eps": shape["rms_norm_eps"],
    }
    if job.lora:
        model |= {"lora_attn_modules": job.lora_targets, "apply_lora_to_mlp": False}
        model |= {"lora_rank": job.lora_r, "lora_alpha": job.lora_alpha, "lora_dropout": 0.0}
    packed = job.peer == "torchtune-packed"
    return omegaconf.OmegaConf.create(
        {
            "output_dir": str(folder),
            "tokenizer": {"_component_": "__main__.Tokenizer"},
            "dataset": {"_component_": "__main__.rows", "packed": packed},
            "seed": job.seed,
            "shuffle": not job.in_order,
            "model": model,
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": str(job.checkpoint),
                "checkpoint_files": sorted(file.name for file in job.checkpoint.glob("*.safetensors")),
                "output_dir": str(folder),
                "model_type": "LLAMA2",
            },
            "resume_from_checkpoint": False,
            "batch_size": 1 if packed else job.bsz,
            "epochs": job.steps,  # enough, whatever the number of rows
            "optimizer": {
                "_component_": "torch.optim.AdamW",
                "fused": True,
                "lr": job.lr,
                "weight_decay": common.WEIGHT_DECAY,
            },
            "optimizer_in_bwd": False,
            **({"lr_scheduler": {"_component_": "__main__.constant"}} if job.lora else {}),
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "max_steps_per_epoch": None,
            "gradient_accumulation_steps": 1,
            "clip_grad_norm": common.MAX_GRAD_NORM,
            "compile": False,
            "device": "cpu",
            "dtype": "fp32",
            "enable_activation_checkpointing": False,
            "enable_activation_offloading": False,
            "metric_logger": {"_component_": "__main__.Logger", "log_dir": str(folder)},
            "log_every_n_steps": 1,
        }
    )


def counted(collate: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The recipe's own batch, counted."""
    batch = collate(rows)
    METER.count(batch["tokens"], batch["labels"])
    return batch


def main(job: common.Job) -> None:
    file, name = ("lora", "LoRA") if job.lora else ("full", "Full")
    recipe_class = runpy.run_path(str(RECIPES / f"{file}_finetune_single_device.py"))[
        f"{name}FinetuneRecipeSingleDevice"
    ]
    with common.scratch() as folder:
        config = configuration(job, folder)
        recipe = recipe_class(config)
        recipe.setup(config)
        recipe.save_checkpoint = lambda epoch: None
        recipe._dataloader.collate_fn = partial(counted, recipe._dataloader.collate_fn)
        METER.start()
        try:
            recipe.train()
        except Done:
            recipe.cleanup()
    layout = f"packed in order into rows of {job.row_tokens}" if config.dataset.packed else "padded to the longest"
    order = "random sampling" if config.shuffle else "in order"
    setup = f"{order}, {layout}, sdpa attention, fused AdamW, loss in chunks"
    named = list(recipe._model.named_parameters())
    base = sum(parameter.numel() for name, parameter in named if "lora_" not in name)
    trainable = sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
    METER.write(base, trainable, PACKAGES, setup)


if __name__ == "__main__":
    main(JOB)
