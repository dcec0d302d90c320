"""Builds the models of full-size runs as shapes, with the scripts' own functions, and says what came out.

    python tests/full_size.py torch CASES.json OUT.json

In the environment of one framework. CASES is {name: [method, flag, ...]}; OUT is {name: {processes: what they built, or
the error}}. Several processes are, of torch, the last rank of as many, in a process group of torch's own that sends
nothing; of Paddle, real ones.

Parameters are counted in all layers, where no weight is read and none takes memory: the checkpoint is a file of holes
in the dtype that the run holds, which torch maps and never touches; Paddle's parameters are lazy, and the one call that
would fill them is replaced by a check of names and shapes. Layers are all alike, so that the rest is done with one or
two of full width: torch's slices and shards, which are copied for real, and the passes through a model.
"""

import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunebench import processes
from tunebench.flags import Flags, parse_flags
from tunebench.models.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from tunebench.models.families import family_of
from tunebench.models.hollow import STORED, write_hollow
from tunebench.models.presets import PRESETS
from tunebench.run.place import export_place
from tunebench.run.run import Job, Run
from tunebench.world import ALONE, World

ROOT = Path(__file__).resolve().parents[1]
TINY = {"llama": "llama-tiny", "bloom": "bloom-tiny", "glm": "chatglm2-tiny", "qwen2": "qwen2-tiny"}
POSITIONS = 2048  # PaddleNLP computes tables of this length per layer; Qwen2's 131,072 would take 4 GB
BSZ = 16  # batch size of the plan; its batches give the inputs their shape
# Flags that change neither the model nor the shape of a batch.
WITHOUT_EFFECT = (
    "data",
    "samples",
    "steps",
    "warmup_steps",
    "paired_halves",
    "plan_seed",
    "lr",
    "timeout",
    "out",
    "bsz",
    "node_rank",
)

Facts = dict[str, Any]
Script = dict[str, Any]  # the names that it defines
Cases = dict[str, tuple[str, Flags]]  # method and flags by name


def main() -> None:
    """Forks the processes after the imports and gathers their results."""
    framework, cases, out = sys.argv[1], *map(Path, sys.argv[2:])
    by_size: dict[int, Cases] = {}
    for name, (method, *arguments) in json.loads(cases.read_text()).items():
        given = parse_flags(method, arguments)
        # Flags as a worker reads them on a machine with that many GPUs.
        world = World(given.world_size - 1, given.nproc - 1, given.nproc, given.world_size)
        flags = parse_flags(method, arguments, world=world)
        for size in SIZES[framework](flags):
            by_size.setdefault(size, {})[name] = method, flags
    os.environ["OMP_NUM_THREADS"] = "1"  # for each of several processes
    scripts = load_scripts(framework)
    fork = multiprocessing.get_context("fork")
    results: dict[str, dict[int, Facts]] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for size, members in by_size.items():
            with socket.socket() as reserved:
                reserved.bind(("localhost", 0))
                port = reserved.getsockname()[1]
            ranks = range(size) if framework == "paddle" else [size - 1]
            for rank in ranks:
                said = Path(folder) / f"{size}-{rank}"
                world = World(rank, rank, size, size, port, ("localhost",)) if size > 1 else ALONE
                process = fork.Process(target=build_all, args=(framework, scripts, world, members, said))
                process.start()
                started.append((process, size, members, said))
        for process, size, members, said in started:
            process.join()
            lost = {name: {"error": f"a process ended with {process.exitcode}"} for name in members}
            for name, facts in (json.loads(said.read_text()) if said.exists() else lost).items():
                kept = results.setdefault(name, {}).setdefault(size, facts)
                if "error" not in kept and facts != kept:  # ranks differ
                    results[name][size] = facts if "error" in facts else {"error": f"{kept} on a rank, {facts} on one"}
    out.write_text(json.dumps(results, indent=1))


def build_all(framework: str, scripts: dict[str, Script], world: World, cases: Cases, said: Path) -> None:
    """Builds each case in this process and writes the facts or the error of each to `said`."""
    processes.die_with_parent()
    builder = {"torch": Torch, "paddle": Paddle}[framework](scripts, world)
    built: dict[str, Facts] = {}
    results: dict[str, Facts] = {}
    for name, (method, given) in cases.items():
        flags = builder.share(given)
        key = key_of(method, flags)
        try:
            if key not in built:
                built[key] = builder.build(method, flags)
            results[name] = built[key]
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        gc.collect()  # models hold reference cycles
    said.write_text(json.dumps(results))
    os._exit(0)  # as run.py's `_leave` does: destroying gloo's groups can deadlock


class Once:
    """Keeps what was found for flags, since many runs have the same model."""

    def __init__(self, scripts: dict[str, Script]) -> None:
        self.scripts = scripts
        self.known: dict[str, Any] = {}

    def once(self, facts_of: Callable[[Script, Flags], Any], method: str, flags: Flags) -> Any:
        """What `facts_of` returns for these flags, asked once."""
        key = facts_of.__name__ + key_of(method, flags)
        if key not in self.known:
            self.known[key] = facts_of(self.scripts[method], flags)
        return self.known[key]


def key_of(method: str, flags: Flags) -> str:
    """The same text for the same model and shapes."""
    return json.dumps([method, {k: v for k, v in flags.model_dump().items() if k not in WITHOUT_EFFECT}])


# Numbers of processes for which a run's flags are built. One process goes through the passes: ZeRO does not change
# them. Replicas of Paddle's models are alike.
SIZES = {
    "torch": lambda flags: {1, flags.world_size} if flags.mp == 1 else {flags.world_size},
    "paddle": lambda flags: {flags.mp},
}


def load_scripts(framework: str) -> dict[str, Script]:
    """The names that each script of the framework defines, by method. Loading it makes a plan and tiny weights."""
    sys.path[0] = str(ROOT / framework)
    scripts = {}
    for method in ("full", "lora"):
        script = f"finetune_{method}.py"
        sys.argv = [script, "--model=llama-tiny", f"--bsz={BSZ}", "--samples=32", "--steps=2", "--warmup-steps=1"]
        scripts[method] = runpy.run_path(str(ROOT / framework / script))
    return scripts


@contextlib.contextmanager
def hollow_checkpoint(flags: Flags, layers: int | None = None, vocabulary: int | None = None) -> Iterator[Checkpoint]:
    """A preset's checkpoint whose tensors are holes in files, with fewer layers or a smaller vocabulary if asked."""
    preset, less = PRESETS[flags.model].cut(layers), {}
    if "max_position_embeddings" in preset.config:
        less["max_position_embeddings"] = POSITIONS
    if vocabulary:
        less |= {"vocab_size": vocabulary, "pad_token_id": 0}
    preset = dataclasses.replace(preset, config=preset.config | less)
    # From a disk transformers would have the holes read ahead; what is copied must not fill shared memory instead.
    shared = "/dev/shm" if not layers and Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        write_hollow(Path(folder), preset.config, STORED[flags.weights_dtype])
        yield open_checkpoint(Path(folder), known_sha256="of holes")


def tiny_checkpoint(flags: Flags) -> Checkpoint:
    """The random weights of the tiny model of the same family."""
    return find_checkpoint(TINY[PRESETS[flags.model].config["model_type"]], "random", 0)


class Torch(Once):
    """One process that builds what the last rank of a run would."""

    def __init__(self, scripts: dict[str, Script], world: World) -> None:
        super().__init__(scripts)
        self.world = world
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if world.size > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            torch.distributed.init_process_group("fake", rank=world.rank, world_size=world.size, store=FakeStore())
            os.environ["LOCAL_RANK"] = str(world.local_rank)  # torchrun's, which DeepSpeed reads

    def share(self, flags: Flags) -> Flags:
        """The flags of what is built here.

        ZeRO changes how a model is loaded and what wraps it, in the case that several processes build, and not the
        passes through it, in the case of one; attention changes these alone.
        """
        if self.world.size == 1:
            return flags.model_copy(update={"zero": 0, "nproc": 1})
        return flags.model_copy(update={"attention": "eager"}) if flags.zero else flags

    def build(self, method: str, flags: Flags) -> Facts:
        """Facts of what the flags build: the whole model in one process, or the last rank's part of several."""
        script = self.scripts[method]
        # What runs in the passes adds no parameter.
        plain = flags.model_copy(update={"attention": "eager", "recompute": False, "micro_bsz": 1})
        if flags.zero:
            return self.shard(script, flags) | self.once(self.layer, method, plain)
        if self.world.size > 1:
            return self.step(script, method, flags, layers=1)
        return self.step(script, method, flags, layers=2) | self.once(self.whole, method, plain)

    def whole(self, script: Script, flags: Flags) -> Facts:
        """Counts of the model in all layers."""
        group = self.join(script, flags)
        with hollow_checkpoint(flags) as checkpoint:
            return self.counts(script, script["build_model"](flags, checkpoint, group), group)

    def join(self, script: Script, flags: Flags) -> Any:
        """Replaces parallel.join where the process group exists already."""
        parallel = script["parallel"]
        if self.world.size == 1:
            return parallel.join(flags, ALONE)
        import torch

        return parallel.place_of(flags, torch.device("cpu"), self.world.rank)

    def counts(self, script: Script, model: Any, group: Any) -> Facts:
        """Counts of parameters: all, trained, held by this process; and their dtypes."""
        count = script["parallel"].count
        return {
            "parameters": count(model.parameters(), group),
            "trainable": count([p for p in model.parameters() if p.requires_grad], group),
            "held": sum(script["parallel"].local(p).numel() for p in model.parameters()),
            "dtypes": sorted({script["kernels_seen"].name_of(p.dtype) for p in model.parameters()}),
        }

    def step(self, script: Script, method: str, flags: Flags, layers: int) -> Facts:
        """Builds the model and runs the script's first step on shapes alone."""
        from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

        parallel, group = script["parallel"], self.join(script, flags)
        with hollow_checkpoint(flags, layers=layers) as checkpoint:
            model = script["build_model"](flags, checkpoint, group)
            facts = self.counts(script, model, group) | {"recompute": model.is_gradient_checkpointing}
            built = script["built"].read(model)
            shapes = FakeTensorMode()
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({k: shapes.from_tensor(v) for k, v in tensors.items() if v is not None})
        run = Run("torch", method, Job(flags, checkpoint, script["JOB"].plan, ALONE))
        run.describe("cpu", facts["parameters"], facts["trainable"], built)
        trainable = [p for p in model.parameters() if p.requires_grad]
        script["kernels_seen"].watch(model, run.check_kernels)
        batch = run.plan.micro_batches(0, flags.micro_bsz, 0, BSZ // flags.micro_bsz)[0][1]
        with shapes:
            model, optimizer = script["wrap"](flags, model, trainable, group)
            inputs, labels = script["to_device"](flags, batch, group.device)
            inputs = {name: shapes.from_tensor(tensor) for name, tensor in inputs.items()}
            labels = shapes.from_tensor(labels)
            outputs = model(**inputs)
            parallel.backward(model, script["losses"].total(flags, outputs, labels, group), group)
            facts["gradients"] = sorted({script["kernels_seen"].name_of(p.grad.dtype) for p in trainable})
            # With fp16 it asks whether gradients overflowed. Shapes cannot tell.
            with contextlib.suppress(*[DataDependentOutputException] * (flags.dtype == "fp16")):
                parallel.update(model, optimizer, trainable, group)
            optimizer.step()
        return (
            facts | run.about["kernels"].model_dump() | {"logits": [*outputs.logits.shape], "inputs": [*labels.shape]}
        )

    def shard(self, script: Script, flags: Flags) -> Facts:
        """What DeepSpeed makes of the flags: its configuration, and its engine of a tiny model."""
        parallel, group = script["parallel"], self.join(script, flags)
        deepspeed = parallel.import_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)
        config = deepspeed.DeepSpeedConfig(parallel.zero_config(flags, PRESETS[flags.model].config["hidden_size"]))
        low = {"float16": config.float16_config, "bfloat16": config.bfloat16_config}
        facts = {
            "bsz": config.train_batch_size,
            "stage": config.zero_optimization_stage,
            "precision": [name for name, part in low.items() if part.enabled],
        }
        model = script["build_model"](flags, tiny_checkpoint(flags), group)
        trainable = [p for p in model.parameters() if p.requires_grad]
        try:
            engine, optimizer = script["wrap"](flags, model, trainable, group)
            facts["engine"] = [type(engine).__name__, type(optimizer).__name__]
        except ValueError as refusal:
            facts["refused"] = str(refusal)
        return facts

    def layer(self, script: Script, flags: Flags) -> Facts:
        """Counts of one layer as DeepSpeed loads it, after `shard`.

        Each tensor is whole for a moment: the vocabulary is cut too.
        """
        group = self.join(script, flags)
        with hollow_checkpoint(flags, layers=1, vocabulary=8192) as checkpoint:
            return self.counts(script, script["build_model"](flags, checkpoint, group), group)


class Paddle(Once):
    """A whole model, or one rank's slices of it."""

    def __init__(self, scripts: dict[str, Script], world: World) -> None:
        super().__init__(scripts)
        self.world, self.group = world, None
        export_place(world, "paddle")

    def share(self, flags: Flags) -> Flags:
        """The flags of what is built here: replicas and ZeRO do not change how a model is built.

        ChatGLMv2 is built in float32: it calculates in its own dtype meanwhile, which for others has no kernels here.
        """
        glm = PRESETS[flags.model].config["model_type"] == "glm"
        alone = {"zero": 0, "nproc": flags.mp}
        return flags.model_copy(update=alone | ({"dtype": "fp32", "amp": None} if glm else {}))

    def build(self, method: str, flags: Flags) -> Facts:
        """What the flags build, in all layers; what they build and load for real of the family's tiny model."""
        script = self.scripts[method]
        if self.group is None or self.world.size == 1:
            self.group = script["parallel"].join(flags, self.world)
        # The forward pass is in float32, whatever --dtype says: CPUs have no kernels for other dtypes.
        tiny = flags.model_copy(update={"model": TINY[PRESETS[flags.model].config["model_type"]]})
        fp32 = flags.model_copy(update={"dtype": "fp32", "amp": None})
        # The kernel of attention, which `tiny` and `forward` have, and the batch add no parameter.
        plain = flags.model_copy(update={"attention": "eager", "micro_bsz": 1})
        facts = self.once(self.shapes, method, plain) | {
            "tiny": self.once(self.tiny, method, tiny.model_copy(update={"micro_bsz": 1}))
        }
        return facts | (self.once(self.forward, method, fp32) if flags.mp == 1 else {})

    def lazily(self, script: Script, flags: Flags, checkpoint: Checkpoint) -> Any:
        """The script's model without weights."""
        import paddle
        from paddlenlp.transformers.model_utils import no_init_weights

        weights, load = script["weights"], script["weights"].load
        weights.load = check_places
        try:
            with paddle.LazyGuard(), no_init_weights():
                return script["build_model"](flags, checkpoint, self.group)
        finally:
            weights.load = load

    def shapes(self, script: Script, flags: Flags) -> Facts:
        """Counts as Torch's, of Paddle's model in all layers."""
        count = script["parallel"].count
        with hollow_checkpoint(flags) as checkpoint:
            model = self.lazily(script, flags, checkpoint)
        recompute = {layer.enable_recompute for layer in model.sublayers() if hasattr(layer, "enable_recompute")}
        return {
            "parameters": count(model.parameters(), self.group),
            "trainable": count([p for p in model.parameters() if not p.stop_gradient], self.group),
            "held": sum(p.size for p in model.parameters()),
            "dtypes": sorted({script["kernels_seen"].name_of(p.dtype) for p in model.parameters()}),
            "recompute": True in recompute,
        }

    def tiny(self, script: Script, flags: Flags) -> list[str]:
        """The dtypes of the family's tiny model after its weights are loaded."""
        model = script["build_model"](flags, tiny_checkpoint(flags), self.group)
        assert all(p._is_initialized() for p in model.parameters())
        return sorted({script["kernels_seen"].name_of(p.dtype) for p in model.parameters()})

    def forward(self, script: Script, flags: Flags) -> Facts:
        """Shapes of the forward pass, from a static program."""
        import paddle
        from paddle.static import InputSpec

        with hollow_checkpoint(flags, layers=1) as checkpoint:
            model = self.lazily(script, flags, checkpoint)
        arrays = script["JOB"].plan.micro_batches(0, flags.micro_bsz, 0, BSZ // flags.micro_bsz)[0][1]
        inputs = [InputSpec(array.shape, "int64") for array in (arrays.input_ids, arrays.attention_mask)]

        def call(input_ids: Any, attention_mask: Any) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask)[0]

        program = paddle.jit.to_static(call, input_spec=inputs, full_graph=True).concrete_program
        return {"logits": [*program.outputs[0].shape], "inputs": [*arrays.input_ids.shape]}


def check_places(model: Any, checkpoint: Checkpoint) -> None:
    """Replaces weights.load: checks that each tensor, or its slice, fits its place in the model."""
    import weights

    targets = weights.name_targets(model, checkpoint.config)
    wholes: dict[str, list[int]] = {}
    for source, shape in family_of(checkpoint.config).tensors(checkpoint.config).items():
        name, transpose, part = targets[source]
        shape = [*(reversed(shape) if transpose else shape)]
        if part and name in wholes:  # q, k and v, concatenated along the outputs
            shape[-1] += wholes[name][-1]
        wholes[name] = shape
    state = {name: tensor.shape for name, tensor in model.state_dict().items()}
    degree = model.config.tensor_parallel_degree
    slices = model.get_tensor_parallel_convert_actions(model.config, state) if degree > 1 else {}
    left = state.keys() - wholes.keys()
    tied = ("lm_head.decoder_weight", "lm_head.weight") if checkpoint.config["tie_word_embeddings"] else ()
    if any(not name.endswith((*tied, "rotary_pos_emb.inv_freq")) for name in left):
        raise RuntimeError(f"no weight for {', '.join(sorted(left))}")
    for name, whole in wholes.items():
        pieces = [[n // degree if axis == i else n for i, n in enumerate(whole)] for axis in range(len(whole))]
        if state[name] not in (pieces if name in slices else [whole]):
            raise RuntimeError(f"{name}: the model has {state[name]}, the checkpoint {whole}, over {degree} processes")


if __name__ == "__main__":
    main()
