"""Sites met by a mode of torch's functions that is active only in the calls of one module, and only for who asks."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from nnsight.anatomy.interior import Interior
from nnsight.core.ports import Calls, Input
from nnsight.core.run import Run
from nnsight.core.state import RunState


class Meeting(TorchFunctionMode):
    """Meets functions in one call of a module."""

    def check_served(self) -> None:
        """Raises where what a run was given turns out, at the end of the call, to have been something else."""


class Met(Interior):
    """An interior whose sites are met at functions that its owner calls."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self._meeting: list[tuple[RunState, Calls, list[Meeting]]] = []

    @abstractmethod
    def meeting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Meeting:
        """What meets them in one call of the owner, that has these inputs."""

    def _begin(self, run: Run) -> None:
        modes: list[Meeting] = []
        calls = Calls(self.owner, run.state, lambda _, *inputs: self._enter(modes, *inputs), partial(_exit, modes))
        self._meeting.append((run.state, calls, modes))
        calls.arm()
        visit = run.state.visit
        if visit is not None and isinstance(visit.port, Input) and visit.port.module is self.owner:
            visit.late += (calls,)  # torch is calling the hooks that stood there before

    def _end(self, state: RunState) -> None:
        for known, calls, modes in self._meeting:
            if known is state:
                calls.disarm()
                if modes and _get_current_function_mode() is modes[0]:  # its call was interrupted
                    _exit(modes)
        self._meeting = [entry for entry in self._meeting if entry[0] is not state]

    def _enter(self, modes: list[Meeting], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.was_entered = True
        modes.append(self.meeting(args, kwargs))
        modes[0].__enter__()

    @contextmanager
    def _present(self) -> Iterator[None]:
        modes: list[Meeting] = []
        begin = self.owner.register_forward_pre_hook(
            lambda _, args, kwargs: self._enter(modes, args, kwargs), with_kwargs=True
        )
        end = self.owner.register_forward_hook(lambda *_: _exit(modes), always_call=True)
        try:
            yield
        finally:
            begin.remove()
            end.remove()


def _exit(modes: list[Meeting], *_: Any) -> None:
    if modes:
        mode = modes.pop()
        mode.__exit__(None, None, None)
        if sys.exc_info()[1] is None:  # else the call has failed, and says itself why
            mode.check_served()
