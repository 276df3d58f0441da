"""The accelerator's current device, and the current stream of each, which torch keeps per thread.

Nothing here initialises an accelerator: a process that has it initialised can't use it after a fork.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_C: Any = torch._C

# What torch was built for, "cpu" if for none. `torch._C._get_accelerator()` would look whether there is one, which
# initialises the driver.
KIND: str = getattr(torch.accelerator.current_accelerator(), "type", "cpu")
_module: Any = getattr(torch, KIND, None)
# Knows whether it is initialised. One without streams, as on a Mac, is not looked at: `torch.cuda` never is, there.
STATE: Any = _module if hasattr(_module, "_initialized") else torch.cuda

Current = tuple[int, tuple[Any, ...]]  # the device's index, and the current stream of each device

_device: Any = _C._accelerator_getDeviceIndex
_stream: Any = _C._accelerator_getStream
_set_device: Any = _C._accelerator_setDeviceIndex
_set_stream: Any = _C._accelerator_setStream
_bind: Any = STATE.set_device  # unlike the above, it does so where the device is the current one already
_wait: Any = torch.Stream.wait_stream
_captures: Any = torch.cuda.is_current_stream_capturing if KIND == "cuda" else lambda: False


@cache
def _devices() -> range:
    return range(STATE.device_count())


def current() -> Current | None:
    """What is current on this thread; to be asked once `STATE._initialized`. None in a fork of such a process."""
    if STATE._is_in_bad_fork():
        return None
    devices = _devices()
    if len(devices) == 1:  # most often, and half the time
        return 0, (_stream(0),)
    return _device(), tuple(map(_stream, devices))


def begin_thread() -> None:
    """Gives this new thread the current device's context. Without one, a matrix product that comes first warns."""
    if STATE._initialized and not STATE._is_in_bad_fork():
        _bind(_device())


def make_current(there: Current | None, here: Current | None) -> None:
    """Goes from `here`, what is current now, to `there`; None is how a thread begins.

    A stream that takes over from another on its device waits for it, on the device: what one side hands over is there
    when the other uses it, and used when the first goes on. While a graph is captured, that is left to who captures.
    """
    if here is None:
        return
    index, streams = there or (0, tuple(map(_default, here[1])))
    pairs = [(stream, before) for stream, before in zip(streams, here[1], strict=True) if stream != before]
    waits = not _captures()
    for stream, _ in pairs:
        _set_stream(stream)  # which makes its device the current one, too
    if _device() != index:
        _set_device(index)
    if waits and not _captures():
        for stream, before in pairs:
            _wait(stream, before)


def captures() -> bool:
    """Whether a graph is captured on this thread."""
    return STATE._initialized and not STATE._is_in_bad_fork() and _captures()


def note() -> tuple[Current | None, bool]:
    """What is current on this thread, and whether a graph is captured here: for another thread, that takes over."""
    here = current() if STATE._initialized else None
    return here, captures()


def follow(after: Current | None, before: Current | None) -> None:
    """Has the streams of one thread wait, on the device, for those of another, which hands over to it.

    None is how a thread begins.
    """
    known = after or before
    if known is None:
        return
    ours, theirs = (tuple(map(_default, known[1])) if side is None else side[1] for side in (after, before))
    for stream, other in zip(ours, theirs, strict=True):
        if stream != other:
            _wait(stream, other)


def _default(stream: Any) -> Any:
    """The default stream of the device that has this one."""
    return torch.Stream(stream_id=0, device_index=stream.device_index, device_type=stream.device_type)
