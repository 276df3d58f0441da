"""Finds a mixture of experts in a layer, by arithmetic on a small model of the same architecture.

The experts are the module that is given, beside the tokens, the indices of some experts for each, and as many weights.
One expert's part is what that makes of its own tokens alone; all parts together have to be what it returns. The router
is the last product with a matrix in front of that on which indices or weights depend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nnsight.anatomy.layout import Layer, Part, Place, inside
from nnsight.anatomy.mlps.inside import Mixture, Routed
from nnsight.anatomy.mlps.neurons import before_norms, calls_in, is_norm, part_of, rows_of
from nnsight.anatomy.mlps.within import find_within
from nnsight.anatomy.trial import Trial, ratio, same
from nnsight.core.values import tensors_in

_Sum = tuple[Part, float, str | None, tuple[Part, ...]]  # as a mixture has it: into, factor, norm, shared


class Product(NamedTuple):
    """A call of `linear`: the modules in whose calls it was, outermost first, and its place among all such calls."""

    around: tuple[str, ...]
    weight: Tensor
    output: Tensor
    number: int


@dataclass
class Experts:
    """A call of a module that is given indices, and as many weights."""

    path: str
    inputs: Any
    hidden: Place
    chosen: Place
    weights: Place


class Recording:
    """One more pass of a trial's model: what modules are given indices, and all products with matrices."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.products: list[Product] = []
        self.experts: dict[str, Experts] = {}
        self.before: dict[str, int] = {}  # how many products were computed before a module was called
        self._running: list[str] = []
        handles: list[Any] = []
        for path, module in trial.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._begins(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._ends))
        try:
            with _Products(self._multiplied):
                trial.run()
        finally:
            for handle in handles:
                handle.remove()

    def _begins(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append(path)
            self.before.setdefault(path, len(self.products))
            found = _experts_in((args, kwargs))
            if found is not None and path not in self.experts:
                kept = _copied((args, kwargs))
                self.experts[path] = Experts(path, kept, *found)

        return hook

    def _ends(self, *_: Any) -> None:
        self._running.pop()

    def _multiplied(self, weight: Tensor, output: Tensor) -> Tensor:
        self.products.append(Product(tuple(self._running), weight, output.clone(), len(self.products)))
        return output

    def router_of(self, layer: Layer, path: str, rows: int, places: tuple[Place, ...]) -> Product | None:
        """The last product in front of a module of a layer on which what stands in these places of its inputs depends.

        It has so many rows: one for each token.
        """
        products = self.products[: self.before[path]]
        products = [one for one in products if layer.path in one.around and rows_of(one.output) == rows]
        known = self._given(path, places)
        return next((one for one in reversed(products) if self._given(path, places, one) != known), None)

    def _given(self, path: str, places: tuple[Place, ...], negated: Product | None = None) -> Any:
        """What stands there, with the sign of a product changed."""
        seen: list[Any] = []
        count = 0

        def answer(_: Tensor, output: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return -output if negated is not None and count == negated.number + 1 else output

        def watch(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append([inside((args, kwargs), at).tolist() for at in places])

        handle = self.trial.model.get_submodule(path).register_forward_pre_hook(watch, with_kwargs=True)
        try:
            with _Products(answer):
                self.trial.run()
        finally:
            handle.remove()
        return seen[0]


class _Products(TorchFunctionMode):
    """Has each product with a matrix told, and replaced by what is answered."""

    def __init__(self, tell: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return self._tell(args[1], output) if func is functional.linear and len(args) > 1 else output


def _experts_in(inputs: Any) -> tuple[Place, Place, Place] | None:
    """Where among the inputs tokens, indices and weights are: [..., model], [..., k] of integers, and [..., k]."""
    tensors = list(tensors_in(inputs))
    for at, chosen in tensors:
        if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.ndim < 2:
            continue
        alike = [one for one, tensor in tensors if tensor.is_floating_point() and tensor.shape == chosen.shape]
        hidden = [
            one
            for one, tensor in tensors
            if tensor.is_floating_point() and rows_of(tensor) == rows_of(chosen) and one not in alike
        ]
        if len(alike) == len(hidden) == 1:
            return hidden[0], at, alike[0]
    return None


def _copied(inputs: Any) -> Any:
    args, kwargs = inputs
    copies = [one.clone() if isinstance(one, Tensor) else one for one in args]
    return tuple(copies), {name: one.clone() if isinstance(one, Tensor) else one for name, one in kwargs.items()}


def find_mixture(trial: Trial, recording: Recording, layer: Layer) -> Mixture | str | None:
    """The mixture of experts in a layer's MLP; None where there is none, and why where its sum was not found."""
    inside_it = (one for one in recording.experts.values() if one.path.startswith(f"{layer.path}."))
    experts = next((one for one in inside_it if trial.calls[one.path].count == 1), None)
    if experts is None:
        return _stacked(trial, recording, layer)
    call = trial.calls[experts.path]
    if len(call.outputs) != 1 or call.outputs[0][1].shape != inside(experts.inputs, experts.hidden).shape:
        return f"`{experts.path}` is given indices, but returns no sum for each token"
    hidden, chosen, weights = (
        Part(call.path, "input", at, flat=inside(experts.inputs, at).ndim == 2)
        for at in (experts.hidden, experts.chosen, experts.weights)
    )
    out = part_of(call, "output")
    added = _added_up(trial, layer, out, trial.value(out))
    if added is None:
        return f"what is made of the sum that `{experts.path}` returns is not known"
    mixture = Mixture(None, call.path, hidden, chosen, weights, out, *added, counted="")
    rows = rows_of(inside(experts.inputs, experts.chosen))
    product = recording.router_of(layer, call.path, rows, (experts.chosen, experts.weights))
    counted = _counted(trial, mixture, experts, None if product is None else _weight_of(trial, layer, product))
    if counted is None:
        return f"what `{experts.path}` returns is not the sum of what each expert makes"
    if product is None and counted.count(trial.model) == 1:  # nothing depends on the router of one expert
        products = recording.products[: recording.before[call.path]]
        found = (one for one in products if layer.path in one.around and one.output.shape[-1] == 1)
        product = next((one for one in found if rows_of(one.output) == rows), None)
    router = None if product is None else _router(trial, recording, layer, product)
    return replace(counted, router=router, within=find_within(trial.model, counted, experts.inputs))


def _stacked(trial: Trial, recording: Recording, layer: Layer) -> Mixture | None:
    """A mixture whose module is given all tokens for each expert, and returns what each makes of them: Llama 4's."""
    stream = trial.value(layer.input)
    rows = rows_of(stream)
    for call in [one for one in trial.calls.values() if one.path.startswith(f"{layer.path}.") and one.count == 1]:
        if not call.outputs or not call.inputs or call.outputs[0][1].shape != call.inputs[0][1].shape:
            continue
        (at, made), names = call.outputs[0], [name for name, one in call.module.named_parameters() if one.ndim == 3]
        count = rows_of(made) // rows
        if made.ndim != 2 or count < 2 or rows_of(made) % rows or not names:
            continue
        if call.module.get_parameter(names[0]).shape[0] != count:
            continue
        out = Part(call.path, "output", at)
        total = made.unflatten(0, (count, -1)).sum(0).reshape(stream.shape)
        added = _added_up(trial, layer, out, total)
        if added is None:
            continue
        given = Part(call.path, "input", call.inputs[0][0])
        product = recording.router_of(layer, call.path, rows, (given.at,))
        router = None if product is None else _router(trial, recording, layer, product)
        counted = f"{call.path}.{names[0]}"
        mixture = Mixture(router, call.path, given, None, None, out, *added, counted=counted)
        at, every = call.inputs[0]
        inputs = ((every,), {}) if at[0] == 0 else ((), {at[1]: every})
        return replace(mixture, within=find_within(trial.model, mixture, inputs))
    return None


def _added_up(trial: Trial, layer: Layer, out: Part, total: Tensor) -> _Sum | None:
    """What the sum over experts is added up in, times what, in front of which norm, and with what else.

    Args:
        out: What the experts' module returns.
        total: The sum, [prompt, token, model].
    """
    twice = 2 * trial.value(out)
    for part in layer.mlp:
        if part.by is not None:  # no mixture was met that is scaled channel by channel
            continue
        into, norm = before_norms(trial, layer, part)
        whole = trial.value(into)
        factor = ratio(total, trial.again({out: twice}, into) - whole)
        if factor is None:
            continue
        scale = part.scale if norm is None else 1.0
        rest = whole - factor * total
        shared = [other for other in layer.mlp if other is not part and norm is None]
        if float(rest.abs().max()) > 1e-4 * float(whole.abs().max()):
            found = [*_rest(trial, layer, out.path, rest, scale), *shared]
            shared = found or [replace(out, scale=-factor * scale), replace(into, scale=scale)]
        return into, factor * scale, norm, tuple(shared)
    for call in calls_in(trial, layer):  # Gemma 4 has a norm for it alone
        given = part_of(call, "input")
        if is_norm(call.module, total.shape[-1]) and same(trial.value(given), total):
            return given, 1.0, call.path, ()
    return None


def _rest(trial: Trial, layer: Layer, path: str, rest: Tensor, scale: float) -> list[Part]:
    """The module whose output, times a number, is what else is added; none, if there is no such."""
    for call in sorted(calls_in(trial, layer, leaves=False), key=lambda call: call.path.count(".")):
        part = part_of(call, "output")
        if call.path.startswith(path) or trial.value(part).shape != rest.shape:
            continue
        if (factor := ratio(trial.value(part), rest)) is not None:
            return [replace(part, scale=factor * scale, changes=(call.path, part.at) in trial.changed)]
    return []


def _counted(trial: Trial, mixture: Mixture, experts: Experts, weight: str | None) -> Mixture | None:
    """The mixture with what has an entry for each expert: their parts together are what the module returns."""
    module = trial.model.get_submodule(mixture.path)
    prefix = mixture.path
    stacked = [f"{prefix}.{name}" for name, one in module.named_parameters() if one.ndim == 3]
    listed = [f"{prefix}.{name}".rstrip(".") for name, one in module.named_modules() if isinstance(one, nn.ModuleList)]
    names = dict.fromkeys([*([] if weight is None else [weight]), *stacked, *listed])  # a router is never quantized
    most = int(inside(experts.inputs, experts.chosen).max())
    tried = (replace(mixture, counted=name, wide=wide) for wide in (False, True) for name in names)
    fitting = (one for one in tried if one.count(trial.model) > most and _adds_up(trial, one, module, experts))
    return min(fitting, key=lambda one: (one.wide, one.count(trial.model)), default=None)


def _adds_up(trial: Trial, mixture: Mixture, module: nn.Module, experts: Experts) -> bool:
    total = trial.value(mixture.out)
    try:
        with torch.no_grad():
            parts = [mixture.alone(module, experts.inputs, index) for index in range(mixture.count(trial.model))]
    except Exception:  # noqa: BLE001  a module may refuse other inputs than the model gives it in any way
        return False
    return same(sum(parts[1:], parts[0]).reshape(total.shape), total)


def _weight_of(trial: Trial, layer: Layer, product: Product) -> str | None:
    """The parameter that is this product's matrix."""
    module = trial.model.get_submodule(layer.path)
    for name, one in module.named_parameters():
        if one.shape == product.weight.shape and torch.equal(one, product.weight):
            return f"{layer.path}.{name}"
    return None


def _router(trial: Trial, recording: Recording, layer: Layer, product: Product) -> Part | Routed | None:
    """Where a router's logits are: what a module returns, or in the forward of one."""
    owner = product.around[-1]
    call, flat = trial.calls[owner], product.output.ndim == 2
    if call.count != 1:
        return None
    if len(call.outputs) == 1 and torch.equal(call.outputs[0][1], product.output) and not call.module._modules:
        return Part(owner, "output", call.outputs[0][0], flat=flat)
    weight = _weight_of(trial, layer, product)
    alike = [one for one in recording.products if owner in one.around and one.weight.shape == product.weight.shape]
    return Routed(owner, weight, flat) if weight is not None and alike[0].number == product.number else None
