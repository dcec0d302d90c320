"""Each preset, also at full size, as this environment's framework builds it: shapes without memory."""

import math
import sys

import pytest
from conftest import HERE, ROOT

from tunebench.models.checkpoint import Checkpoint
from tunebench.models.config import normalise
from tunebench.models.families import family_of
from tunebench.models.presets import PRESETS


def built_by_torch(checkpoint):
    import torch
    import weights
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(weights.read_config(checkpoint)).parameters()


def built_by_paddle(checkpoint):
    import paddle
    import weights
    from paddlenlp import transformers
    from paddlenlp.transformers.model_utils import no_init_weights

    config = weights.read_config(checkpoint)
    if hasattr(config, "max_position_embeddings"):  # each layer fills tables of this length, which are no parameters
        config.max_position_embeddings = 16
    with paddle.LazyGuard(), no_init_weights():
        return transformers.AutoModelForCausalLM.from_config(config).parameters()


@pytest.mark.parametrize("name", PRESETS)
def test_the_framework_builds_the_parameters_of_the_config(monkeypatch, tmp_path, name):
    checkpoint = Checkpoint(tmp_path, normalise(PRESETS[name].config), [], "")
    monkeypatch.setattr(sys, "path", [str(ROOT / HERE), *sys.path])
    build = built_by_torch if HERE == "torch" else built_by_paddle
    parameters = sum(math.prod(parameter.shape) for parameter in build(checkpoint))
    assert parameters == sum(map(math.prod, family_of(checkpoint.config).tensors(checkpoint.config).values()))
