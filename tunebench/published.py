"""The published record as data: its runs, its tables computed from them, and a run of one's own beside it."""

from tunebench.bootstrap import ROOT
from tunebench.record import Record

FOLDER = ROOT / "results" / "published"
SCHEMA = "published-1"
NOT_AVAILABLE = "N/A"
FAMILIES = {"bloom": "Bloom", "llama": "Llama", "chatglm": "ChatGLM"}
WORK = {"full": "fine-tuning", "lora": "LoRA"}
HEADLINE_COLUMNS = (
    "Model",
    "Method",
    "Num GPUs",
    "Batch Size",
    "Paddle Setup",
    "Paddle Effective Tokens/s",
    "Torch Setup",
    "Torch Effective Tokens/s",
    "Speedup",
)
MULTI_GPU_COLUMNS = ("Model", "Setup", "Paddle Effective Tokens/s", "Torch Effective Tokens/s", "Speedup")
AGAINST_COLUMNS = (
    "Model",
    "Method",
    "Num GPUs",
    "Batch Size",
    "Setup",
    "Framework",
    "Published Effective Tokens/s",
    "Here Setup",
    "Here Effective Tokens/s",
    "Here ÷ Published",
    "Published Speedup",
    "Here Speedup",
)


class Strict(Record.__base__):
    """A part of a published record; unknown fields and other types are an error."""
