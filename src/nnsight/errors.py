"""Every error of the library, drawn as a tree.

    Error
    ├── BlockError                      a mistake in a block
    │   ├── OutOfOrderError             a value that this run can't give any more
    │   │   ├── AlreadyPastError        the model ran past it
    │   │   ├── NeverCalledError        this run never calls that module
    │   │   ├── CalledFewerTimesError   called, but not as often as asked
    │   │   ├── StillRunningError       its call began before anything was asked that stands below it
    │   │   └── IndependentError        a gradient of what the loss does not depend on
    │   ├── OutsideTraceError           also a ValueError
    │   ├── UnknownNameError            misspelt; also an AttributeError
    │   ├── UnknownIndexError           also an IndexError
    │   ├── WriteError                  a write that can't reach the model
    │   ├── NotOnThisLayerError         a value that this kind of layer doesn't have
    │   ├── RowError                    a value of which one prompt's part can't be told
    │   ├── OtherThreadError            a run belongs to the thread that opened it
    │   ├── RunOrderError               two runs beneath C++, resumed in the wrong order
    │   ├── FakeValueError              a value was asked of a scan's tensor, which has none
    │   ├── GradientError               no graph to take it in; also a NotImplementedError, which is a RuntimeError
    │   └── TransformError              inside vmap, func.grad, a tracing compiler
    ├── InputError                      what was given to `trace`, `generate` or a model; also a ValueError
    ├── NotCachedError                  a value that a cache doesn't have; also a KeyError
    ├── ModelError                      a module that can't be wrapped or tapped
    │   ├── AdapterError                an adapter that doesn't fit the model; also a ValueError
    │   ├── AnatomyError                a model in which the uniform names can't be found
    │   └── NoSourceError               a function whose operations can't be told apart
    ├── RenameError                     a name in `rename=` that can't be given; also a ValueError
    ├── HubError                        a model that isn't in reach; also an OSError
    └── MissingPackageError             an optional package; also an ImportError

Each text says what happened, then shows facts in aligned rows: the line that was written, what ran, what to write
instead.
"""

from __future__ import annotations


class Error(Exception):
    """The root of all errors that the library raises on its own account.

    Args:
        what: One or two sentences: what happened.
        facts: Rows shown below, in order; `you_wrote="..."` prints as `you wrote   ...`. Empty ones are left out.
    """

    def __init__(self, what: str, **facts: str | None) -> None:
        rows = {name.replace("_", " "): fact for name, fact in facts.items() if fact}
        width = max(map(len, rows), default=0) + 3
        lines = [f"  {name:<{width}}" + fact.replace("\n", "\n" + " " * (width + 2)) for name, fact in rows.items()]
        super().__init__("\n".join([what, "", *lines]) if lines else what)


class BlockError(Error):
    """A mistake in the body of a `with`; raised at its line."""


class OutOfOrderError(BlockError):
    """A value was asked for that this run can't give (any more)."""


class AlreadyPastError(OutOfOrderError):
    """The model had run past this place when it was asked for."""


class NeverCalledError(OutOfOrderError):
    """The forward pass ended without calling this module."""


class CalledFewerTimesError(OutOfOrderError):
    """The module was called, but not as often as the block asked."""


class StillRunningError(OutOfOrderError):
    """The module's call had begun before the run could know that it would be asked for, and has not ended."""


class IndependentError(OutOfOrderError):
    """The gradient of a tensor was asked for that the loss does not depend on."""


class OutsideTraceError(BlockError, ValueError):
    """A value of a run was asked for where no run is open."""


class UnknownNameError(BlockError, AttributeError):
    """Neither the library nor the module has this name."""

    def __init__(self, what: str, **facts: str | None) -> None:
        super().__init__(what, **facts)
        self.obj = None  # Python fills in what is unset, and since 3.12 writes a "Did you mean" of its own behind ours


class UnknownIndexError(BlockError, IndexError):
    """A container has no child at this index."""


class WriteError(BlockError):
    """A write that can't be done, or that would never have reached the model."""


class NotOnThisLayerError(BlockError):
    """A value was asked for that this layer does not have: the pattern of one without attention, say."""


class RowError(BlockError):
    """One row's part was asked for of a value whose rows can't be told apart, or of a run that has no rows."""


class OtherThreadError(BlockError):
    """A run was asked for a value from a thread that did not open it."""


class RunOrderError(BlockError):
    """A run paused beneath C++ was resumed while a later one was paused there too."""


class GradientError(BlockError, NotImplementedError):
    """A gradient that can't be taken: there is no graph, or no single number to differentiate."""


class TransformError(BlockError):
    """A value was asked for inside a transform or a tracing compiler, where a run can't pause."""


class FakeValueError(BlockError):
    """A scan's tensor was asked for a value; it has a shape, a dtype and a device, and no values."""


class InputError(Error, ValueError):
    """What was given to `trace` or `generate` can't be an input of this model, or it can't be made with an option."""


class NotCachedError(Error, KeyError):
    """A cache was asked for a value that it wasn't told to keep, or that no call gave it."""

    __str__ = Exception.__str__  # a KeyError prints its text in quotes, on one line


class ModelError(Error):
    """A module that can't be wrapped, or whose values can't be reached."""


class AdapterError(ModelError, ValueError):
    """An adapter that can't be put on this model, or that would change nothing there."""


class AnatomyError(ModelError):
    """A model in whose arithmetic the uniform names can't be found."""


class NoSourceError(ModelError):
    """A `forward`, or a function that it calls, whose source can't be had or can't be rewritten."""


class RenameError(Error, ValueError):
    """A name in `rename=` that finds no module, or that is taken."""


class HubError(Error, OSError):
    """A model that could not be found or fetched."""


class MissingPackageError(Error, ImportError):
    """An optional package isn't installed; the text has the command."""
