"""The same result with less work: no padding, packing, losses at labels alone, leaner kernels, and --tuned."""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE

from tunebench.errors import BadInput
from tunebench.flags import TUNED, in_words, parse_flags
from tunebench.models.checkpoint import find_checkpoint, open_checkpoint
from tunebench.models.presets import PRESETS, Preset
from tunebench.models.random_weights import write_random
from tunebench.plan import IGNORED, MicroBatch
from tunebench.record import read_record
from tunebench.run.start import prepare_compiler
from tunebench.run.unsupported import not_offered

IN_ORDER = ["--tuned", "--order=plan"]  # grouped batches would be other steps


def same_curves(fast, plain):
    assert fast.steps.effective_tokens == plain.steps.effective_tokens
    assert fast.steps.loss == pytest.approx(plain.steps.loss, rel=1e-5)
    assert fast.steps.grad_norm == pytest.approx(plain.steps.grad_norm, rel=1e-4)


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("framework", "family", "method", "flags"),
    [
        *((framework, "llama", method, IN_ORDER) for framework in ("torch", "paddle") for method in ("full", "lora")),
        *((framework, "qwen2", "full", IN_ORDER) for framework in ("torch", "paddle")),
        *((framework, "llama-3.2-1b", "full", IN_ORDER) for framework in ("torch", "paddle")),
        ("torch", "bloom", "full", IN_ORDER),
        ("torch", "chatglm2", "full", [*IN_ORDER, "--recompute"]),
        ("paddle", "bloom", "full", ["--head=labels", "--keep-memory"]),
        ("torch", "llama", "full", ["--padding-free"]),
        ("torch", "qwen2", "full", ["--padding-free", "--attention=flash"]),
        ("paddle", "llama", "full", ["--padding-free"]),
        ("paddle", "llama", "full", ["--lean", "--recompute"]),
        ("paddle", "llama", "full", ["--lean", "--fuse-projections"]),
        ("paddle", "qwen2", "full", ["--recompute", "--fuse-projections"]),
        ("paddle", "llama", "lora", ["--quick-lora"]),
        ("paddle", "qwen2", "lora", ["--quick-lora", "--recompute"]),
    ],
)
def test_same_curves(alone, forked, short, tmp_path, framework, family, method, flags):
    plain = alone(framework, family, method)
    fast = forked.train(framework, method, tmp_path / "r.json", f"--model={family}-tiny", *short, *flags)
    same_curves(fast, plain)
    assert fast.setup.compile == (framework == "torch" and "--tuned" in flags)
    if fast.setup.padding_free:
        assert fast.steps.padded_tokens == fast.steps.effective_tokens < plain.steps.padded_tokens


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", ["torch", "paddle"])
@pytest.mark.parametrize(
    ("method", "split"),
    [
        ("full", ["--zero=3", "--micro-bsz=2"]),
        ("lora", ["--zero=3"]),
        ("full", ["--nproc=2"]),
        ("full", ["--mp=2", "--recompute"]),
        ("full", ["--zero=2", "--micro-bsz=2"]),
        ("full", ["--zero=1"]),
        ("lora", ["--zero=2", "--micro-bsz=2"]),
        ("lora", ["--mp=2"]),
    ],
)
def test_same_curves_on_two_processes(alone, forked, short, tmp_path, framework, method, split):
    flags = ["--model=llama-tiny", *short, *IN_ORDER, "--overlap", *split]
    fast = forked.train(framework, method, tmp_path / "r.json", *flags)
    same_curves(fast, alone(framework, "llama", method))
    assert fast.setup.compile == (framework == "torch")


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("method", "split"), [("full", ["--zero=3", "--micro-bsz=2"]), ("lora", ["--zero=2"]), ("lora", ["--zero=3"])]
)
def test_same_curves_with_fsdp(alone, forked, short, tmp_path, method, split):
    flags = ["--model=llama-tiny", *short, *IN_ORDER, *split, "--sharding=fsdp"]
    fast = forked.train("torch", method, tmp_path / "r.json", *flags)
    same_curves(fast, alone("torch", "llama", method))
    assert fast.setup.compile


COMPILE_SAYS = """
import torch
compile = torch.compile
def say_first(function, **how):
    print("compiles:", function.__self__.__class__.__name__, flush=True)
    return compile(function, **how)
torch.compile = say_first
"""


@pytest.mark.frameworks
def test_replicas_of_tensor_parallel_groups_compile_their_layers(alone, forked, short, tmp_path):
    split = ["--mp=2", "--nproc=4", "--sequence-parallel", "--recompute"]
    flags = ["--model=llama-tiny", *short, *IN_ORDER, *split, f"--out={tmp_path / 'r.json'}"]
    status, printed = forked.run("torch", "full", *flags, code=COMPILE_SAYS)
    assert status == 0, printed
    assert re.findall("compiles: (.*)", printed) == ["FSDPLlamaDecoderLayer"] * 4 * 4, "4 layers, 4 processes"
    same_curves(read_record(tmp_path / "r.json"), alone("torch", "llama", "full"))


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", ["torch", "paddle"])
def test_packed_rows_train_as_their_samples_padded(forked, short, tmp_path, framework):
    """A step has all eight samples in both runs; packed, they fill two rows."""
    samples = json.loads(Path(short[0].removeprefix("--data=")).read_text(encoding="utf-8"))[:8]
    (tmp_path / "eight.json").write_text(json.dumps(samples))
    flags = ["--model=llama-tiny", f"--data={tmp_path / 'eight.json'}", "--steps=4", "--warmup-steps=1"]
    padded = forked.train(framework, "full", tmp_path / "padded.json", *flags, "--bsz=8")
    capacity = -(-padded.steps.effective_tokens[0] // 2) + 4
    packed = forked.train(framework, "full", tmp_path / "packed.json", *flags, "--bsz=2", f"--packing={capacity}")
    assert packed.setup.packing == capacity
    same_curves(packed, padded)


KINDS = [{"attention": "eager"}, {"attention": "sdpa"}] + [{"lean": True}] * (HERE == "paddle")


def end_to_end(lengths, tokens=None):
    """A padding-free micro-batch of samples of these lengths, without labels."""
    ids = np.array([tokens or [5 + i % 90 for i in range(sum(lengths))]])
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    nothing = np.full_like(ids, IGNORED)
    return MicroBatch(ids, positions, np.ones_like(ids), nothing, np.zeros(0, dtype=np.int64), lengths=lengths)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_token_of_a_sample_changes_another_sample(script, kind):
    flags, checkpoint, _, world = script["JOB"]
    flags = flags.model_copy(update={"padding_free": True} | kind)
    group = script["parallel"].join(flags, world)
    model = script["build_model"](flags, checkpoint, group)

    def logits(tokens):
        output = model(**script["to_device"](flags, end_to_end([6, 4], tokens), group.device)[0])
        return (output.logits if HERE == "torch" else output[0]).detach().numpy()[0]

    before = logits([5, 6, 7, 8, 9, 10, 5, 6, 7, 8])
    after = logits([5, 6, 77, 8, 9, 10, 5, 6, 7, 8])
    assert np.array_equal(before[:2], after[:2])
    assert (np.abs(before - after)[2:6].max(axis=1) > 1e-3).all(), "it does change the rest of its own sample"
    assert np.array_equal(before[6:], after[6:])
    assert before[6:10] == pytest.approx(before[:4], abs=1e-5), "the same tokens at the start of both"


@pytest.mark.skipif(HERE != "torch", reason="Paddle has no compiler for CPUs")
@pytest.mark.parametrize("padding_free", [False, True])
def test_the_layers_are_compiled(script, tmp_path, padding_free):
    """There are more layers than Dynamo's limit of compiled variants (8), after which it runs code uncompiled."""
    from torch._dynamo.utils import counters

    flags, _, plan, world = script["JOB"]
    kind = {"padding_free": True, "attention": "sdpa"} if padding_free else {}
    flags = flags.model_copy(update={"compile": True} | kind)
    preset = PRESETS["llama-tiny"]
    write_random(tmp_path, Preset(preset.config | {"num_hidden_layers": 10}, preset.checkpoint_dtype), seed=0)
    checkpoint = open_checkpoint(tmp_path)
    group = script["parallel"].join(flags, world)
    model = script["build_model"](flags, checkpoint, group)
    seen = []
    script["kernels_seen"].watch(model, lambda *kernels: seen.append(kernels))
    first = end_to_end([9, 6]) if padding_free else plan.micro_batches(0, 1)[0][1]
    inputs, _ = script["to_device"](flags, first, group.device)
    counters.clear()
    plain = model(**inputs).logits
    kernel = "scaled_dot_product_flash_attention_for_cpu" if padding_free else "softmax"
    assert seen == [({"float32"}, {"float32"}, {kernel})], "the first pass is not compiled: its kernels are seen"
    assert counters["stats"]["unique_graphs"] == 0
    compiled = model(**inputs).logits
    codes = counters["stats"]["unique_graphs"]
    assert 0 < codes < 8, "one for all layers, so that the limit is not met"
    if padding_free:
        others = (end_to_end(lengths) for lengths in ([4, 5, 3], [12], [2, 2, 2, 2, 9], [9, 6]))
        for batch in others:
            model(**script["to_device"](flags, batch, group.device)[0])
    else:
        model(**{name: x[:, :-3] for name, x in inputs.items()})
    assert counters["stats"]["unique_graphs"] == codes, "the same for other numbers of tokens and of samples"
    assert compiled.detach().numpy() == pytest.approx(plain.detach().numpy(), abs=1e-5)


@pytest.mark.skipif(HERE != "torch", reason="Paddle has no compiler for CPUs")
def test_recomputation_runs_the_compiled_code(script):
    """Also in the first pass, which is not compiled: its backward pass repeats what the forward pass has run."""
    import torch
    from torch._dynamo.utils import counters

    flags, checkpoint, _, world = script["JOB"]
    flags = flags.model_copy(update={"recompute": True, "padding_free": True, "attention": "sdpa"})
    group = script["parallel"].join(flags, world)
    inputs, _ = script["to_device"](flags, end_to_end([9, 6]), group.device)
    torch._dynamo.reset()  # of other tests
    gradients = []
    for compiled in (False, True):
        model = script["build_model"](flags.model_copy(update={"compile": compiled}), checkpoint, group)
        script["kernels_seen"].watch(model, lambda *_: None)
        counters.clear()
        graphs = []
        for _ in range(3):
            model.zero_grad()
            loss = model(**inputs).logits.square().mean()
            graphs.append(counters["stats"]["unique_graphs"])
            loss.backward()
            assert counters["stats"]["unique_graphs"] == graphs[-1], "recomputation compiles nothing of its own"
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert graphs[0] == 0
        assert (graphs[1] > 0) == compiled
        assert graphs[2] == graphs[1]
    for each in gradients[1:]:
        for one, other in zip(each, gradients[0], strict=True):
            torch.testing.assert_close(one, other)


def let_varlen_attn_run_on_cpus():
    """Gives the operators of torch's varlen_attn a kernel for CPUs, which takes the samples by turns."""
    import torch
    from torch.nn.attention import varlen

    def by_sample(ends, *tensors):
        """Each sample's part of tensors (tokens, heads, head size): (1, heads, length, head size)."""
        for first, last in itertools.pairwise(ends.tolist()):
            yield [tensor[first:last].transpose(0, 1).unsqueeze(0) for tensor in tensors]

    def forward(query, key, value, ends, _ends, _longest_query, _longest_key, is_causal, scale, *_):
        output, sums = torch.empty_like(query), []
        for *parts, into in by_sample(ends, query, key, value, output):
            part, of_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *parts, 0.0, is_causal, scale=scale
            )
            into.copy_(part)
            sums.append(of_part[0])
        return output, torch.cat(sums, dim=1), torch.zeros(2, dtype=torch.uint64)

    def backward(gradient, query, key, value, output, sums, ends, _ends, _query, _key, is_causal, _rng, scale, *_):
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        parts = by_sample(ends, gradient, query, key, value, output, *gradients)
        for (*part, into_query, into_key, into_value), (first, last) in zip(
            parts, itertools.pairwise(ends.tolist()), strict=True
        ):
            of_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *part, sums[None, :, first:last], 0.0, is_causal, scale=scale
            )
            for into, values in zip((into_query, into_key, into_value), of_part, strict=True):
                into.copy_(values)
        return tuple(gradients)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


@pytest.mark.skipif(HERE != "torch", reason="varlen_attn is torch's")
def test_varlen_attn_is_part_of_the_compiled_code(script):
    """torch's own kernels of it are for GPUs."""
    import torch
    from torch._dynamo.utils import counters

    let_varlen_attn_run_on_cpus()
    flags, checkpoint, _, world = script["JOB"]
    kind = {"padding_free": True, "attention": "sdpa", "dtype": "bf16", "amp": "O1", "compile": True}
    flags = flags.model_copy(update=kind)
    group = script["parallel"].join(flags, world)
    model = script["build_model"](flags, checkpoint, group)

    def results(lengths, at_once):
        inputs, _ = script["to_device"](flags, end_to_end(lengths), group.device)
        if at_once:  # as on a GPU
            inputs["samples"].ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        model.zero_grad()
        logits = model(**inputs).logits.float()
        logits.square().mean().backward()
        return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    torch._dynamo.reset()  # of other tests
    counters.clear()
    for lengths in ([9, 6], [4, 5, 3], [12], [2, 2, 2, 2, 9]):
        compiled = results(lengths, at_once=True)
        assert counters["stats"]["unique_graphs"] == 1, "the whole layer, for all layers and lengths"
        assert not counters["graph_break"]
        with torch.compiler.set_stance("force_eager"):
            plain = results(lengths, at_once=False)
        for one, other in zip(compiled, plain, strict=True):
            assert (one - other).norm() < 0.05 * other.norm(), "but for bfloat16's rounding"


@pytest.mark.skipif(HERE != "paddle", reason="flashmask is Paddle's")
def test_flashmask_hides_what_is_of_other_samples(script):
    """The indices for flashmask have their documented meaning, and it accepts them up to a check for GPUs."""
    import paddle

    attention = script["attention"]
    hidden_from = attention.sample_ends([3, 1, 2])
    queries, keys = np.mgrid[:6, :6]
    seen = (keys <= queries) & (queries < hidden_from)
    blocks = [np.tril(np.ones((n, n), dtype=bool)) for n in (3, 1, 2)]
    expected = np.zeros((6, 6), dtype=bool)
    for at, block in zip((0, 3, 4), blocks, strict=True):
        expected[at : at + len(block), at : at + len(block)] = block
    assert np.array_equal(seen, expected)
    flags, checkpoint, *_ = script["JOB"]
    flags = flags.model_copy(update={"attention": "flash"})
    config = script["weights"].read_config(checkpoint)
    attention.configure(flags, config)
    samples = attention.Samples([3, 1, 2], "cpu")
    samples.ends = paddle.to_tensor(hidden_from)  # as on a GPU
    one = paddle.rand([1, 6, 4, 16])
    from paddlenlp.transformers.llama.modeling import scaled_dot_product_attention

    with pytest.raises(ValueError, match="FLAGS_cudnn_deterministic"):  # it has checked shapes and dtypes before
        attend = functools.partial(attention.attend_by_flashmask, scaled_dot_product_attention)
        attend(one, config, one, one, None, False, attn_mask_startend_row_indices=samples)


@pytest.mark.skipif(HERE != "paddle", reason="Paddle alone has norms of several kernels without --compile")
@pytest.mark.parametrize("family", ["llama", "qwen2", "chatglm2"])
def test_norms_are_one_kernel_on_a_gpu(script, monkeypatch, family):
    """The kernel is a pretended one of its documented formula. CPUs have none: Paddle's own call stops there."""
    import paddle
    import paddle.nn.functional as F

    flags, *_, world = script["JOB"]
    checkpoint = find_checkpoint(f"{family}-tiny", "random", 0)
    group = script["parallel"].join(flags, world)
    model = script["build_model"](flags, checkpoint, group)
    inputs = {"input_ids": paddle.arange(5, 45).reshape([2, 20])}
    plain = model(**inputs)[0].numpy()
    replace = script["rms_norm"].use_one_kernel
    replace(flags.model_copy(update={"lean": True}), model)
    assert np.array_equal(model(**inputs)[0].numpy(), plain), "not on a CPU"
    with monkeypatch.context() as patch:
        patch.setattr(paddle, "get_device", lambda: "gpu:0")
        replace(flags, model)
        assert np.array_equal(model(**inputs)[0].numpy(), plain), "not without --lean"
        replace(flags.model_copy(update={"lean": True}), model)
    with pytest.raises(RuntimeError, match="kernel `rms_norm` is not registered"):
        model(**inputs)
    calls = []

    def rms_norm(x, shape, weight, epsilon):
        calls.append((shape, epsilon))
        roots = paddle.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        return x * roots * weight, roots

    monkeypatch.setattr(F, "rms_norm", rms_norm)
    assert model(**inputs)[0].numpy() == pytest.approx(plain, abs=1e-5)
    config = checkpoint.config
    assert calls == [([config["hidden_size"]], config["rms_norm_eps"])] * (2 * config["num_hidden_layers"] + 1)


# Says at a call of a framework's own whether a collective runs beside what follows.
SAYS = "print('beside:', {}, flush=True)"
DEEPSPEED_SAYS = f"""
import deepspeed
initialize = deepspeed.initialize
def then_say(*args, **kwargs):
    made = initialize(*args, **kwargs)
    {SAYS.format("made[0].zero_overlap_comm()")}
    return made
deepspeed.initialize = then_say
"""
STAGE_2_SAYS = f"""
from paddle import distributed
reduce = distributed.reduce
def say_first(*args, sync_op, **kwargs):
    {SAYS.format("not sync_op")}
    return reduce(*args, sync_op=sync_op, **kwargs)
distributed.reduce = say_first
"""
LINEAR_SAYS = f"""
from paddle.distributed.fleet.layers.mpu.mp_layers import ColumnParallelLinear
forward = ColumnParallelLinear.forward
def say_first(self, x):
    {SAYS.format("self.mp_async_allreduce")}
    return forward(self, x)
ColumnParallelLinear.forward = say_first
"""


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("framework", "method", "split", "code", "beside"),
    [
        ("torch", "full", "--zero=1", DEEPSPEED_SAYS, {"--overlap": True, "--no-overlap": False}),
        ("torch", "lora", "--zero=2", DEEPSPEED_SAYS, {"--overlap": True, "--no-overlap": False}),
        ("torch", "full", "--zero=3", DEEPSPEED_SAYS, {"--overlap": True, "--no-overlap": True}),
        ("paddle", "lora", "--zero=2", STAGE_2_SAYS, {"--overlap": True, "--no-overlap": False}),
        ("paddle", "full", "--mp=2", LINEAR_SAYS, {"--overlap": True, "--no-overlap": False}),
        ("paddle", "lora", "--mp=2", LINEAR_SAYS, {"--overlap": False, "--no-overlap": False}),
    ],
)
def test_collectives_are_let_run_beside_the_passes(forked, tmp_path, framework, method, split, code, beside):
    """Whether this saves time, gloo does not show: it ends each collective before it returns."""
    for given, expected in beside.items():
        flags = ["--model=llama-tiny", "--bsz=4", "--steps=1", "--warmup-steps=0", "--samples=8", split, given]
        out = tmp_path / f"{given}.json"
        status, printed = forked.run(framework, method, *flags, f"--out={out}", code=code)
        assert status == 0, printed
        assert set(re.findall("beside: (True|False)", printed)) == {str(expected)}
        assert read_record(out).setup.overlap == (given == "--overlap")


# On a GPU --overlap adds the product to the weight's gradient in one kernel. Here its documented formula stands for it.
FUSED_GRADIENTS = """
import paddle
from paddle.distributed.fleet.layers.mpu import mp_layers
from paddle.distributed.fleet.utils import sequence_parallel_utils as by_tokens

def add(x, dy, by_weight, by_bias, multi_precision, has_bias):
    print("adds to a gradient:", by_weight is not None, "bias:", has_bias, flush=True)
    assert not multi_precision
    dy = dy.flatten(0, -2)
    sums = [paddle.matmul(x.flatten(0, -2), dy, transpose_x=True)] + [dy.sum(0)] * has_bias
    befores = [by_weight, by_bias]
    return *(new if before is None else before + new for new, before in zip(sums, befores)), *[None] * (not has_bias)

paddle._C_ops.fused_linear_param_grad_add = add
for module, name in ((mp_layers, "ColumnParallelLinear"), (by_tokens, "ColumnSequenceParallelLinear")):
    module.is_fused_linear_param_grad_add_supported = lambda: True
    layer = getattr(module, name)
    def forward(self, x, forward=layer.forward):
        assert not self.mp_fused_linear_param_grad_add, "not on a CPU"
        self.mp_fused_linear_param_grad_add = True
        try:
            return forward(self, x)
        finally:
            self.mp_fused_linear_param_grad_add = False
    layer.forward = forward
"""


@pytest.mark.frameworks
@pytest.mark.parametrize(("family", "split"), [("llama", []), ("qwen2", ["--sequence-parallel"])])
def test_paddle_may_add_products_to_gradients(alone, forked, short, tmp_path, family, split):
    out = tmp_path / "r.json"
    flags = [f"--model={family}-tiny", *short, "--mp=2", "--micro-bsz=4", "--overlap", *split, f"--out={out}"]
    status, printed = forked.run("paddle", "full", *flags, code=FUSED_GRADIENTS)
    assert status == 0, printed
    biases = {str(has) for has in ((False, True) if family == "qwen2" else (False,))}
    assert {*re.findall("gradient: (True|False) bias: (True|False)", printed)} == {
        (adds, bias) for adds in ("False", "True") for bias in biases
    }
    same_curves(read_record(out), alone("paddle", family, "full"))


@pytest.mark.skipif(HERE != "paddle", reason="Paddle waits for a weight where the layer that holds it is called")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom", "chatglm2"])
def test_each_trained_weight_belongs_to_a_layer_without_others(scripts, method, family):
    """--overlap sends weights while the next pass runs. Paddle waits for them in hooks of such layers alone."""
    functions = scripts[method]
    flags, *_, world = functions["JOB"]
    group = functions["parallel"].join(flags, world)
    model = functions["build_model"](flags, find_checkpoint(f"{family}-tiny", "random", 0), group)
    trained = {id(each) for each in model.parameters() if not each.stop_gradient}
    ends = [layer for layer in model.sublayers() if not layer.sublayers()]
    assert trained
    assert trained <= {id(each) for layer in ends for each in layer.parameters()}


@pytest.mark.skipif(HERE != "paddle", reason="Quick LoRA is PaddleNLP's")
def test_quick_lora_is_on_where_it_is_asked_for(scripts):
    functions = scripts["lora"]
    flags, checkpoint, _, world = functions["JOB"]
    group = functions["parallel"].join(flags, world)
    for asked in (False, True):
        model = functions["build_model"](flags.model_copy(update={"quick_lora": asked}), checkpoint, group)
        adapted = [layer for layer in model.sublayers() if hasattr(layer, "lora_A")]
        assert adapted
        assert all(layer.use_quick_lora == asked for layer in adapted)


@pytest.mark.parametrize(
    ("framework", "method", "model", "flag", "reason"),
    [
        ("torch", "lora", "llama", "--quick-lora", "no layer that adds the adapters' product to the weights"),
        ("paddle", "lora", "llama", "--quick-lora", None),
        ("paddle", "full", "bloom", "--mp=2 --sequence-parallel", "no sequence parallelism in Bloom"),
        ("torch", "full", "bloom", "--mp=2 --sequence-parallel", None),
        ("paddle", "lora", "llama", "--quick-lora --mp=2", "with --mp calls a function as Paddle"),
        ("torch", "full", "llama", "--fuse-projections", "no model of these families with q, k and v in one weight"),
        ("paddle", "full", "qwen2", "--fuse-projections", None),
        ("paddle", "full", "bloom", "--fuse-projections", "no choice of projections in this model"),
        ("paddle", "lora", "llama", "--fuse-projections", "LoRA adapts q, k and v each here"),
    ],
)
def test_where_paddlenlps_own_layers_are_offered(framework, method, model, flag, reason):
    flags = parse_flags(method, [f"--model={model}-tiny", *flag.split()])
    found = not_offered(framework, method, flags, find_checkpoint(flags.model, flags.weights, flags.seed))
    assert (found is None) if reason is None else (reason in found)


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    flags = parse_flags("full", ["--model=llama-tiny", "--compile"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BadInput, match="there is no no-such-compiler; use --no-compile"):
        prepare_compiler("torch", flags)
    prepare_compiler("paddle", flags)
    checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed)
    assert "no compiler for CPUs" in not_offered("paddle", "full", flags, checkpoint)
    assert not_offered("torch", "full", flags, checkpoint) is None


def test_tuned_is_a_set_of_public_flags():
    arguments = ["--model=llama-tiny"]
    tuned = parse_flags("full", [*arguments, "--tuned"])
    spelled = parse_flags("full", [*arguments, *in_words(TUNED).split()])
    assert tuned.model_dump() == spelled.model_dump() | {"tuned": True, "overlap": False}, "on a CPU"
    assert parse_flags("full", [*arguments, "--tuned", "--plan"]).overlap
    own = parse_flags("full", [*arguments, "--tuned", "--attention=eager", "--no-lean", "--head=all"])
    assert (own.attention, own.lean, own.head, own.order) == ("eager", False, "all", "grouped")
    assert parse_flags("full", [*arguments, "--tuned", "--packing=999"]).order == "plan"
    assert parse_flags("full", [*arguments, "--tuned", "--mp=2"]).head == "all"
    assert not parse_flags("full", [*arguments, "--tuned"], framework="paddle").compile
    assert parse_flags("full", [*arguments, "--tuned", "--mp=2", "--recompute"]).compile
