"""Faults of the frameworks that the scripts work around: each exists, and each work-around is correct.

Where "is still needed" fails, the framework has mended its fault: remove the work-around.
"""

import importlib
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HERE, ROOT

from tunebench.plan import IGNORED


@pytest.fixture
def gradient():
    """The gradient of an embedding: 8192 rows of 256. The rows of frequent tokens, the first, are the largest."""
    rows = np.random.default_rng(0).standard_normal((8192, 256)) / np.arange(1, 8193)[:, None]
    return rows.astype(np.float32)


def parameter_with(gradient):
    if HERE == "torch":
        import torch

        parameter = torch.nn.Parameter(torch.zeros(gradient.shape))
        parameter.grad = torch.from_numpy(gradient.copy())
    else:
        import paddle

        parameter = paddle.create_parameter(list(gradient.shape), "float32")
        (parameter * paddle.to_tensor(gradient)).sum().backward()
    return parameter


def test_gradients_are_clipped_by_their_exact_norm(script, gradient):
    parameter = parameter_with(gradient)
    exact = np.linalg.norm(gradient.astype(np.float64))
    parallel = script["parallel"]
    group = parallel.join(script["JOB"].flags, script["JOB"].world)
    if HERE == "torch":
        norm = parallel.clip_gradients([parameter], group)
    else:
        group.clip([(parameter, parameter.grad)])
        norm = group.clip.norm
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    clipped = np.asarray(parameter.grad.numpy(), dtype=np.float64)
    assert np.linalg.norm(clipped) == pytest.approx(1, rel=1e-5)
    assert clipped == pytest.approx(gradient / exact, rel=1e-5, abs=1e-12)


def test_exact_norms_are_still_needed(gradient):
    library = importlib.import_module(HERE)
    norm = float(library.nn.utils.clip_grad_norm_([parameter_with(gradient)], 1.0))
    error = abs(norm / np.linalg.norm(gradient.astype(np.float64)) - 1)
    print(f"{HERE}: clip_grad_norm_ is off by {error:.2e} for {gradient.size} elements")
    assert error > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_losses_in_stretches_are_the_losses_of_all_logits(script, monkeypatch, dtype):
    """A scale as fp16 has it: gradients cast before they are scaled would lose their small values."""
    rng, losses = np.random.default_rng(0), script["losses"]
    group = script["parallel"].join(script["JOB"].flags, script["JOB"].world)
    values, labels = rng.standard_normal((2, 7, 300)).astype(dtype) * 8, rng.integers(0, 300, (2, 7))
    labels[0, :3] = IGNORED
    library = importlib.import_module(HERE)

    def loss_and_gradient() -> tuple[float, np.ndarray]:
        if HERE == "torch":
            logits = library.from_numpy(values.copy()).requires_grad_()
            outputs, targets = SimpleNamespace(logits=logits), library.from_numpy(labels)
        else:
            logits = library.to_tensor(values, stop_gradient=False)
            outputs, targets = [logits], library.to_tensor(labels)
        loss = losses.total(script["JOB"].flags, outputs, targets, group)
        (loss * 1024).backward()
        return loss.item(), logits.grad.numpy()

    whole, gradient = loss_and_gradient()
    monkeypatch.setattr(losses, "MOST_LOGITS", 4 * 300 + 1)
    assert [each.stop - each.start for each in losses.stretches(library.zeros([14, 300]))] == [4] * 4
    found = loss_and_gradient()
    assert found[0] == pytest.approx(whole, rel=1e-6)
    assert found[1].dtype == dtype
    assert (found[1] == gradient).all()
    monkeypatch.setattr(losses, "MOST_LOGITS", 1)
    assert (loss_and_gradient()[1] == gradient).all()


@pytest.mark.parametrize("model", ["llama-tiny", "bloom-tiny"])
def test_lora_with_recompute_runs_every_layer_twice(model, monkeypatch):
    """Both sides recompute the first layer behind the frozen embedding too, and so do the same work."""
    monkeypatch.syspath_prepend(ROOT / HERE)
    arguments = [f"--model={model}", "--bsz=1", "--samples=2", "--steps=2", "--warmup-steps=1", "--recompute"]
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", *arguments])
    script = runpy.run_path(str(ROOT / HERE / "finetune_lora.py"))
    flags, checkpoint, plan, world = script["JOB"]
    group = script["parallel"].join(flags, world)
    built = script["build_model"](flags, checkpoint, group)
    layers = built.named_modules() if HERE == "torch" else built.named_sublayers()
    forwards = dict.fromkeys((name for name, _ in layers if name.endswith(".mlp")), 0)
    for name, layer in built.named_modules() if HERE == "torch" else built.named_sublayers():
        if name in forwards:
            layer.register_forward_pre_hook(lambda *_, name=name: forwards.update({name: forwards[name] + 1}))
    inputs, labels = script["to_device"](flags, plan.micro_batches(0, 1)[0][1], group.device)
    script["losses"].total(flags, built(**inputs), labels, group).backward()
    assert list(forwards.values()) == [2, 2, 2, 2]


if HERE == "paddle":

    def input_gradient(layer, x, out_gradient):
        import paddle

        x = paddle.to_tensor(x, stop_gradient=False)
        (layer(x) * paddle.to_tensor(out_gradient)).sum().backward()
        return x.grad.numpy()

    @pytest.fixture
    def norm_and_exact():
        """A LayerNorm with a frozen scale, an input, a gradient of its output, and the gradient of its input."""
        import paddle

        rng = np.random.default_rng(0)
        x, scale, out_gradient = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 16), 16, (6, 16)))
        layer = paddle.nn.LayerNorm(16)
        layer.weight.set_value(paddle.to_tensor(scale))
        exact = input_gradient(layer, x, out_gradient)
        layer.weight.stop_gradient = layer.bias.stop_gradient = True
        return layer, x, out_gradient, exact

    def test_the_layer_norm_correction_is_still_needed(norm_and_exact):
        layer, x, out_gradient, exact = norm_and_exact
        assert np.abs(input_gradient(layer, x, out_gradient) - exact).max() > 0.1

    def test_a_frozen_layer_norm_passes_the_right_gradient(norm_and_exact, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "paddle")
        import layer_norm
        import paddle

        layer, x, out_gradient, exact = norm_and_exact
        first, adapter = paddle.nn.LayerNorm(16), paddle.nn.Linear(16, 16)
        first.weight.stop_gradient = first.bias.stop_gradient = True
        layer_norm.mend_frozen_scales(paddle.nn.Sequential(first, adapter, layer))
        assert input_gradient(layer, x, out_gradient) == pytest.approx(exact, abs=1e-6)
        assert layer.weight.stop_gradient, "the scale itself stays frozen"
