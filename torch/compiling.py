"""The layers of a model as torch's compiler makes them (`--compile`)."""

import parallel
import torch

from tunebench.flags import Flags


def compile_layers(flags: Flags, model: torch.nn.Module) -> None:
    """Lets torch compile each layer when it is first used: one code for all of them, and for any number of tokens.

    So what is not a product is done in a few passes over memory. Layers one by one are compiled in seconds, where the
    model as a whole takes a time that grows with their number; attention to each sample alone stays outside.
    """
    if not flags.compile:
        return
    # transformers' names of its layers
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    if flags.zero == 3:
        if not model.get_input_embeddings().weight.requires_grad:
            # DeepSpeed reduces such a layer's gradients as soon as its input's is there; the first one's needs none.
            layers = layers[1:]
        set_leaf = parallel.import_deepspeed().utils.set_z3_leaf_module
        for layer in layers:
            set_leaf(layer, True)  # its weights are gathered at once, by no hooks inside that would cut the code apart
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
