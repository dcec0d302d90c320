"""The layers of a model as torch's compiler makes them (`--compile`)."""

import torch

from tunebench.flags import Flags


def fuse(flags: Flags, model: torch.nn.Module) -> None:
    """Lets torch compile each layer when it is first used: one code for all of them, and for any number of tokens.

    So what is not a product is done in a few passes over memory. Layers one by one are compiled in seconds, where the
    model as a whole takes a time that grows with their number; attention to each sample alone stays outside.
    """
    if not flags.compile:
        return
    for layer in model.modules():
        if type(layer).__name__ in model._no_split_modules:  # transformers' names of its layers
            layer.compile(dynamic=True)
