"""Compiles the layers of a model with torch's compiler (`--compile`)."""

import functools

import parallel
import torch

from tunebench.flags import Flags


def compile_layers(flags: Flags, model: torch.nn.Module) -> None:
    """Lets torch compile each layer at its first use. All layers share the code, for any number of tokens.

    Compiled code does what is not a matrix product in a few passes over memory. Compiling a layer takes seconds;
    compiling the whole model takes longer the more layers it has. Attention sample by sample is not compiled. The
    collectives of tensor parallelism are part of the compiled code. With --recompute the backward pass runs the
    compiled forward pass again.
    """
    if not flags.compile:
        return
    layers = parallel.layers_of(model)
    if flags.zero == 3 and flags.deepspeed:
        if not model.get_input_embeddings().weight.requires_grad:
            # DeepSpeed reduces a leaf's gradients once its input has a gradient. The first layer's input needs none.
            layers = layers[1:]
        set_leaf = parallel.import_deepspeed().utils.set_z3_leaf_module
        for layer in layers:
            set_leaf(layer, True)  # gathers a layer's weights at once: hooks inside would cut the code apart
    for layer in layers:
        recomputes, layer.gradient_checkpointing = layer.gradient_checkpointing, False
        layer.forward = torch.compile(layer.forward, dynamic=True)
        if recomputes:
            # Around the compiled code, since torch compiles no checkpoint of which a part, attention, is not compiled.
            layer.forward = functools.partial(layer._gradient_checkpointing_func, layer.forward)
