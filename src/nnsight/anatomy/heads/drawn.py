"""A pass of a tiny model in which every matrix of attention returns numbers drawn at random, with what came of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nnsight.anatomy.direct import Direct
from nnsight.anatomy.interface import Interfaced, interface_of
from nnsight.anatomy.layout import Layer, inside
from nnsight.anatomy.tiny import tiny_ids
from nnsight.anatomy.tiny.inputs import reads_end
from nnsight.anatomy.trial import leaves

PROMPTS = 64  # over which chance correlates two numbers by half, at most, of ten thousands of pairs
_SIZE = 8.0  # so that a clip, where there is one, is felt


class Drawn:
    """What passed, of prompts of one token each: at the first, where sound has more.

    Args:
        model: A tiny model.
        layers: Those whose attention is looked at.
        others: Layers without attention, which are left out: a state space may take its time.

    Attributes:
        inside: For each attention module's path, its q, k, v and z, [prompt, head, d_head].
        drawn: For each matrix beneath one, the numbers, [prompt, out].
        given: What each matrix of a layer, each norm, each attention module and layer was given first, [prompt, in].
        inputs: All that each of these was given.
        returned: What each matrix and each norm makes of that, [prompt, out].
        matrices: The paths of the matrices of each layer.
        norms: Those of the modules without a matrix.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], others: list[Layer]) -> None:
        self.model = model
        self.inside: dict[str, dict[str, Tensor]] = {str(layer.attention): {} for layer in layers}
        self.drawn: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self.returned: dict[str, Tensor] = {}
        self.matrices: dict[str, list[str]] = {}
        self.norms: dict[str, list[str]] = {}
        self._draw = torch.Generator().manual_seed(0)
        kinds = {path: _interior(model.get_submodule(path)) for path in self.inside}
        sites: list[tuple[str, ...]] = [("attention", "scoring")]
        if Direct in kinds.values():
            sites.append(("mixing",))  # of an interior, one site is looked at in a pass
        for names in sites:
            with ExitStack() as stack, torch.no_grad():
                for layer in others:
                    _leave_out(stack, model.get_submodule(layer.path), layer)
                for path in dict.fromkeys(layer.path for layer in layers):
                    self._watch(stack, path, [str(layer.attention) for layer in layers if layer.path == path])
                for path, kind in kinds.items():
                    self._look_inside(stack, path, kind, names)
                model(**_prompts(model))

    def _watch(self, stack: ExitStack, layer: str, attentions: list[str]) -> None:
        self.matrices[layer], self.norms[layer] = [], []
        for name, module in self.model.get_submodule(layer).named_modules(prefix=layer):
            sizes = [one.ndim for one in module.parameters()]
            if name in (layer, *attentions):
                self._hook(stack, name, module, lambda *_: None)
            elif not module._modules and sorted(sizes)[-1:] == [2] and sizes.count(2) == 1:
                self.matrices[layer].append(name)
                beneath = any(name.startswith(f"{one}.") for one in attentions)
                self._hook(stack, name, module, self._replace if beneath else lambda *_: None)
            elif not module._modules:
                self.norms[layer].append(name)
                self._hook(stack, name, module, lambda *_: None)

    def _hook(self, stack: ExitStack, path: str, module: nn.Module, change: Callable[[str, Tensor], Any]) -> None:
        def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            every = [one for _, one in leaves((args, kwargs)) if _of_prompts(one)]
            given = every[0] if every else None
            if given is not None:
                self.given[path] = _of_first_token(given)
                self.inputs[path] = [_of_first_token(one) for one in every]
            if given is None or not isinstance(output, Tensor) or not _of_prompts(output):
                return None
            self.returned[path] = _of_first_token(output)
            return change(path, output)

        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def _replace(self, path: str, output: Tensor) -> Tensor:
        if path not in self.drawn:
            self.drawn[path] = torch.randn(PROMPTS, output.shape[-1], generator=self._draw, dtype=output.dtype) * _SIZE
        of_tokens = self.drawn[path].reshape(PROMPTS, *[1] * (output.ndim - 2), -1)
        return of_tokens.expand(output.shape).clone()

    def _look_inside(self, stack: ExitStack, path: str, kind: Any, names: tuple[str, ...]) -> None:
        ports = {name: port for name, port in kind.ports.items() if name in ("q", "k", "v", "z")}
        found = self.inside[path]
        for site in sorted({port[0] for port in ports.values()} & {*names}):

            def note(_: Any, port: str, value: Any, site: str = site) -> None:
                for name, (where, which, at) in ports.items():
                    if (where, which) == (site, port):
                        array = value if port == "output" else value[0][at]
                        if array.ndim == 4 and array.shape[0] == PROMPTS:
                            found[name] = array[:, 0].clone()

            module = self.model.get_submodule(path)
            stack.enter_context(kind(module).looking(module, module, site, note))


def _leave_out(stack: ExitStack, module: nn.Module, layer: Layer) -> None:
    """Has a layer return the stream that it is given, where that is all it returns."""
    if layer.output.at != () or "forward" in vars(module):
        return
    vars(module)["forward"] = lambda *args, **kwargs: inside((args, kwargs), layer.input.at)
    stack.callback(vars(module).pop, "forward")


def _interior(module: nn.Module) -> Any:
    return Direct if interface_of(type(module)) is None else Interfaced


def _of_prompts(array: Tensor) -> bool:
    return array.ndim > 1 and array.shape[0] == PROMPTS


def _of_first_token(array: Tensor) -> Tensor:
    """[prompt, channel]; of sound there are several tokens."""
    return array.reshape(PROMPTS, -1, array.shape[-1])[:, 0].clone()


def _prompts(model: nn.Module) -> dict[str, Any]:
    """One token for each prompt: of the tiny ids, again and again. Sound stays as long as it is."""
    ids, others = tiny_ids(model)
    main = getattr(model, "main_input_name", "input_ids")
    many = PROMPTS // 2
    one = ids[:, -1:] if reads_end(model) else ids[:, :1]
    given = {main: ids if ids.is_floating_point() else one, **others}
    if "decoder_input_ids" in given:
        given["decoder_input_ids"] = given["decoder_input_ids"][:, :1]
    return {
        name: one.repeat(many, *[1] * (one.ndim - 1)) if isinstance(one, Tensor) else one for name, one in given.items()
    }
