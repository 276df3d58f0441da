"""One forward pass of a small model, with all that passed each module: what discovery looks for sums in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nnsight.anatomy.layout import Part, Place, inside, with_inside
from nnsight.anatomy.multihead import is_whole, opened
from nnsight.anatomy.tiny.inputs import ANSWER, BATCH, LENGTH
from nnsight.core.tree import is_below

Leaves = list[tuple[Place, Tensor]]
IsNow = Callable[[str], bool]  # of a module's path


def leaves(value: Any, at: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """The floating-point tensors in a port's value, with their places, through tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield at, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, (*at, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*at, key))


@dataclass
class Call:
    """A call of a module: copies of what it was given and what it returned, and when it was.

    `count`: of a module's first call, how many there were.
    """

    path: str
    module: nn.Module
    began: int
    inputs: Leaves
    outputs: Leaves = field(default_factory=list)
    ended: int = -1
    count: int = 1

    def part(self, port: str, at: Place) -> Part:
        return Part(self.path, port, at)


class Trial:
    """A model's forward pass on inputs of its own, recorded."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.calls: dict[str, Call] = {}  # the first of each module
        self.later: list[Call] = []
        self._open: list[Call] = []
        self.changed: set[tuple[str, Place]] = set()  # outputs that the model changed in place afterwards
        self.attending: list[str] = []  # modules in whose own forward attention is computed, in order
        self._running: list[str] = []
        self._clock = 0
        self._returned: dict[str, Leaves] = {}  # the very tensors
        self._turn: tuple[str, int] | None = None  # in which call of a module values are replaced and looked at
        handles: list[Any] = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._begins(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._ends(path)))
        try:
            with _Attention(self._attends):
                self.output = self.run()
        finally:
            for handle in handles:
                handle.remove()
        for path, returned in self._returned.items():
            for (at, tensor), (_, copied) in zip(returned, self.calls[path].outputs, strict=True):
                if not torch.equal(tensor, copied):
                    self.changed.add((path, at))
        self._returned.clear()

    def _attends(self) -> None:
        around = [path for path in self._running if not isinstance(self.model.get_submodule(path), nn.Softmax)]
        if around and around[-1] not in self.attending:
            self.attending.append(around[-1])

    def run(self) -> Any:
        with torch.no_grad():
            return self.model(**self.inputs)

    def _begins(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._clock += 1
            self._running.append(path)
            given = [(at, tensor.clone()) for at, tensor in leaves((args, kwargs))]
            call = Call(path, module, self._clock, given)
            self._open.append(call)
            if path in self.calls:
                self.calls[path].count += 1
                self.later.append(call)
            else:
                self.calls[path] = call

        return hook

    def _ends(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._clock += 1
            self._running.pop()
            call = self._open.pop()
            returned = list(leaves(output))
            call.outputs = [(at, tensor.clone()) for at, tensor in returned]
            call.ended = self._clock
            if call is self.calls[path]:
                self._returned[path] = returned

        return hook

    def in_call(self, call: Call) -> Trial:
        """The same pass with what is inside one call of a module that is called several times: of all that stands
        below it, this call's alone; `again` replaces values in this call.
        """
        one: Trial = copy(self)
        every = [*self.calls.values(), *self.later]
        own = [other for other in every if call.began <= other.began <= call.ended and is_below(other.path, call.path)]
        one.calls = {path: other for path, other in self.calls.items() if not is_below(path, call.path)}
        one.later = [other for other in self.later if not is_below(other.path, call.path)]
        for other in sorted(own, key=lambda other: other.began):
            if other.path in one.calls:
                one.calls[other.path].count += 1
                one.later.append(other)
            else:
                one.calls[other.path] = replace(other, count=1)
        before = [other for other in every if other.path == call.path and other.began < call.began]
        one._turn = call.path, len(before)
        return one

    def value(self, part: Part) -> Tensor:
        call = self.calls[part.path]
        found = next(tensor for at, tensor in (call.inputs if part.port == "input" else call.outputs) if at == part.at)
        found = found if part.piece is None else part.piece.of(found)
        return _unflat(found) if part.flat else found

    def again(self, replaced: Mapping[Part, Tensor], watched: Part) -> Tensor:
        """Another pass, in which some values are replaced; what then stands at `watched`. It goes no further."""
        with self._counting() as is_now, self._with_replaced(replaced, is_now), torch.no_grad():
            return self._until(watched, is_now)

    def is_shared(self, given: Part, stream: Part) -> bool:
        """Whether others read the very tensor that a module is given, before or behind it.

        Then a change of it in place is theirs too, and its gradient is of what they make of it.

        Args:
            given: What the module is given.
            stream: What comes out of the layer.
        """
        module = self.model.get_submodule(given.path)
        value = self.value(given)
        more = 1.0 + value.abs()
        tensors: list[Tensor] = []

        def change(_: Any, args: Any, kwargs: Any) -> None:
            if is_now(given.path):
                tensor = inside((args, kwargs), given.at)
                tensor.add_(more.reshape(tensor.shape))

        def copied(_: Any, args: Any, kwargs: Any) -> Any:
            if not is_now(given.path):
                return None
            tensor = inside((args, kwargs), given.at)
            tensors[:] = [tensor, tensor.clone()]
            return with_inside((args, kwargs), given.at, tensors[1])

        with (
            self._counting() as is_now,
            module.register_forward_pre_hook(change, with_kwargs=True),
            torch.no_grad(),
        ):
            changed = self._until(stream, is_now)
        if not same(self.again({given: value + more}, stream), changed):
            return True
        with (
            self._counting() as is_now,
            module.register_forward_pre_hook(copied, with_kwargs=True),
            torch.enable_grad(),
        ):
            made = self._until(stream, is_now)
        weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
        if not tensors[0].requires_grad:
            return False
        total, own = torch.autograd.grad((made * weights).sum(), tensors)
        return not same(own, total)

    @contextmanager
    def _counting(self) -> Iterator[IsNow]:
        """Tells whether what a module is given or returns just now is meant: in another pass, in the same call."""
        if self._turn is None:
            yield lambda _: True
            return
        (outer, index), begun = self._turn, 0

        def begins(*_: Any) -> None:
            nonlocal begun
            begun += 1

        with self.model.get_submodule(outer).register_forward_pre_hook(begins):
            yield lambda path: not is_below(path, outer) or begun == index + 1

    def _until(self, watched: Part, is_now: IsNow) -> Tensor:
        """What stands there in a pass that ends there."""
        found: list[Tensor] = []

        def watch(_: Any, args: Any, kwargs: Any, output: Any = None) -> None:
            if not is_now(watched.path):
                return
            value = inside((args, kwargs) if watched.port == "input" else output, watched.at).clone()
            found.append(_unflat(value) if watched.flat else value)
            raise _Seen

        module = self.model.get_submodule(watched.path)
        if watched.port == "input":
            handle = module.register_forward_pre_hook(watch, with_kwargs=True)
        else:
            handle = module.register_forward_hook(watch, with_kwargs=True)
        try:
            self.model(**self.inputs)
        except _Seen:
            pass
        finally:
            handle.remove()
        return found[0]

    @contextmanager
    def _with_replaced(self, replaced: Mapping[Part, Tensor], is_now: IsNow) -> Iterator[None]:
        handles = []
        for part, value in replaced.items():
            module = self.model.get_submodule(part.path)
            if part.port == "input":

                def before(_: Any, args: Any, kwargs: Any, part: Part = part, value: Tensor = value) -> Any:
                    return _with((args, kwargs), part, value) if is_now(part.path) else None

                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(_: Any, __: Any, output: Any, part: Part = part, value: Tensor = value) -> Any:
                    return _with(output, part, value) if is_now(part.path) else None

                handles.append(module.register_forward_hook(after))

        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Seen(Exception):
    """What a pass was for is known."""


def _unflat(value: Tensor) -> Tensor:
    """[prompt, token, model] of what has prompts and tokens on one axis; a decoder has other tokens."""
    width = value.shape[-1]
    n_prompts = BATCH if (value.numel() // width) % LENGTH else -1
    return value.reshape(n_prompts, LENGTH if n_prompts < 0 else -1, width)


def _with(whole: Any, part: Part, value: Tensor) -> Any:
    """A port's value with another part: of its own memory, since some models change it in place."""
    new = inside(whole, part.at).clone()
    piece = new if part.piece is None else part.piece.of(new)
    piece[...] = value.reshape(piece.shape)
    return with_inside(whole, part.at, new)


class _Attention(TorchFunctionMode):
    """Tells of each attention that torch computes, and of each softmax over [prompt, head, query, key].

    Prompts and heads may be one axis.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_whole(func):
            return opened(self, args, kwargs or {})
        if func is functional.scaled_dot_product_attention or (func in _SOFTMAXES and args and _is_pattern(args[0])):
            self._tell()
        return func(*args, **(kwargs or {}))


_SOFTMAXES = {functional.softmax, torch.softmax, Tensor.softmax}


def _is_pattern(array: Tensor) -> bool:
    return array.ndim == 4 or (array.ndim == 3 and {*array.shape[1:]} <= {LENGTH, ANSWER})


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, but for rounding."""
    if one.shape != other.shape:
        return False
    size = float(other.abs().max())
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-4 * max(size, 1e-6)))


def ratio(value: Tensor, other: Tensor) -> float | None:
    """The number that makes `other` of `value`, if there is one."""
    if same(value, other):
        return 1.0
    square = float((value.double() ** 2).sum())
    scale = float((value.double() * other.double()).sum()) / square if square else 0.0
    return scale if scale and same(value * scale, other) else None
