"""Published rates of fine-tuning on A100-80G with NVLink, and the fit of the constants of `speed.py` to them.

Nothing here was measured by this project. The record's rows are read from results/published/, the others stand here.

Left out, with the reason:
- rows of 8 x 4096 tokens with full fine-tuning on 4 GPUs of fms-acceleration: slowed by the allocator near the limit;
- qwen-7b of ms-swift: 4.31 samples/s of 2048 tokens would be more than an A100's peak, so that its samples are shorter;
- rows that ran out of memory, and litgpt's, which have no rate.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tunebench.bootstrap import ROOT
from tunebench.files import write_atomically
from tunebench.forecast.gpus import GPUS, LINKS
from tunebench.forecast.speed import (
    CONSTANTS,
    FITTED_GPU,
    FITTED_LINK,
    Constants,
    Setup,
    Tokens,
    adapter_bytes,
    step_seconds,
)


class Model(NamedTuple):
    """The dimensions of a published model. `key_width` is that of all keys of a token; `lora` its adapted modules.

    `gated`: Llama's feed-forward layer and RMSNorm; otherwise GELU and LayerNorm. `tied`: the head is the embedding.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    key_width: int
    vocabulary: int
    gated: bool
    rotates: bool
    tied: bool
    lora: tuple[tuple[int, int], ...]  # (in, out) of each module of a layer that LoRA adapts


# The dimensions in each model's config.json, and the modules that LoRA adapted in the published runs.
MODELS = {
    "llama-7b": Model(32, 4096, 11008, 32, 4096, 32000, True, True, False, ((4096, 4096),) * 3),
    "llama-13b": Model(40, 5120, 13824, 40, 5120, 32000, True, True, False, ((5120, 5120),) * 3),
    "bloomz-7b1-mt": Model(30, 4096, 16384, 32, 4096, 250880, False, False, True, ((4096, 12288),)),
    "chatglm-6b": Model(28, 4096, 16384, 32, 4096, 130528, False, True, True, ((4096, 12288),)),
    "mistral-7b": Model(32, 4096, 14336, 32, 1024, 32000, True, True, False, ((4096, 4096),) * 2 + ((4096, 1024),) * 2),
    "llama-3-8b": Model(
        32, 4096, 14336, 32, 1024, 128256, True, True, False, ((4096, 4096),) * 2 + ((4096, 1024),) * 2
    ),
}


class Batches(NamedTuple):
    """Means over the batches of so many samples: `effective` and `labels` tokens, the longest sample, its square."""

    effective: float
    labels: float
    width: float
    squared_width: float


# The record has no lengths. Alpaca's are of 2,000 of its records (Antelofski/alpaca-lora @4ca2c8b, alpaca_small.json),
# in random batches: 81 tokens in the mean, counted in pieces of data/synthetic.py, and 8% more for a vocabulary of
# 32,000. This project's synthetic-en has 175 tokens a sample: it follows answers of GPT-4, which are longer.
# ZeRO pads each rank's share by itself. All ranks wait for the longest, so that the batch's longest counts there too.
ALPACA = {
    4: Batches(323.3, 251.1, 147.6, 26674),
    8: Batches(646.5, 502.3, 185.1, 39498),
    16: Batches(1293.1, 1004.6, 224.3, 55548),
}
# How much longer guanaco_belle_merge's samples are. It is not known: ten of them (Facico/Chinese-Vicuna @ee631d6,
# sample/merge_sample.json) say about 1.25, the rates of all its rows together about 1.5.
GUANACO = 1.4


def lengths(data: str, bsz: int) -> Batches:
    """The lengths of the batches of `data`, `alpaca` or `guanaco`."""
    of, by = ALPACA[bsz], GUANACO if data == "guanaco" else 1.0
    return Batches(by * of.effective, by * of.labels, by * of.width, by**2 * of.squared_width)


@dataclass(frozen=True)
class Point:
    """One published rate. `tokens_per_second` are effective ones of all GPUs.

    `bsz` counts the samples of a step on all GPUs, in `accumulation` passes. `length` is that of packed rows, or 0 for
    the samples of `data`. `states`: `O1` autocast over float32 weights, `O2` low-precision weights with float32
    masters, `pure` everything in two bytes.
    """

    source: str
    framework: str
    model: str
    method: str
    gpus: int
    bsz: int
    tokens_per_second: float
    states: str
    length: int = 0
    data: str = ""
    zero: int = 0
    mp: int = 1
    accumulation: int = 1
    recompute: bool = False
    flash: bool = False
    fused: bool = False  # norms, rotary embedding and loss are one kernel each


RECORD = "record"  # PaddlePaddle/PaddleNLP @025a7c5f93, examples/benchmark/peft/README.md; chatglm-6b: a later revision
FMS = "fms"  # foundation-model-stack/fms-acceleration @876e2ed, scripts/benchmarks/refs: FSDP, bf16, torch 2.4.1
PRETRAIN = "pretrain"  # PaddlePaddle/PaddleNLP, llm/docs/pretrain.rst: bf16 O2, TP 2, sharding 4 at stage 2, fused
CHECKED = (PRETRAIN,)  # not fitted to: the flags cannot express its split, and its accumulation is not told
RECORD_FOLDER = "results/published"

# What the constants are expected to be before any data, and by which factor that may be wrong (one sigma).
EXPECTED = Constants(0.65, 0.6, 0.05, 10e-6)
DOUBT = Constants(1.25, 1.5, 2.5, 1.5)
NOISE = 1.1  # one sigma of a point's rate
COVERED = 0.9  # of the points that the constants were not fitted to

# (model, method, fused kernels, GPUs, rows of 4096 tokens per GPU, tokens/s per GPU)
_FMS: tuple[tuple[str, str, bool, int, int, float], ...] = (
    ("mistral-7b", "full", False, 1, 4, 3063),
    ("mistral-7b", "full", False, 1, 8, 3143),
    ("mistral-7b", "full", True, 1, 4, 3447),
    ("mistral-7b", "full", True, 1, 8, 3547),
    ("mistral-7b", "lora", False, 1, 4, 3324),
    ("mistral-7b", "lora", False, 1, 8, 3354),
    ("mistral-7b", "lora", True, 1, 4, 3781),
    ("mistral-7b", "lora", True, 1, 8, 3807),
    ("llama-3-8b", "full", True, 1, 4, 3288),
    ("llama-3-8b", "lora", True, 1, 4, 3829),
    ("llama-3-8b", "lora", True, 1, 4, 3844),
    ("llama-3-8b", "lora", True, 1, 16, 3892),
    ("llama-3-8b", "full", True, 2, 4, 2627),
    ("llama-3-8b", "lora", True, 2, 4, 3593),
    ("llama-3-8b", "lora", True, 2, 4, 3611),
    ("llama-3-8b", "lora", True, 2, 16, 3736),
    ("llama-3-8b", "full", True, 4, 4, 3202),
    ("llama-3-8b", "full", True, 4, 4, 3199),
    ("llama-3-8b", "full", True, 4, 16, 3423),
    ("llama-3-8b", "lora", True, 4, 8, 3701),
    ("llama-3-8b", "lora", True, 4, 8, 3721),
    ("mistral-7b", "full", True, 1, 8, 3517),
    ("mistral-7b", "lora", True, 1, 4, 3905),
    ("mistral-7b", "lora", True, 1, 16, 3951),
    ("mistral-7b", "full", True, 2, 8, 3414),
    ("mistral-7b", "lora", True, 2, 8, 3747),
    ("mistral-7b", "lora", True, 4, 4, 3674),
    ("mistral-7b", "lora", True, 4, 16, 3827),
)


def points() -> list[Point]:
    """All points, in a fixed order."""
    found = [_of_record(json.loads(file.read_text())) for file in sorted((ROOT / RECORD_FOLDER).glob("*.json"))]
    found = [point for point in found if point.tokens_per_second]
    for model, method, fused, gpus, rows, rate in _FMS:
        zero = 3 if gpus > 1 else 0
        found.append(
            Point(
                *(FMS, "torch", model, method, gpus, rows * gpus, rate * gpus, "pure"),
                length=4096,
                zero=zero,
                recompute=True,
                flash=True,
                fused=fused,
            )
        )
    found.append(
        Point(
            *(PRETRAIN, "paddle", "llama-7b", "full", 8, 4, 3754.73 * 8, "O2"),
            length=4096,
            zero=2,
            mp=2,
            flash=True,
            fused=True,
        )
    )
    return found


def _of_record(run: dict[str, Any]) -> Point:
    """A file of results/published/ as a point. Its rate is 0 where the run ran out of memory.

    The record says AMP for all Torch runs. Its ds_config_stage3.json (@7ffcc5b) asks DeepSpeed for fp16, which makes
    the weights fp16: O2. Autocast over float32 weights is left to runs without ZeRO.
    """
    return Point(
        source=RECORD,
        framework=run["framework"],
        model=run["model"],
        method=run["method"],
        gpus=run["num_gpus"],
        bsz=run["bsz"],
        tokens_per_second=run["effective_tokens_per_second"] or 0.0,
        states="O2" if run["framework"] == "paddle" or run["setup"]["zero"] else "O1",
        data="alpaca" if "alpaca" in run["data"] else "guanaco",
        **run["setup"],
    )


def setup_of_point(point: Point) -> tuple[Setup, Tokens]:
    """The setup and the tokens of a published point. Those of the record are guessed: `lengths`."""
    m: Model = MODELS[point.model]
    width = m.hidden
    layer = 2 * m.hidden * width + 2 * m.hidden * m.key_width + (3 if m.gated else 2) * m.hidden * m.inner
    parameters = m.layers * layer + m.vocabulary * m.hidden * (1 if m.tied else 2)
    lora, rank = point.method == "lora", 16 if point.source == FMS else 8
    setup = Setup(
        **{name: getattr(m, name) for name in ("layers", "hidden", "inner", "heads", "key_width", "vocabulary")},
        width=width,
        gated=m.gated,
        rotates=m.rotates,
        products=m.layers * layer,
        parameters=parameters,
        trained=m.layers * sum(rank * sum(shape) for shape in m.lora) if lora else parameters,
        tensors=m.layers * (2 * len(m.lora) if lora else 9),
        modules=len(m.lora) if lora else 0,
        adapters=adapter_bytes(m.lora) if lora else 0,
        gpus=point.gpus,
        per_node=point.gpus,
        zero=point.zero,
        mp=point.mp,
        passes=point.accumulation,
        states=point.states,
        recompute=point.recompute,
        eager=not point.flash,
        whole_logits=point.source == RECORD and point.mp > 1,  # its script left tensor_parallel_output out
        fused=point.fused,
    )
    rows = point.bsz * point.mp // point.gpus // point.accumulation
    if point.length:
        padded, total = rows * point.length, float(point.bsz * point.length)
        return setup, Tokens(padded, rows * point.length**2, total, padded)
    batch, longest = lengths(point.data, point.bsz), lengths(point.data, point.bsz // point.accumulation)
    labels = batch.labels * rows / point.bsz
    return setup, Tokens(rows * longest.width, rows * longest.squared_width, batch.effective, labels)


def errors(points: Sequence[Point]) -> Callable[[Constants], np.ndarray]:
    """A function of the constants: log(seconds forecast / published) of each point."""
    gpu, link = GPUS[FITTED_GPU], LINKS[FITTED_LINK]
    known = [(*setup_of_point(point), point.tokens_per_second) for point in points]

    def of(constants: Constants) -> np.ndarray:
        return np.array(
            [math.log(step_seconds(constants, s, t, gpu, link) * rate / t.effective) for s, t, rate in known]
        )

    return of


def fit(points: Sequence[Point]) -> Constants:
    """The likeliest constants: least squares of the logarithms, with EXPECTED and DOUBT, by Gauss-Newton's method."""
    start, doubt = np.log(EXPECTED), np.log(DOUBT)
    of, noise = errors(points), math.log(NOISE)

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([of(Constants(*np.exp(x))) / noise, (x - start) / doubt])

    x, damping = start.copy(), 1.0
    for _ in range(60):
        now, step = residuals(x), 1e-5
        slopes = np.stack([(residuals(x + step * each) - now) / step for each in np.eye(len(x))], axis=1)
        normal = slopes.T @ slopes
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slopes.T @ now)
        better = np.sum(residuals(x + move) ** 2) < np.sum(now**2)
        x, damping = (x + move, damping / 3) if better else (x, damping * 4)
        if better and np.max(np.abs(move)) < 1e-7:
            break
    return Constants(*(float(f"{value:.6g}") for value in np.exp(x)))


def left_out(points: Sequence[Point]) -> np.ndarray:
    """The error of each point with the constants that are fitted to the others."""
    others = [[other for other in points if other is not point] for point in points]
    return np.array([errors([point])(fit(rest))[0] for point, rest in zip(points, others, strict=True)])


def share_errors(logarithms: np.ndarray) -> dict[str, float]:
    """The median and the largest error of rates, as shares of the published ones."""
    shares = np.abs(np.exp(-logarithms) - 1)
    return {"median": round(float(np.median(shares)), 4), "largest": round(float(np.max(shares)), 4)}


def covering(logarithms: np.ndarray) -> float:
    """The half width that covers COVERED of further points like these: of n, the ceil(COVERED x (n + 1))th smallest."""
    rank = min(math.ceil(COVERED * (len(logarithms) + 1)), len(logarithms))
    return float(np.sort(np.abs(logarithms))[rank - 1])


def summary(framework: str) -> dict[str, Any]:
    """The fit of a framework: constants, errors by source, and the factor of the interval, that of the worst source."""
    every = [point for point in points() if point.framework == framework]
    used = [point for point in every if point.source not in CHECKED]
    constants, without = fit(used), left_out(used)
    within, half, sources = errors(used)(constants), 0.0, {}
    for source in dict.fromkeys(point.source for point in used):
        rows = [i for i, point in enumerate(used) if point.source == source]
        own = covering(without[rows])
        half = max(half, own)
        sources[source] = {
            "rows": len(rows),
            "in_sample": share_errors(within[rows]),
            "left_out": share_errors(without[rows]),
            "factor": round(math.exp(own), 4),
        }
    checked = {point.source: share_errors(errors([point])(constants)) for point in every if point.source in CHECKED}
    return {
        "constants": constants._asdict(),
        "interval_factor": round(math.exp(half), 4),
        "rows": len(used),
        "sources": sources,
        "checked_only": checked,
    }


def main() -> None:
    """With --fit, fits all constants anew, writes them beside this file and prints the errors."""
    parser = argparse.ArgumentParser(description="Errors of the forecast rates, by framework and source.")
    parser.add_argument("--fit", action="store_true", help=f"fit the constants and write {CONSTANTS.name}")
    if parser.parse_args().fit:
        found = {framework: summary(framework) for framework in ("paddle", "torch")}
        write_atomically(CONSTANTS, (json.dumps(found, indent=1) + "\n").encode())
    for framework, each in json.loads(CONSTANTS.read_text()).items():
        values = ", ".join(f"{name} {value:.3g}" for name, value in each["constants"].items())
        print(f"{framework}: {each['rows']} rows; {values}; interval: rate ÷ and × {each['interval_factor']:.2f}")
        for source, of in each["sources"].items():
            said = [
                f"{of[kind]['median']:.1%} median, {of[kind]['largest']:.1%} largest"
                for kind in ("in_sample", "left_out")
            ]
            print(
                f"  {source}: {of['rows']} rows; in sample {said[0]}; left out {said[1]}; 90% within {of['factor']:.2f}"
            )
        for source, of in each["checked_only"].items():
            print(f"  {source}: not fitted to; error {of['largest']:.1%}")


if __name__ == "__main__":
    main()
