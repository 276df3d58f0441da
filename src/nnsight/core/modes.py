"""What torch keeps per thread, and a block and its model must not share: grad mode, autocast, active modes, and so on.

Both sides of a run stand on one thread, so torch sees one set of modes. `Modes` exchanges them at every switch: it
reads what is in force, and sets only what differs. Two kinds of state are left shared, and documented: what torch
keeps for the whole process on purpose (RNG, deterministic and SDP flags, the profiler, warning filters), and
attributes of modules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch._C import _autograd, _functorch
from torch.utils import _python_dispatch

from nnsight.core import accelerator

_C: Any = torch._C
_set_grad_enabled = _C._set_grad_enabled
_pop_function_mode = _C._pop_torch_function_stack
_push_function_mode = _C._push_on_torch_function_stack
_top_saved_hooks = _autograd._top_saved_tensors_default_hooks
_autocast_in_use: Callable[[], bool] = getattr(_C, "_is_any_autocast_enabled", lambda: True)
_autocast_dtype = torch.get_autocast_dtype
_checks_nan = torch.is_anomaly_check_nan_enabled
_AUTOCAST_DEVICES = tuple(dict.fromkeys(("cpu", accelerator.KIND)))


class Snapshot(NamedTuple):
    """The modes in force on one side. Stacks are listed from the bottom up; autocast is `()` where none is enabled.

    The first two are those that differ most often: in a generation or a backward pass, and in a block that names
    `backward`.
    """

    grad: bool
    function: tuple[Any, ...]
    inference: bool
    anomaly: bool | None  # whether it checks for NaN; None where it is off
    dtype: torch.dtype
    dispatch: tuple[Any, ...]
    function_enabled: bool
    function_all_disabled: bool
    autocast: tuple[Any, ...]
    saved_hooks: tuple[Any, ...]
    current: accelerator.Current | None  # device and streams; None before the accelerator is initialised


_BUT_GRAD = slice(Snapshot._fields.index("function"), None)
_RARE = slice(Snapshot._fields.index("inference"), None)
_FUNCTION = slice(Snapshot._fields.index("function_enabled"), Snapshot._fields.index("function_all_disabled") + 1)


# How deep inside `vmap`, `func.grad` and their like a line runs, None outside; and whether it does, which costs less.
functorch_level: Callable[[], int | None] = _functorch.maybe_current_level
in_transform: Callable[[], bool] = _C._are_functorch_transforms_active


class Modes:
    """Keeps the modes of a block and of its model apart.

    Made where the run is opened, whose modes the model starts with. `turned`: the other side is the block's, not the
    model's, as it is for one that is carried.
    """

    __slots__ = ("_autocast_dtypes", "_check_nan", "block_guard", "model_guard", "other", "turned")
    sees_both: ClassVar[bool] = True  # whether what is in force here is the model's while that runs

    def __init__(self) -> None:
        self.other = read_modes()
        self._autocast_dtypes = [*map(_autocast_dtype, _AUTOCAST_DEVICES)]
        self._check_nan = _checks_nan()
        self.block_guard: Any = None  # in force while the block runs and the model waits in another inference mode
        self.model_guard: Any = None  # the reverse
        self.turned = False

    def to_model(self, block: Snapshot) -> None:
        """On the way to the model: leaves the block's modes, which are in force, and takes up the model's."""
        if self.block_guard is not None:
            _close(self.block_guard)
            self.block_guard = None
        elif block[_BUT_GRAD] == (model := self.other)[_BUT_GRAD]:
            self.other = block
            _set_grad_enabled(model.grad)
            return
        elif block[_RARE] == model[_RARE]:
            self._exchange_frequent(block)
            return
        self._forget_casts(block, of_block=not self.turned)
        self.model_guard = self._exchange(block)

    def to_block(self, model: Snapshot, *, ended: bool) -> None:
        """On the way to the block, from the model's modes, which are in force; `ended`: the model won't come back."""
        if self.model_guard is not None:
            _close(self.model_guard)
            self.model_guard = None
        elif model[_BUT_GRAD] == (block := self.other)[_BUT_GRAD]:
            self.other = model
            _set_grad_enabled(block.grad)
            return
        elif model[_RARE] == block[_RARE]:
            self._exchange_frequent(model)
            return
        self._forget_casts(model, of_block=self.turned)
        guard = self._exchange(model)
        if guard is not None and ended:
            _kept.append(guard)  # it restores when it is freed, and there is nothing left to restore
        else:
            self.block_guard = guard

    def _forget_casts(self, here: Snapshot, *, of_block: bool) -> None:
        """Autocast keeps what it has cast by weight alone: in whatever dtype, the other side would find it.

        What the model has cast stays where the block casts nothing: gradients are added up in it.
        """
        there = self.other
        if here.autocast != there.autocast and (here if of_block else there).autocast:
            torch.clear_autocast_cache()

    def _exchange_frequent(self, here: Snapshot) -> None:
        """Where the two sides differ in gradients and function modes at most: at each switch, then."""
        there, self.other = self.other, here
        if here.function == there.function:
            if here.grad is not there.grad:
                _set_grad_enabled(there.grad)
            return
        for _ in here.function:  # taken off first, and put on last: setting other modes would go through them
            _pop_function_mode()
        if here.grad is not there.grad:
            _set_grad_enabled(there.grad)
        for mode in there.function:
            _push_function_mode(mode)

    def _exchange(self, here: Snapshot) -> Any:
        """Leaves `here`, a snapshot that a guard closed since may have outdated, and sets the other side's modes."""
        there, guard = self.other, None
        if here.function != there.function:
            _set_function_modes(())
        if torch.is_inference_mode_enabled() is not there.inference:
            guard = _C._InferenceMode(there.inference)
            guard.__enter__()
        self._set(there, read_modes() if guard is not None or here.inference is not there.inference else here)
        if here.function != there.function:
            _set_function_modes(there.function)
        self.other = here  # last: a Ctrl-C may come before it
        return guard

    def _set(self, there: Snapshot, here: Snapshot) -> None:
        if here.saved_hooks or there.saved_hooks:
            _set_saved_hooks(there.saved_hooks)
        if here[_FUNCTION] != there[_FUNCTION]:
            _C._set_torch_function_state(_function_state(there))
        if here.dispatch != there.dispatch:
            _set_dispatch_modes(there.dispatch)
        if here.autocast != there.autocast:
            _set_autocast(there.autocast or (True, *((False, dtype) for dtype in self._autocast_dtypes)))
        if here.anomaly != there.anomaly:
            _set_anomaly(there.anomaly, self._check_nan)
        if here.dtype != there.dtype:
            torch.set_default_dtype(there.dtype)
        if here.current != there.current:
            accelerator.make_current(there.current, here.current)
        if here.grad != there.grad:
            _C._set_grad_enabled(there.grad)


class SharedModes:
    """The same for a model on a thread of its own, where only what torch keeps for the whole process is exchanged.

    `start` gives the new thread the modes of the thread that opened the run. What is current on an accelerator is each
    thread's own: `pause` notes the new thread's, whenever that hands over, so that the streams can wait for each other.
    """

    __slots__ = ("_check_nan", "_opened", "_theirs", "other", "turned")
    sees_both: ClassVar[bool] = False
    block_guard: ClassVar[None] = None
    model_guard: ClassVar[None] = None

    def __init__(self) -> None:
        self._opened = read_modes()
        self._check_nan = _checks_nan()
        self.other = self._opened.anomaly, self._opened.dtype
        self.turned = False
        self._theirs: tuple[accelerator.Current | None, bool] = self._opened.current, False

    def start(self) -> None:
        modes = Modes()
        modes.other = self._opened
        _kept_by_thread.guard = modes._exchange(read_modes())
        accelerator.begin_thread()

    def pause(self) -> None:
        """On the new thread, where it is about to hand over."""
        self._theirs = accelerator.note()

    def to_model(self, block: Snapshot) -> None:
        self._exchange(block)
        theirs, captures = self._theirs
        if block.current != theirs and not captures and not accelerator.captures():
            accelerator.follow(theirs, block.current)

    def to_block(self, model: Snapshot, *, ended: bool) -> None:
        self._exchange(model)  # which is the same both ways
        theirs, captures = self._theirs
        if model.current != theirs and not captures and not accelerator.captures():
            accelerator.follow(model.current, theirs)

    def _exchange(self, block: Snapshot) -> None:
        here = block.anomaly, block.dtype
        anomaly, dtype = self.other
        if block.autocast and block.autocast != self._opened.autocast and not self.turned:
            torch.clear_autocast_cache()  # which is the process's
        if here != self.other:
            _set_anomaly(anomaly, self._check_nan)
            torch.set_default_dtype(dtype)
        self.other = here


_kept: list[Any] = []
_kept_by_thread = threading.local()


def _close(guard: Any) -> None:
    guard.__exit__(None, None, None)


def read_modes(
    grad: Any = torch.is_grad_enabled,
    inference: Any = torch.is_inference_mode_enabled,
    anomaly: Any = torch.is_anomaly_enabled,
    dtype: Any = torch.get_default_dtype,
    dispatch: Any = _C._len_torch_dispatch_stack,
    function: Any = _C._len_torch_function_stack,
    function_at: Any = _C._get_function_stack_at,
    function_enabled: Any = _C._is_torch_function_enabled,
    function_all_disabled: Any = _C._is_torch_function_all_disabled,
    autocast: Any = _autocast_in_use,
    saved_hooks: Any = _top_saved_hooks,
    accelerated: Any = accelerator.STATE,
    current: Any = accelerator.current,
    new: Any = tuple.__new__,
) -> Snapshot:
    """The modes in force on this thread: about 1.5 microseconds where nothing unusual is on.

    It is on the way of every switch. Its arguments only bind what it calls: looked up in torch's big dicts, between the
    operations of a model that has the caches to itself, these cost several times more. `new` skips a Python call.
    """
    enabled = function_enabled()
    values = (
        grad(),
        () if (count := function()) == 0 else (function_at(0),) if count == 1 else function_modes(),
        inference(),
        _checks_nan() if anomaly() else None,
        dtype(),
        _dispatch_modes() if dispatch() else (),
        enabled,
        not enabled and function_all_disabled(),
        _autocast() if autocast() else (),
        _saved_hooks() if saved_hooks(False) is not None else (),
        current() if accelerated._initialized else None,
    )
    snapshot: Snapshot = new(Snapshot, values)
    return snapshot


def _set_anomaly(check_nan: bool | None, otherwise: bool) -> None:
    _C.set_anomaly_enabled(check_nan is not None, otherwise if check_nan is None else check_nan)


def _dispatch_modes() -> tuple[Any, ...]:
    return tuple(_python_dispatch._get_current_dispatch_mode_stack())


def _set_dispatch_modes(modes: tuple[Any, ...]) -> None:
    while _C._len_torch_dispatch_stack():
        _python_dispatch._pop_mode()
    for mode in modes:
        _python_dispatch._push_mode(mode)


def function_modes() -> tuple[Any, ...]:
    """Torch's stack of them on this thread, from the bottom up."""
    return tuple(map(_C._get_function_stack_at, range(_C._len_torch_function_stack())))


def _set_function_modes(modes: tuple[Any, ...]) -> None:
    while _C._len_torch_function_stack():
        _pop_function_mode()
    for mode in modes:
        _push_function_mode(mode)


def remove_function_mode(mode: Any) -> None:
    """Takes a mode off this thread's stack, wherever it stands: blocks don't always end last in, first out."""
    modes = function_modes()
    if any(one is mode for one in modes):
        _set_function_modes(tuple(one for one in modes if one is not mode))


@contextmanager
def without_modes() -> Iterator[None]:
    """Takes all function and dispatch modes off this thread's stacks, for what is none of their business."""
    function, dispatch = function_modes(), _dispatch_modes()
    if not function and not dispatch:
        yield
        return
    _set_function_modes(())
    _set_dispatch_modes(())
    try:
        yield
    finally:
        _set_dispatch_modes(dispatch)
        _set_function_modes(function)


def _function_state(snapshot: Snapshot) -> Any:
    states = _C._TorchFunctionState
    if snapshot.function_all_disabled:
        return states.ALL_DISABLED
    return states.ENABLED if snapshot.function_enabled else states.SUBCLASSES_DISABLED


def _autocast() -> tuple[Any, ...]:
    devices = ((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES)
    return (torch.is_autocast_cache_enabled(), *devices)


def _set_autocast(setting: tuple[Any, ...]) -> None:
    torch.set_autocast_cache_enabled(setting[0])
    for device, (enabled, dtype) in zip(_AUTOCAST_DEVICES, setting[1:], strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _saved_hooks() -> tuple[Any, ...]:
    """Only the top of this stack can be read, so it is taken down and put up again."""
    hooks: list[Any] = []
    while (top := _top_saved_hooks(False)) is not None:
        hooks.insert(0, top)
        _autograd._pop_saved_tensors_default_hooks()
    _push_saved_hooks(hooks)
    return tuple(hooks)


def _set_saved_hooks(hooks: tuple[Any, ...]) -> None:
    while _top_saved_hooks(False) is not None:
        _autograd._pop_saved_tensors_default_hooks()
    _push_saved_hooks(hooks)


def _push_saved_hooks(hooks: Any) -> None:
    for pack, unpack in hooks:
        _autograd._push_saved_tensors_default_hooks(pack, unpack)
