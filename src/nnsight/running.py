"""What runs of a module: `trace`, `scan`, `calls`, and what each kind of model says of its inputs for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import Any, Literal, overload

import torch
from torch import nn

from nnsight.absent import CHECKS, OPTIONS, without_options
from nnsight.block.calls import stands_in_with
from nnsight.block.cuts import Batch
from nnsight.block.launch import Launch
from nnsight.block.plain import RowAxis, axis_of, plain_batch, together
from nnsight.block.rows import RowRun, Rows
from nnsight.block.session import Session
from nnsight.block.steps import ONE_STEP, Plan
from nnsight.block.tracer import Tracer
from nnsight.core.history import deprecated, user_place
from nnsight.core.inputs import check_inputs, check_no_text, signature_of
from nnsight.core.run import Run
from nnsight.core.tree import Tree
from nnsight.errors import Error, InputError
from nnsight.launches import check_method, invokes, launch, scan_launch
from nnsight.node import Node

_Function = str | Callable[..., Any]


class Runnable(Node):
    """A module that can be run: all of an Envoy that leads to a run."""

    _tree: Tree
    _known_to_fit: tuple[Any, int] | None = None  # a forward, and how many positional inputs it was given and takes
    _batch_axis: int | None = None  # of the inputs of the whole model, where it was given

    @property
    @abstractmethod
    def root(self) -> Runnable: ...

    @abstractmethod
    def _bind(self, run: Run | RowRun, tracer: Tracer) -> Any:
        """The tree bound to this run."""

    @overload
    def trace(self, *args: Any, fn: _Function | None = None, trace: Literal[True] = True, **kwargs: Any) -> Tracer: ...
    @overload
    def trace(self, *args: Any, fn: _Function | None = None, trace: bool, **kwargs: Any) -> Any: ...

    def trace(self, *args: Any, fn: _Function | None = None, trace: bool = True, **kwargs: Any) -> Any:
        """A trace of this module on these inputs: `with envoy.trace(x) as tracer:`. The module runs as the block asks.

        Args:
            args: The positional inputs of the module's forward.
            fn: Another method of the module to run instead of its forward, by name; or any function.
            trace: False: no block, but a plain call, whose output is returned.
            kwargs: The keyword inputs of the module's forward.

        Returns:
            What a `with` enters; with `trace=False`, what the module returns.

        Raises:
            InputError: The module can't be called with these inputs.
            ModelError: It can't be traced: a DataParallel.
            UnknownNameError: The module has no method `fn`.

        Example:
            >>> import nnsight, torch
            >>> model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))
            >>> with model.trace(torch.ones(2, 4)) as tracer:
            ...     hidden = model[0].output
            ...     model[1].output = hidden * 0
            >>> hidden.shape, tracer.result.sum()
            (torch.Size([2, 3]), tensor(0., grad_fn=<SumBackward0>))
        """
        return self._start(fn, args, kwargs, trace)

    def _trace_or_call(
        self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], trace: bool | None, caller: FrameType
    ) -> Any:
        """A tracer where the call stands in a `with` (or `trace=True`), else the result of the plain call."""
        return self._start(fn, args, kwargs, stands_in_with(caller) if trace is None else trace)

    def _start(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], trace: bool) -> Any:
        try:
            tracer = self._to_be_started(fn, args, kwargs, trace)
        except Error as error:  # whose text says what there is to say, without the way that led to it
            raise error.with_traceback(None) from error.__cause__
        return tracer if trace else tracer.run()

    def _to_be_started(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], trace: bool) -> Tracer:
        if fn is not None:
            check_method(self, fn)
        if kwargs:
            kwargs = self._without_options(kwargs)
        if trace and not args and not self._says_prompt(args, kwargs):
            return self._new_tracer(None, self._bind, invokes(self, fn, kwargs))
        return self._new_tracer(launch(self, fn, *self._prepare(fn, args, kwargs)), self._bind)

    def _without_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not kwargs or OPTIONS.keys().isdisjoint(kwargs):
            return kwargs
        takes = signature_of(self._module)
        names = takes.names if takes else ()
        for name in CHECKS:
            if kwargs.get(name) is True and name not in names:
                deprecated(f"`{name}=True` changes nothing. {OPTIONS[name]}")
                kwargs = {**kwargs, name: False}
        return without_options(kwargs, names)

    _new_tracer: type[Tracer] = Tracer

    def _launched(
        self, make_run: Callable[..., Run], fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Launch:
        """What is known of the run that `make_run(steps=...)` makes; `fn` and the inputs as in `_prepare`."""
        generates = fn == "generate"
        plan = Plan() if generates else ONE_STEP
        return Launch(partial(make_run, steps=generates), partial(self._rows, fn, args, kwargs), plan)

    def _new_seen(self, _fn: str | None, _kwargs: Mapping[str, Any]) -> Any:
        """What is shown the inputs of each call, for edits that ask for positions; None where there are none."""
        return None

    # Prompts that come one by one.

    def _says_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a trace that is given this can run at once; else its prompts may come with `tracer.invoke`."""
        return bool(args or kwargs)

    def _check_shared(self, fn: str | None, shared: dict[str, Any]) -> None:
        """Refuses what a trace without a prompt of its own is given and has no use for."""

    def _prepare_invoke(self, fn: str | None, shared: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """One invoke's inputs, made ready to be put together with others'."""
        return self._prepare(fn, args, {**kwargs, **shared})

    def _together(self, _fn: str | None, given: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[int]]:
        """The inputs of several invokes as those of one run, and how many rows each has in it."""
        return together(given, self._label, self._row_axis())

    def _rows(self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> Rows:
        return Rows(run, self._rows_of(fn, args, kwargs), fn)

    def _rows_of(self, _fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The prompts that are in the module's inputs."""
        return plain_batch(args, kwargs, self._row_axis())

    def _row_axis(self) -> RowAxis:
        return axis_of(self._module, self.root._batch_axis)

    def _ready(self) -> None:
        """Called on the root before its modules run: loads what is needed."""

    def _prepare(
        self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turns what was given to `trace`, or to a method `fn`, into the module's inputs."""
        if fn is None:
            module = self._module
            known = (
                None if kwargs or "forward" in module.__dict__ else (getattr(type(module), "forward", None), len(args))
            )
            if known is None or known != self._known_to_fit:
                check_inputs(module, args, kwargs, lambda: self._label)
                self._known_to_fit = known
            if args and not isinstance(args[0], torch.Tensor):
                check_no_text(self._tree.root, args, lambda: self._label)
        return args, kwargs

    def session(self, **options: Any) -> Session:
        """A block around several traces, for programs written for the existing package; it changes nothing."""
        return Session(options)

    def scan(self, *args: Any, fn: str | None = None, **kwargs: Any) -> Tracer:
        """A trace on fake tensors: `with envoy.scan(x) as tracer:`. No weight is read, none is loaded.

        The block reads and writes as in `trace`, and finds the shapes, dtypes and devices of `trace`. A line that needs
        a value raises FakeValueError, in the block and in the model, and so does one that uses a scan's tensor later.

        Args:
            args: As in `trace`.
            fn: As in `trace`.
            kwargs: As in `trace`.

        Raises:
            InputError: The module can't be called with these inputs.
            ModelError: The model can't be copied.
        """
        kwargs = self._without_options(kwargs)
        if not self._says_prompt(args, kwargs):
            raise InputError(
                f"A scan is given its input itself, and takes no `tracer.invoke(...)`; `{self._label}` needs one.",
                you_wrote=user_place().source,
                instead="with model.scan(prompt):",
            )
        return self._new_tracer(scan_launch(self, fn, args, kwargs), self._bind)

    def calls(self, *args: Any, fn: str | None = None, **kwargs: Any) -> list[str]:
        """The paths of the modules that these inputs call, in the order in which the calls begin, repeats included.

        Found by a scan: no weight is read.

        Args:
            args: As in `trace`.
            fn: As in `trace`.
            kwargs: As in `trace`.

        Raises:
            FakeValueError: Which modules are called depends on values. There, `list(tracer.cache())` after a trace has
                them, in the order in which they end.
            InputError: The module can't be called with these inputs.
            ModelError: The model can't be copied.
        """
        scan = scan_launch(self, fn, args, self._without_options(kwargs))
        run = scan.make_run()
        order: list[str] = run.note_calls()  # type: ignore[attr-defined]
        scan.make_run = lambda: run
        self._new_tracer(scan, self._bind).run()
        return order

    def _prepare_scan(
        self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `_prepare`, and loads nothing."""
        return self._prepare(fn, args, kwargs)

    def _make_scannable(self, copied: nn.Module) -> None:
        """Sets a fake copy of the root to use operations that torch's fake tensors know."""

    def _planned_device(self) -> torch.device | None:
        """Where weights that aren't loaded yet would go; None where they are loaded."""
        return None
