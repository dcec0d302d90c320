"""The attention kernels: equal losses from each on every family, and the record names the one that ran."""

import pytest

pytestmark = pytest.mark.frameworks
FUSED_ON_CPU = {"torch": "scaled_dot_product_flash_attention_for_cpu", "paddle": "softmax"}  # Paddle has none there


@pytest.mark.parametrize("family", ["llama", "bloom", "chatglm2", "qwen2"])
@pytest.mark.parametrize(("framework", "attention"), [("torch", "sdpa"), ("torch", "flash"), ("paddle", "flash")])
def test_same_losses_from_every_kernel(alone, forked, short, tmp_path, framework, attention, family):
    """The batches have rows of different lengths: padding that is attended to would show.

    What Paddle runs for `sdpa` is what it runs for `flash`.
    """
    eager = alone(framework, family, "full")
    fused = forked.train(
        framework, "full", tmp_path / "r.json", f"--model={family}-tiny", *short, f"--attention={attention}"
    )
    assert (eager.setup.attention, eager.kernels.attention) == ("eager", ["softmax"])
    assert (fused.setup.attention, fused.kernels.attention) == (attention, [FUSED_ON_CPU[framework]])
    assert fused.steps.loss == pytest.approx(eager.steps.loss, rel=1e-5)
    assert fused.steps.grad_norm == pytest.approx(eager.steps.grad_norm, rel=1e-4)


@pytest.mark.parametrize("framework", ["torch", "paddle"])
def test_fused_with_adapters_and_recompute(alone, forked, short, tmp_path, framework):
    eager = alone(framework, "bloom", "lora")
    flags = ["--model=bloom-tiny", *short, "--attention=flash", "--recompute"]
    fused = forked.train(framework, "lora", tmp_path / "r.json", *flags)
    assert fused.steps.loss == pytest.approx(eager.steps.loss, rel=1e-5)


def test_another_kernel_is_not_passed_off_as_flash(forked, short, tmp_path):
    """A run of `flash` fails where torch does not use its flash kernel."""
    switch = "import torch; torch.backends.cuda.enable_flash_sdp(False)"
    flags = ["--model=llama-tiny", *short]
    flash = forked.train("torch", "full", tmp_path / "flash", *flags, "--attention=flash", code=switch)
    assert flash.status == "failed"
    assert "kernel" in flash.reason.lower()
    sdpa = forked.train("torch", "full", tmp_path / "sdpa", *flags, "--attention=sdpa", code=switch)
    assert sdpa.status == "failed"
    assert sdpa.reason.endswith("--attention sdpa: what ran is safe_softmax")
