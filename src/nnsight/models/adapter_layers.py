"""The layers of PEFT adapters in a model: found, and left out of a view's runs."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from nnsight.errors import AdapterError


def layer_kinds() -> tuple[Any, ...]:
    """The classes of adapters' layers; none, as long as nobody has imported peft."""
    if "peft.tuners.tuners_utils" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def layers_in(root: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The adapters' layers in a model, with the modules above and their names there."""
    kinds = layer_kinds()
    return [
        (parent, name, child)
        for parent in (root.modules() if kinds else ())
        if not isinstance(parent, kinds)
        for name, child in parent._modules.items()
        if isinstance(child, kinds)
    ]


def check_unmerged(root: nn.Module) -> None:
    """Raises AdapterError where an adapter's weights are added to the model's own."""
    for _, name, layer in layers_in(root):
        if getattr(layer, "merged", False):
            raise AdapterError(
                f"The adapter is merged into the weights of `{name}`, and can't be told from them.",
                instead="unmerge_adapter(), of peft's model, or unmerge(), of each of its layers",
            )


def base_of(layer: nn.Module) -> nn.Module:
    """What an adapter's layer stands in place of."""
    while isinstance(layer, layer_kinds()):
        layer = layer.get_submodule(base_name(layer))
    return layer


def base_name(layer: nn.Module) -> str:
    return "base_layer" if "base_layer" in layer._modules else "original_module"


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside a PeftModel, in which the adapter's layers are; any other module itself.

    Raises:
        AdapterError: The PeftModel does more than its layers do.
    """
    if "peft.peft_model" not in sys.modules:
        return module
    from peft import PeftMixedModel, PeftModel

    if not isinstance(module, (PeftModel, PeftMixedModel)):
        return module
    config = getattr(module, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        raise AdapterError(
            f"This {type(module).__name__} adds tokens in front of the prompt, in its own forward.",
            instead="NNsight(module), which takes it as it is",
        )
    inner: nn.Module = module.get_base_model()
    return inner


def leave_out(layer: Any) -> None:
    """An edit of an adapter's layer, in which it is what it stands in place of."""
    if isinstance(layer._module, layer_kinds()):
        check_unmerged(layer._tree.root)
        args, kwargs = layer.inputs
        layer.output = layer[base_name(layer._module)](*args, **kwargs)


def leave_all_out(model: Any) -> None:
    """Has a view of a model run without its adapter, whichever that is: first of its edits."""
    own = [edit for edit in model._tree.edits if not edit.makes_view]
    model._tree.edits = ()
    for parent, name, _ in layers_in(model._tree.root):
        path = ".".join(filter(None, [model._tree.path(parent), name]))
        model._below(path).edit(leave_out, inplace=True)
        model._tree.edits[-1].makes_view = True
    model._tree.edits = (*model._tree.edits, *own)
