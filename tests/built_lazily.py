"""Runs a Paddle script whose model has no memory before its weights are set.

    TUNEBENCH_PROBE=paddle/finetune_full.py python tests/built_lazily.py --model llama-tiny --mp 2

`set_value` takes the same branch for a weight without memory as for one on a GPU: it copies bytes and strides. The
script, its workers and the framework are the real ones; the flags are the script's. Only the building of the model is
under LazyGuard, and the loading is followed by a check that every weight is contiguous.
"""

import os

from bytes_held import ROOT, load

if __name__ == "__main__":
    script = load(ROOT / os.environ["TUNEBENCH_PROBE"])
    import paddle
    from paddlenlp.transformers.model_utils import no_init_weights

    models, weights = script.library.transformers.AutoModelForCausalLM, script.weights
    build, fill = models.from_config, weights.load

    def build_without_memory(*arguments, **options):
        with no_init_weights(), paddle.LazyGuard():
            return build(*arguments, **options)

    def fill_and_check(model, checkpoint):
        assert not any(p._is_initialized() for p in model.parameters()), "the model has memory already"
        fill(model, checkpoint)
        strided = [name for name, p in model.named_parameters() if not p.is_contiguous()]
        assert not strided, f"not contiguous: {strided}"

    models.from_config, weights.load = build_without_memory, fill_and_check
    with script.recorded(script.FRAMEWORK, script.METHOD, script.JOB) as run:
        script.main(run)
