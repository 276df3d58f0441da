"""Gradients in a block: `with loss.backward():` with `t.grad` in it, and `nnsight.backward`.

Nothing of torch is patched. What sees `loss.backward()`, and `.grad` inside its block, is a `TorchFunctionMode` on
the block's side. It costs about a microsecond for each torch operation of the block, so it is there only in a trace
whose own code names `backward`, and inside a backward block.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from greenlet import getcurrent
from torch.overrides import TorchFunctionMode

from nnsight.block.calls import stands_in_with
from nnsight.block.graph import check_graph, check_loss, open_runs
from nnsight.core import expected
from nnsight.core.backward import Backward
from nnsight.core.context import put
from nnsight.core.history import PACKAGE, TORCH, add_note, user_frame, user_place
from nnsight.core.modes import function_modes, remove_function_mode
from nnsight.core.origins import Handed, explain_changed
from nnsight.core.run import Run
from nnsight.errors import BlockError

_BACKWARD = torch.Tensor.backward
_GRAD: Any = torch.Tensor.grad
_GET, _SET = _GRAD_CALLS = _GRAD.__get__, _GRAD.__set__


# The backward blocks of this context, the innermost last.
_HERE: ContextVar[tuple[weakref.ref[BackwardBlock], ...]] = ContextVar("backward_blocks", default=())


class _Mode(TorchFunctionMode):
    """Sees `with loss.backward():` and, in such a block, `.grad`; on the stack that entered it only.

    A trace and the backward blocks in it have one between them. Each further one on torch's stack of modes would make
    every operation in the block slower, and be in force while the inner ones work.
    """

    def __init__(self) -> None:
        super().__init__()
        self._greenlet = getcurrent()
        self._users = 0

    @classmethod
    def enter(cls) -> _Mode:
        """The mode of this stack, for one more user; it is left as often as it is entered."""
        here = getcurrent()
        mode = next((one for one in function_modes() if isinstance(one, cls) and one._greenlet is here), None)
        if mode is None:
            mode = cls()
            mode.__enter__()
        mode._users += 1
        return mode

    def leave(self) -> None:
        if self._users == 1:
            remove_function_mode(self)
        self._users -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _BACKWARD:
            if getcurrent() is self._greenlet and stands_in_with(_caller()):
                return BackwardBlock(*args, **(kwargs or {}))
            check_graph(args[0])  # says why there is none
            try:
                return func(*args, **(kwargs or {}))
            except RuntimeError as error:
                explain_changed(error)
                raise
        elif func in _GRAD_CALLS and (backward := self._innermost()) is not None:
            frame: Any = sys._getframe(1)
            while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:  # another mode's
                frame = frame.f_back
            file = frame.f_code.co_filename
            if not file.startswith(TORCH):  # torch's own code (`zero_grad`, an optimizer) means what is stored
                if file.startswith(PACKAGE):
                    frame = user_frame(frame)
                tensor = args[0]
                if not tensor.requires_grad:
                    check_graph(tensor)  # says why there is none
                return backward.read(tensor, frame) if func == _GET else backward.write(tensor, args[1], frame)
        return func(*args, **(kwargs or {}))

    def _innermost(self) -> Backward | None:
        """The backward pass whose block this line stands in. Another task on the same thread means what is stored."""
        if self._greenlet is getcurrent():
            for reference in reversed(_HERE.get()):
                block = reference()
                if block is not None and block._mode is self and block._backward is not None:
                    return block._backward
        return None


def _caller() -> FrameType:
    """Who called `loss.backward()`: below that stand torch's frames, and those of other modes."""
    frame: FrameType | None = sys._getframe(2)
    found = user_frame()
    while frame is not None:
        is_backward = frame.f_code is _BACKWARD.__code__
        frame = frame.f_back
        if is_backward and frame is not None:
            found = frame
        elif frame is found:
            break
    return found


NAMES = frozenset({"backward", "grad"})


class Watch:
    """What a block whose own code has one of these NAMES has in addition, until it ends.

    To be made on the stack that the block runs on, and closed there.
    """

    __slots__ = ("_handed", "_mode")

    def __init__(self, run: Run, code: CodeType) -> None:
        self._handed: Handed | None = None
        if not isinstance(run.history, Handed):
            self._handed = hand_out(run)
        self._mode = seeing_backward(code)

    def close(self) -> None:
        if self._handed is not None:
            self._handed.close()
        if self._mode is not None:
            self._mode.leave()
            self._mode = None


def seeing_backward(code: CodeType) -> _Mode | None:
    """What sees `with loss.backward():` in a block of this code, until it is left; None where the code names none."""
    return _Mode.enter() if "backward" in code.co_names else None


def hand_out(run: Run) -> Handed:
    """Has a run keep what it hands out, for all blocks that ask it, until this is closed."""
    handed = run.history = Handed(run)
    return handed


@contextmanager
def watched(run: Any, function: Any) -> Iterator[None]:
    """The same around a block that is called as a function."""
    code: Any = getattr(function, "__code__", None)
    names = () if code is None else code.co_names
    watching = None if NAMES.isdisjoint(names) or not isinstance(run, Run) else Watch(run, code)
    try:
        yield
    except Exception as error:
        explain(error)
        expected.explain(error, run if isinstance(run, Run) else None)
        raise
    finally:
        if watching is not None:
            watching.close()


def explain(error: BaseException) -> None:
    """Adds a note to what Python raises for a `with loss.backward():` that no mode saw."""
    text = str(error)
    if isinstance(error, (TypeError, AttributeError)) and ("context manager" in text or text == "__enter__"):
        add_note(
            error,
            "If this was `with loss.backward():`, it is seen only in the code that opens the trace. In a function that "
            "is called there, or with an ExitStack, write `with nnsight.backward(loss):`.",
        )


class BackwardBlock:
    """`with loss.backward():`, or `with nnsight.backward(loss):`. Inside, `t.grad` is the gradient of `t` in this pass.

    The backward pass runs up to each gradient that is asked for; it runs to its end when the block does.
    """

    def __init__(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        check_loss(loss, args[0] if args else kwargs.get("gradient"))
        self._backward: Backward | None = Backward(loss, args, kwargs, [run.module for run in open_runs()])
        self._mode: _Mode | None = None

    def __enter__(self) -> BackwardBlock:
        if self._backward is None or self._mode is not None:
            raise BlockError(
                "A backward block is entered once.",
                you_wrote=user_place().source,
                instead="with loss.backward(): again, and retain_graph=True in the first",
            )
        put(_HERE, (*(one for one in _HERE.get() if one() is not None), weakref.ref(self)))
        self._mode = _Mode.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        backward, self._backward = self._backward, None
        assert backward is not None
        assert self._mode is not None
        try:
            try:
                self._mode.leave()
            except BaseException:  # which can come between any two calls
                self._mode.leave()
                raise
            if error is None:
                backward.finish()
        finally:
            backward.drop()  # which does nothing to one that has ended

    def __del__(self) -> None:
        backward = getattr(self, "_backward", None)  # None as well where the loss was refused
        if backward is not None and self._mode is None and not sys.is_finalizing():
            text = "This backward block was not entered, so that no backward pass ran: write `with` before it."
            warnings.warn_explicit(text, RuntimeWarning, backward.place.code.co_filename, backward.place.line)

    def __repr__(self) -> str:
        return "<backward block, ended>" if self._backward is None else repr(self._backward)


def backward(
    loss: torch.Tensor,
    gradient: torch.Tensor | None = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> BackwardBlock:
    """A backward pass that a block drives, in a trace or outside: `with nnsight.backward(loss):`.

    Inside, `t.grad` is the gradient of `loss` with respect to `t`, any tensor that it was computed from. Assigning it
    changes what goes on to all that was computed before. Gradients come in the reverse order of the forward pass.

    Args:
        loss: What is differentiated: one number, or any shape with `gradient`.
        gradient: The gradient of `loss` itself, of the same shape.
        retain_graph: As in `torch.Tensor.backward`.
        create_graph: The same.
        inputs: The same.

    Raises:
        GradientError: `loss` or a tensor has no graph, or `loss` is more than one number.
        AlreadyPastError: The backward pass had run beyond that tensor.
        IndependentError: `loss` does not depend on that tensor.
        WriteError: What is assigned is no tensor of that shape, dtype and device.
    """
    return BackwardBlock(loss, gradient, retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)
