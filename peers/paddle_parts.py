"""What the peers on Paddle's Trainers share, PaddleNLP's and PaddleFormers'."""

from typing import Any

import common
import paddle
import tokenizers


class Rows(paddle.io.Dataset):
    """The plan's rows, with shifted labels for the Trainers' criterion. `positions` adds position ids."""

    def __init__(self, job: common.Job, positions: bool = False) -> None:
        self.rows = []
        for sample in job.samples:
            row = {"input_ids": sample.tokens, "labels": [*sample.labels[1:], common.IGNORED]}
            self.rows.append(row | {"position_ids": list(range(len(sample.tokens)))} if positions else row)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


def lora_settings(job: common.Job) -> dict[str, Any]:
    """The arguments of both libraries' LoRAConfig."""
    targets = [f".*{name}.*" for name in job.lora_targets]
    return {
        "r": job.lora_r,
        "lora_alpha": job.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "dtype": "float32",
    }


def words(job: common.Job) -> tokenizers.Tokenizer:
    """A tokenizer of the checkpoint's size. It never encodes text."""
    known = {f"<{token}>": token for token in range(job.config["vocab_size"])}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<0>"))


def counts(model: paddle.nn.Layer) -> tuple[int, int]:
    """The parameters without adapters, and the trained ones."""
    named = [(name, int(each.size), not each.stop_gradient) for name, each in model.named_parameters()]
    base = sum(size for name, size, _ in named if "lora_" not in name)
    return base, sum(size for _, size, trained in named if trained)
