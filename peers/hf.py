"""Shared by the peers on transformers' Trainer: model, adapters, tokenizer and measurement."""

from collections.abc import Callable
from typing import Any

import datasets
import peft
import tokenizers
import torch
import transformers
from common import BETAS, EPSILON, MAX_GRAD_NORM, WEIGHT_DECAY, Job, Meter

datasets.disable_progress_bars()


class Watch(transformers.TrainerCallback):
    """Gives the meter the steps, batches, losses and gradient norms of all Trainers in this process.

    The loss is the result of the Trainer's training_step, the norm that of its clipping. Nothing is read from the
    device.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        _also(transformers.Trainer, "training_step", meter.losses.append)
        _also(transformers.Trainer, "_clip_grad_norm", meter.grad_norms.append)

    def on_train_begin(self, *_: Any, train_dataloader: torch.utils.data.DataLoader, **__: Any) -> None:
        # accelerate's loader wraps the real one.
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        collate = loader.collate_fn

        def counted(samples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(samples)
            self.meter.count(batch["input_ids"], batch["labels"])
            return batch

        loader.collate_fn = counted
        self.meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.end_step()


def _also(owner: type, name: str, take: Callable[[Any], None]) -> None:
    """Replaces a method by one that also gives its result to `take`."""
    original = getattr(owner, name)

    def method(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        take(result)
        return result

    setattr(owner, name, method)


def load_model(job: Job) -> transformers.PreTrainedModel:
    """The checkpoint in float32, with transformers' default attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32)


def lora_config(job: Job) -> peft.LoraConfig:
    """The configuration of the job's adapters."""
    return peft.LoraConfig(
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=0.0,
        target_modules=job.lora_targets,
        task_type="CAUSAL_LM",
    )


def tokenizer(job: Job) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the checkpoint's size, with the plan's padding and end tokens. It never encodes text."""
    words = {f"<{token}>": token for token in range(job.config["vocab_size"])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>")),
        pad_token=f"<{job.pad_id}>",
        eos_token=f"<{job.config['eos_token_id']}>",
    )


def dataset(job: Job) -> datasets.Dataset:
    """The plan's rows, in order."""
    rows = [{"input_ids": sample.tokens, "labels": sample.labels} for sample in job.samples]
    return datasets.Dataset.from_list(rows)


def arguments(job: Job, folder: Any) -> dict[str, Any]:
    """The TrainingArguments that all peers get. All others keep their defaults."""
    return {
        "output_dir": str(folder),
        "max_steps": job.steps,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": job.seed,
        "use_cpu": True,
        # Some trainers would mix precisions, also on CPUs.
        "bf16": False,
        "fp16": False,
        "save_strategy": "no",
        "report_to": "none",
    }


def counts(model: torch.nn.Module) -> tuple[int, int]:
    """The numbers of parameters without adapters and of trained parameters."""
    named = list(model.named_parameters())
    base = sum(parameter.numel() for name, parameter in named if "lora_" not in name)
    return base, sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
