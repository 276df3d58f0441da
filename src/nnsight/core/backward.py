"""A backward pass as a coroutine that a block drives: it runs up to each gradient that is asked for, and waits there.

The engine of autograd runs on a second stack, as a model does (`core/switch.py`). A gradient that is asked for is a
hook on its tensor, there for as long as the block waits for it. Torch runs a hook when the gradient is complete and has
not gone on yet, so what the block assigns is what goes on.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from contextvars import copy_context
from functools import partial
from threading import get_ident
from types import FrameType, SimpleNamespace
from typing import Any

import torch

from nnsight.core.backward_missed import late, past, why
from nnsight.core.backward_ports import GradientPort, Kept, PassState, graph_task
from nnsight.core.failed import without_plumbing
from nnsight.core.finite import is_finite, warn_not_finite
from nnsight.core.history import Place, user_frame
from nnsight.core.modes import functorch_level, read_modes
from nnsight.core.origins import Asked, asked_by, beside, explain_changed, rows_were_read
from nnsight.core.owner import this_thread
from nnsight.core.side import modes_here, stack_for
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.state import Unwind
from nnsight.core.switch import Stack
from nnsight.errors import (
    GradientError,
    OtherThreadError,
    RunOrderError,
    TransformError,
    WriteError,
)

_DEEPEST = 32  # beyond 60, torch moves nested backward passes to threads of its own


class Backward:
    """One backward pass: not started until a gradient is asked for, or the block ends.

    Args:
        loss: What is differentiated.
        args, kwargs: Of `Tensor.backward`.
        modules: Whose parameters errors can name.
    """

    __slots__ = (
        "__weakref__", "_asked", "_bare", "_body", "_context", "_has_rows", "_kept", "_loss", "_modes", "_modules",
        "_opened", "_owner", "_stack", "_unhook_loss", "_warned", "reference", "restricted", "state",
    )  # fmt: skip
    _open = threading.local()

    def __init__(
        self, loss: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], modules: list[torch.nn.Module]
    ) -> None:
        self._stack: Stack | None = None  # until it starts
        self._loss: torch.Tensor | None = loss
        self._modules = modules
        self.restricted = kwargs.get("inputs") is not None or len(args) > 3
        self._opened = asked_by(user_frame(), loss, [])
        self.reference: weakref.ref[Any] = weakref.ref(self)
        self._owner = this_thread()
        self._warned = False
        self._asked: list[tuple[Any, ...]] = []  # what makes an `Asked`, in their order
        self._bare: list[torch.Tensor] = []
        self._has_rows = rows_were_read()  # what rows are given later, the loss can't come from
        self._kept: dict[int, Kept] = {}  # by the `id` of their tensors, which they hold
        self.state = PassState()
        self._body = partial(_backward, self.state, [(loss, args, kwargs)])
        self._context = copy_context()
        self._modes = modes_here()

    def _new_stack(self, *, pauses: bool) -> Stack:
        """A second stack for the engine; the block's own where nothing is asked."""
        stack = stack_for(self._body, self._modes, self._context, pauses=pauses)
        self._stack, self.state.link = stack, stack.link
        return stack

    @property
    def place(self) -> Place:
        """Where it was opened."""
        return self._opened.place

    @property
    def tree(self) -> Any:
        """What a run has; a backward pass has a tree of nobody's."""
        return SimpleNamespace(root=self.reference)

    def frames(self) -> list[FrameType]:
        """Where the backward pass is paused, innermost frame first."""
        return [] if self._stack is None else self._stack.frames()

    @property
    def shares_thread(self) -> bool:
        """With the block."""
        return self._stack is not None and self._stack.shares_thread

    @property
    def asked(self) -> list[Asked]:
        """The gradients that it was asked for so far."""
        return [Asked(*one) for one in self._asked]

    # What a block does.

    def read(self, tensor: torch.Tensor, frame: FrameType) -> torch.Tensor:
        """Waits until the gradient of this tensor is complete, and returns it. `frame` is the user's, who asks."""
        gradient = self._wait(tensor, frame, reads=True).gradient
        assert gradient is not None
        if not self._warned and not is_finite(gradient):
            self._warned = True
            warn_not_finite(asked_by(frame, tensor, self._modules))
        return gradient

    def write(self, tensor: torch.Tensor, value: Any, frame: FrameType) -> None:
        """Has the backward pass go on with `value` as the gradient of this tensor."""
        asked = asked_by(frame, tensor, self._modules)
        if not isinstance(value, torch.Tensor):
            raise WriteError(
                f"The gradient of {asked.label} can't become {type(value).__name__}: it goes on to what comes before.",
                **asked.facts,
                instead="t.grad = torch.zeros_like(t), to let nothing through",
            )
        if (is_now := shape_of(tensor)) != (wanted := shape_of(value)):
            raise WriteError(
                f"The gradient of {asked.label} is {show_shape(is_now)}, and can't become {show_shape(wanted)}.",
                **asked.facts,
            )
        if (kept := self._kept.get(id(tensor))) is not None and kept.gradient is not None:
            raise late(self, asked)
        port = self._wait(tensor, frame, reads=False)
        assert isinstance(port, GradientPort)
        port.gradient, port.is_written = value, True

    def finish(self) -> None:
        """Lets the backward pass run to its end."""
        for kept in self._kept.values():
            if kept.was_changed:
                raise late(self, asked_by(user_frame(), kept.tensor, self._modules))
        if not self.state.ended:
            if self._stack is None:
                self._begin(pauses=False)
            self._switch()
        self._loss, self._modules = None, []

    def stop(self) -> None:
        """Ends it where it stands. What it raises beneath is its own affair: an error is on its way already."""
        state = self.state
        self._loss, self._modules = None, []
        if state.ended:
            if id(self) in self._owner.runs:  # a Ctrl-C came at its end
                self._ended()
            return
        if self._stack is None:
            state.ended = True
            return
        unwinding = state.unwinding = Unwind()
        try:
            self._switch()
        except RunOrderError:
            state.unwinding = None
            raise
        state.error = state.unwinding = unwinding.__traceback__ = None

    def drop(self) -> None:
        """Ends it as soon as its thread, and the order of runs, allow; does nothing to one that has ended."""
        if sys.is_finalizing():  # as in `Execution.drop`
            return
        if not self._owner.is_here():
            self._owner.end_later(self)
            return
        try:
            self.stop()
        except RunOrderError:
            self._owner.end_later(self)
            return
        self._owner.end_waiting()  # one that had to wait for this one keeps the engine in its call

    def give_up(self) -> None:
        """Takes its hooks away; to unwind the engine is too late, since the thread that it runs on has ended."""
        if not self.state.ended:
            self.state.ended = True
            self._ended()

    def __del__(self) -> None:
        if getattr(self, "_stack", None) is not None and id(self) in self._owner.runs:
            self.drop()

    # What it takes. A gradient is asked for between two operations of torch, where a call of Python's costs several
    # times what it does elsewhere: on the way of one there are few.

    def _wait(self, tensor: torch.Tensor, frame: FrameType, *, reads: bool) -> GradientPort | Kept:
        state = self.state
        if state.at is not None and state.at.tensor is tensor:
            return state.at
        found: GradientPort | Kept | None = self._keep(tensor) if self._has_rows else None
        if found is None:
            if state.ended:
                raise past(self, asked_by(frame, tensor, self._modules))
            if self._stack is None:
                self._begin(pauses=True)
            found = port = GradientPort(tensor, state, reads=reads)
            hooks = self._hooks_of(tensor)
            hooks[port] = port
            try:
                self._switch()
            finally:
                del hooks[port]
            if state.at is not port or port.gradient is None:
                assert self._loss is not None
                raise why(self, port, asked_by(frame, tensor, self._modules), self._loss)
        self._asked.append((weakref.ref(tensor), frame.f_code, frame.f_lasti, self._modules))
        return found

    def _keep(self, tensor: torch.Tensor) -> Kept | None:
        """The gradient of a row's tensor, if it came with another row's; those beside it will be kept."""
        if (kept := self._kept.get(id(tensor))) is not None:
            if kept.gradient is not None:
                return kept
            kept.remove()  # it is waited for, which is better: what is assigned goes on
        if not self.state.ended:
            for other in beside(tensor):
                if id(other) not in self._kept:
                    self._kept[id(other)] = Kept(other, self.state)
        return None

    def _hooks_of(self, tensor: torch.Tensor) -> Any:
        """The hooks of a tensor, as torch calls them. `register_hook` does the same in several times the time."""
        hooks: Any = tensor._backward_hooks
        if hooks is None:
            hooks = tensor._backward_hooks = OrderedDict()
            if (node := tensor.grad_fn) is not None:
                node._register_hook_dict(tensor)
            else:
                self._bare.append(tensor)
        return hooks

    def _switch(self) -> None:
        """Lets the engine run until it comes to a port, or to its end; raises what it raised, unless it is unwound."""
        state, paused, stack = self.state, self._owner.paused, self._stack
        assert stack is not None
        if get_ident() != self._owner.ident or functorch_level() != state.functorch_level:
            self._check_here()
        is_first = state.graph_task == -1
        if paused:
            if paused[-1] is self.reference:  # nothing has come between
                if not is_first and stack.shares_thread and graph_task() != state.graph_task:
                    # But with gevent's patches, where each task passes for a thread.
                    raise RunOrderError(
                        f"{self!r} is paused beneath a later one of this thread, which alone can go on.",
                        instead="end the later block first",
                    )
                paused.pop()
            else:
                self._owner.let_go_on(self)
        self._modes.to_model(read_modes())
        try:
            stack.resume()
        except BaseException:  # as in `Execution._switch`
            if not stack.frames():
                state.ended = True
            raise
        finally:
            try:
                self._modes.to_block(read_modes(), ended=state.ended)
            except BaseException:
                self._modes.to_block(read_modes(), ended=state.ended)
                raise
            finally:
                if state.ended:
                    self._ended()
                else:
                    paused.append(self.reference)
                if (is_first or state.ended) and stack.shares_thread:
                    self._move_runs()
        if state.error is not None and state.unwinding is None:
            self._raise()

    def _check_here(self) -> None:
        """Refuses to go on elsewhere than where it was opened; it may end anywhere on its thread."""
        if not self._owner.is_here():
            raise OtherThreadError("This backward pass was opened on another thread, and goes on only there.")
        if functorch_level() != self.state.functorch_level and self.state.unwinding is None:
            raise TransformError("A backward pass can't go on inside `vmap`, `func.grad` or their like.")

    def _begin(self, *, pauses: bool) -> None:
        self._check_here()
        nested = [one for one in vars(self._open).get("backwards", []) if (run := one()) and not run.state.ended]
        if len(nested) >= _DEEPEST:
            raise GradientError(
                f"{_DEEPEST} backward blocks are open around this one, which is as deep as they can be nested.",
                you_wrote=self.place.source,
            )
        self._open.backwards = [*nested, self.reference]
        assert self._loss is not None
        hooks, begun = self._hooks_of(self._loss), partial(_begun, self.state)
        hooks[begun] = begun
        self._unhook_loss = partial(hooks.pop, begun, None)
        self._new_stack(pauses=pauses)
        self._owner.runs[id(self)] = self.reference

    def _ended(self) -> None:
        self._unhook_loss()
        for kept in self._kept.values():
            kept.remove()
        # Not before: torch is walking the hooks of the tensor where it is paused.
        for tensor in self._bare:
            if not tensor._backward_hooks:
                tensor._backward_hooks = None
        self._bare = []
        self._owner.runs.pop(id(self), None)

    def _move_runs(self) -> None:
        """Tells the runs of this thread which call of the engine their models go on in now: the one that is paused."""
        here = graph_task()
        for reference in self._owner.runs.values():
            run = reference()
            if run is not None and not isinstance(run, Backward):
                run.state.graph_task = here
        for method in list(self._owner.heard_by.values()):
            if (tell := method()) is not None:
                tell(here)

    def _raise(self) -> None:
        error, self.state.error = self.state.error, None
        assert error is not None
        try:
            raise error.with_traceback(without_plumbing(error.__traceback__))
        finally:
            del error  # this frame is in its traceback

    def __repr__(self) -> str:
        return f"<backward pass of {self.place}, {'ended' if self.state.ended else 'open'}>"


def _backward(state: PassState, jobs: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]], _: None) -> None:
    """What runs on the second stack. Nothing is ever raised out of it."""
    loss, args, kwargs = jobs.pop()
    try:
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001  what it raises is raised again on the block's side
        if error is not state.unwinding:
            explain_changed(error)
            state.error = error
    state.ended = True


def _begun(state: PassState, _: Any) -> None:
    """The hook of the loss, the first to run: tells this call of the engine from those that are nested in it."""
    if state.graph_task == -1 and state.link.is_here():
        state.graph_task = graph_task()
