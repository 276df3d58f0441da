"""What one cache has kept, and how it keeps a value."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from nnsight.core import accelerator
from nnsight.core.hidden import Hidden
from nnsight.core.values import through
from nnsight.errors import NotCachedError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MISSING: Any = ...  # what was not kept; no module returns it, and it pickles as itself


class CachedVisit:
    """One call of a module, as a cache keeps it.

    Attributes:
        path: The module's.
        step: The generation step in which it was called; -1 where there are none, and before the first.
    """

    __slots__ = ("_changed", "_inputs", "_marks", "_output", "_version", "path", "step")

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step
        self._inputs = self._output = MISSING
        # What was kept uncopied, and how often it had been written to: an output that is one tensor, and all else.
        self._version = -1
        self._marks: tuple[tuple[str, torch.Tensor, int], ...] = ()
        self._changed: tuple[str, ...] = ()

    def changed(self) -> tuple[str, ...]:
        """What of "inputs" and "output" was changed in place after it was kept, while the run went on."""
        changed = [kind for kind, tensor, version in self._marks if tensor._version != version]
        if self._version >= 0 and self._output._version != self._version:
            changed.append("output")
        return (*self._changed, *changed)

    def seal(self) -> None:
        """The run is over: what is done to the values from now on is the user's own business."""
        if self._marks or (self._version >= 0 and self._output._version != self._version):
            self._changed, self._marks = self.changed(), ()
        self._version = -1


class Log:
    """What one cache has kept so far, and how it keeps a value."""

    def __init__(
        self,
        *,
        device: torch.device | None,
        dtype: torch.dtype | None,
        detach: bool,
        clone: bool,
        non_blocking: bool,
    ) -> None:
        self.device, self.dtype, self.detach, self.clone, self.non_blocking = device, dtype, detach, clone, non_blocking
        self.ended = False
        self._calls: list[CachedVisit] = []  # in the order in which they began
        self._by_path: dict[str, list[CachedVisit]] = {}
        self._n_sorted = 0
        self._arriving: set[torch.device] = set()  # where copies come from, or go to, that were not waited for
        self._began: list[tuple[dict[str, Any], CachedVisit]] = []

    @property
    def visits(self) -> dict[str, list[CachedVisit]]:
        """The calls by path, in the order of each module's first; sorted when asked for, not while the model runs."""
        new = self._calls[self._n_sorted :]
        for visit in new:
            self._by_path.setdefault(visit.path, []).append(visit)
        self._n_sorted += len(new)
        return self._by_path

    def keep_inputs(self, path: str, step: int, kwargs: dict[str, Any], inputs: Inputs) -> None:
        """Keeps what a call begins with. The call's own dict of keywords is what its end will be known by."""
        visit = CachedVisit(path, step)
        visit._inputs = self._kept(inputs, "inputs", visit)
        self._calls.append(visit)
        self._began.append((kwargs, visit))

    def keep_output(self, path: str, step: int, kwargs: dict[str, Any], output: Any) -> None:
        """Keeps what a call ends with: beside its inputs, where those are kept."""
        visit = self._begun(kwargs) if self._began else None
        if visit is None:
            visit = CachedVisit(path, step)
            self._calls.append(visit)
        if isinstance(output, torch.Tensor):
            visit._output, visit._version = self._kept_tensor(output)
        else:
            visit._output = self._kept(output, "output", visit)

    def _begun(self, kwargs: dict[str, Any]) -> CachedVisit | None:
        for i in range(len(self._began) - 1, -1, -1):
            if self._began[i][0] is kwargs:
                visit = self._began[i][1]
                del self._began[i:]  # with those whose call ended in an error
                return visit
        return None

    def close(self) -> None:
        self.ended = True
        self._began = []
        for visit in self._calls:
            visit.seal()

    def settle(self) -> None:
        """Waits for copies that are still on their way from another device."""
        while self._arriving:
            torch.accelerator.synchronize(self._arriving.pop())

    def of(self, paths: set[str]) -> Log:
        """A copy with the visits of some paths."""
        new = copy.copy(self)
        new._calls = [visit for visit in new._calls if visit.path in paths]
        return new

    def _kept(self, value: Any, kind: str, visit: CachedVisit) -> Any:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept, version = self._kept_tensor(tensor)
            if version >= 0:
                visit._marks = (*visit._marks, (kind, kept, version))
            return kept

        return through(value, keep, _not_kept)

    def _kept_tensor(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What is kept of a tensor, and how often that had been written to, if it is no copy; else -1."""
        kept = held = tensor.detach() if self.detach and tensor.requires_grad else tensor
        if self.non_blocking and self.dtype is not None and kept.is_floating_point():
            kept = kept.to(self.dtype)  # not after a copy that may still be under way
        if self.device is not None and kept.device != self.device and not kept.is_meta:
            kept = kept.to(self.device, non_blocking=self.non_blocking)
            if self.non_blocking:
                self._arriving.update(at for at in (tensor.device, kept.device) if at.type == accelerator.KIND != "cpu")
        if self.dtype is not None and kept.is_floating_point():
            kept = kept.to(self.dtype)
        if kept is not held:
            return kept, -1
        if self.clone:
            return kept.clone(), -1
        return kept, -1 if kept.is_inference() else kept._version  # torch doesn't count writes to the former

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        calls = [copy.copy(visit) for visit in self._calls]
        for visit in calls:
            visit.seal()  # what is pickled in the middle of a run changes no more
        return {**self.__dict__, "_calls": calls, "_by_path": {}, "_n_sorted": 0, "_began": []}


def _not_kept(value: Any) -> Hidden:
    """Stands in a cache for an object that goes on changing, holds the graph, or holds all that was ever put there."""
    what = type(value).__name__
    return Hidden(partial(_why_not, what), what)


def _why_not(what: str) -> NotCachedError:
    why = (
        f"A cache keeps tensors, in tuples, lists, dicts and dataclasses, and this is a {what}, which may change later."
    )
    return NotCachedError(why, instead="read it in the block: envoy.output, envoy.inputs")
