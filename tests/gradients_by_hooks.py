"""Gradients at the outputs of modules by torch's own hooks, to compare with."""

import copy

import torch


def by_hand(module, x, names, change=None):
    """The gradients of `output.square().sum()` at the named modules' outputs, by hooks alone; also the parameters'.

    `change` maps a name to a function of the gradient, which replaces it.
    """
    module = copy.deepcopy(module)
    found, change = {}, change or {}

    def catch(name):
        def hook(_, __, output):
            tensor = next(iter(_tensors_in(output)))

            def at_gradient(gradient):
                found[name] = gradient.clone()
                return change[name](gradient) if name in change else None

            tensor.register_hook(at_gradient)

        return hook

    for name in names:
        module.get_submodule(name).register_forward_hook(catch(name))
    module(x).square().sum().backward()
    return found, {name: parameter.grad for name, parameter in module.named_parameters()}


def _tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
