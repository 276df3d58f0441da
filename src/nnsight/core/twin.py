"""A twin of a model: a copy whose tensors are fake, run on fake inputs.

It tells which modules a forward pass calls, so that an error can tell a module that is past from one that is never
called; and which axes of a value are rows (measuring.py). Neither the model nor the user's inputs are touched:
everything that the forward pass could change is a copy.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from nnsight.core.compiled import allow_compiled, force_eager, is_compiled
from nnsight.core.copies import fake_copy, quiet, watch
from nnsight.core.specs import Inputs, TensorSpec, Weak, specs_in
from nnsight.core.values import mapped


class Calls(NamedTuple):
    """Which modules a forward pass calls (the model's own, not the twin's), in the order of their start.

    `around` has the modules that were running when one was called. `complete` is False where the twin could not run
    to its end: on a branch that depends on values, say.
    """

    order: list[nn.Module]
    around: dict[nn.Module, set[nn.Module]]
    complete: bool


def calls_of(module: nn.Module, inputs: Inputs | None) -> Calls:
    """Runs a twin of `module` on inputs that look like `inputs`."""
    recorder = _Recorder()
    if inputs is None:
        return Calls(recorder.order, recorder.around, False)
    try:
        twin = Twin(module, inputs)
        for original, part in twin.parts:
            recorder.watch(part, original)
        twin.run(inputs)
    except Exception:  # noqa: BLE001  any model may fail on fake tensors in any way, and then we just know less
        return Calls(recorder.order, recorder.around, False)
    return Calls(recorder.order, recorder.around, True)


class _Recorder:
    def __init__(self) -> None:
        self.order: list[nn.Module] = []
        self.around: dict[nn.Module, set[nn.Module]] = {}
        self._running: list[nn.Module] = []

    def watch(self, part: nn.Module, original: nn.Module) -> None:
        watch(part, lambda *_: self._enter(original), lambda *_: self._leave())

    def _enter(self, original: nn.Module) -> None:
        self.order.append(original)
        self.around.setdefault(original, set()).update(self._running)
        self._running.append(original)

    def _leave(self) -> None:
        self._running.pop()


class Twin:
    """A copy of a module whose tensors are fake, without the hooks of others.

    `parts` pairs the modules with their copies; in `sorting`, tokens come in another order than in the copy. The
    inputs' device is where weights would be that aren't there yet.
    """

    has_values: ClassVar[bool] = False

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        device = next((spec.device for _, spec in specs_in(inputs)), None)  # of weights that aren't loaded yet
        self._module, _ = fake_copy(module, self._mode, device)
        self.parts = list(zip(module.modules(), self._module.modules(), strict=True))
        for part in self._module.modules():
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False  # which has no axes
        self._is_compiled = any(is_compiled(part) for _, part in self.parts)
        self.sorting = self._choose_experts()
        for part in self._module.modules():
            if "rope_deltas" in vars(part):  # what Qwen-VL keeps of its last run's prompts
                vars(part)["rope_deltas"] = None

    def _choose_experts(self) -> set[nn.Module]:
        """Has mixtures of experts computed in the way of transformers' that runs on fake tensors of every type.

        Returns:
            The mixtures of the model that compute in another way: they sort the tokens by expert first.
        """
        choose: Any = getattr(self._module, "set_experts_implementation", None)
        if choose is None:
            return set()
        mixtures = [pair for pair in self.parts if hasattr(type(pair[1]), "_apply_gate")]
        before = [getattr(copied.config, "_experts_implementation", None) for _, copied in mixtures]
        choose("batched_mm")
        return {
            mixture
            for (mixture, copied), way in zip(mixtures, before, strict=True)
            if getattr(copied.config, "_experts_implementation", None) != way
        }

    def run(self, inputs: Inputs, fn: str | None = None) -> Any:
        """Calls the copy, or its method `fn`, on inputs that look like `inputs`."""
        from torch._subclasses.fake_tensor import FakeCopyMode

        with FakeCopyMode(self._mode):
            args, kwargs = copy.deepcopy([awake(value) for value in inputs])
        call = getattr(self._module, fn) if fn else self._module
        if self._is_compiled:
            force_eager()
        try:
            with self._mode, torch.no_grad(), torch.random.fork_rng(devices=()), quiet:
                return call(*_fake(args), **_fake(kwargs))
        finally:
            if self._is_compiled:
                allow_compiled()


def awake(value: Any) -> Any:
    """An input, with what is held weakly in it itself."""
    if isinstance(value, Weak):
        if (referent := value.reference()) is None:
            raise LookupError("an input is gone")
        return referent
    return _through(value, awake)


def _fake(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return _through(value, _fake)


def _through(value: Any, change: Any) -> Any:
    new = mapped(value, lambda _, item: change(item))
    return value if new is None else new
