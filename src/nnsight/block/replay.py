"""Has the edits of a model run while something calls its modules."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from nnsight.block.edit import Edit, edits_now
from nnsight.block.edit_tracer import EditTracer
from nnsight.block.rows import RowRun, whole_of
from nnsight.core import compiled, failed
from nnsight.core.carried import Carried, state_here
from nnsight.core.history import add_note
from nnsight.core.hooks import put_hook, take_hook
from nnsight.core.late import Tail
from nnsight.core.owner import this_thread
from nnsight.core.ports import Calls, put_first
from nnsight.core.run import Run
from nnsight.core.specs import describe_inputs
from nnsight.core.standin import StandIn
from nnsight.core.state import Unwind
from nnsight.core.tree import Tree, is_below
from nnsight.errors import AlreadyPastError, OutOfOrderError, StillRunningError

_NONE: Mapping[str, Any] = {}


class Target(NamedTuple):
    """What edits work on in place of the model itself: a copy of it, in a scan.

    Args:
        tree: Of the copy.
        copy_of: Finds the copy of a module.
        carry: Makes a run of an edit's block, as `Carried` does.
    """

    tree: Tree
    copy_of: Callable[[Any], Any]
    carry: Callable[..., Carried]


class Turn:
    """One edit in a run of the model: it begins in each call of its module, where its rank comes up.

    `is_first`: whether no other edit of the module comes before. `is_whole`: whether the module is the edit's own,
    rather than a part of it that a block calls. `running` is its block in the call that goes on.
    """

    __slots__ = ("edit", "is_first", "is_whole", "module", "rank", "running", "tail")

    def __init__(self, edit: Edit, rank: int, module: nn.Module, *, is_first: bool, is_whole: bool = True) -> None:
        self.running: Carried | None = None
        self.tail: Tail | None = None  # behind what hears its module's calls
        self.edit, self.rank, self.module, self.is_first, self.is_whole = edit, rank, module, is_first, is_whole


class Replay:
    """Has the edits of a tree run while one of its modules is called: `Replay(envoy).around(module, x)`.

    Made on the stack that the module will run on.

    Args:
        envoy: The module.
        fn: Its method that is called instead, if any.
        kwargs: What that is called with.
        target: What the edits work on, if not the model itself.
        block: The run whose block calls the module, if one does: edits are in its step, then, and know its positions.
        above: Whether edits of modules above it take part too, as far as they ask for what this call runs.
        may_look: Whether the method may be one that only looks at the module, so that no edit is missed where it calls
            nothing.
    """

    def __init__(
        self,
        envoy: Any,
        fn: str | None = None,
        kwargs: Mapping[str, Any] = _NONE,
        target: Target | None = None,
        block: Run | RowRun | None = None,
        *,
        above: bool,
        may_look: bool = False,
    ) -> None:
        self._block, self._above = None if block is None else whole_of(block), above
        self._envoy, self._all, self._generates = envoy, envoy._tree.edits, fn == "generate"
        self._seen = envoy._new_seen(fn, kwargs)
        on = target or (self._block and self._block.target) or Target(envoy._tree, _itself, Carried)
        self._tree, self._carry, self._module = on.tree, on.carry, on.copy_of(envoy._module)
        self._turns: list[Turn] = []
        self._calls: list[Calls] = []
        self._standins: list[tuple[StandIn, Calls]] = []
        self._steps: dict[nn.Module, int] = {}
        self._called: dict[nn.Module, Any] = {}
        self._eager, self._called_any = False, not may_look
        self._listening = [] if self._called_any else list(self._module.children())
        self._raised: BaseException | None = None
        self._records = torch.is_grad_enabled() and not self._generates  # as a generation's own run
        self._caller: CodeType | None = None
        self._owner = this_thread()

    def around(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Calls the module, by what is given, with the edits at work."""
        try:
            with self:
                return call(*args, **kwargs)
        except BaseException:  # a Ctrl-C may have come while they were taken off
            self._leave()
            raise
        finally:
            self._raised = None  # a cycle

    def __enter__(self) -> None:
        self._caller = sys._getframe(1).f_code
        self._owner.heard_by[id(self)] = weakref.WeakMethod(self._move)
        for child in self._listening:
            put_hook(self._hear, child._forward_pre_hooks)
        try:
            self._take_up_edits()
        except BaseException:  # of the model, which came to its first step
            self._leave()
            raise

    def _hear(self, *_: Any) -> None:
        self._called_any = True

    def _move(self, graph_task: int) -> None:
        """The model goes on in this call of autograd's engine now: another's, which is paused."""
        for calls in self._calls:
            calls.state.graph_task = graph_task
        for turn in self._turns:
            if turn.running is not None:
                turn.running.state.graph_task = graph_task

    def _take_up_edits(self) -> None:
        tree = self._tree
        run_path = tree.path(self._module)
        for rank, edit in enumerate(self._all):
            if is_below(edit.path, run_path):
                module = tree.at(edit.path)
                self._take_up(Turn(edit, rank, module, is_first=module not in self._steps))
            elif self._above and is_below(run_path, edit.path):
                is_first = self._module not in self._steps
                if self._block is not None and not edit.names.isdisjoint(("lengths", "positions")):
                    self._block.begin()  # before a step, there are none
                self._take_up(Turn(edit, rank, self._module, is_first=is_first, is_whole=False))

    def _take_up(self, turn: Turn) -> None:
        module = turn.module
        if not self._eager and any(map(compiled.is_compiled, (module, *self._tree.above(module)))):
            self._eager = True
            compiled.force_eager()
        self._steps[module] = 0
        state = state_here()
        state.rank = turn.rank
        calls = Calls(module, state, partial(self._begin, turn), partial(self._end, turn))
        self._calls.append(calls)
        tail = turn.tail = Tail(calls, stays=True)
        self._turns.append(turn)
        calls.arm()
        put_first(calls)
        tail.arm()
        # torch fetches `forward` before an edit of the module can ask for the operations in it, or skip it.
        self._standins.append((StandIn.over(module, calls), calls))

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            self._end_all(error)
        finally:
            self._leave()
        if error is None and self._raised is not None:
            add_note(self._raised, "The model caught this error of an edit, and went on without it.")
            raise self._raised
        if error is None and (self._called_any or any(self._steps.values())):
            for turn in self._turns:
                if not self._steps[turn.module]:
                    turn.edit.tell(f"`{self._tree.label(turn.module)}` was never called.")

    def _leave(self) -> None:
        """Takes everything off the model."""
        self._owner.heard_by.pop(id(self), None)
        for child in self._listening:
            take_hook(self._hear, child._forward_pre_hooks)
        for calls in self._calls:
            calls.disarm()
        for turn in self._turns:
            if turn.tail is not None:
                turn.tail.disarm()
                turn.tail = None  # a cycle
            if turn.running is not None:
                self._let_go(turn.running)
                turn.running.put_away()
        while self._standins:
            standin, calls = self._standins[-1]
            standin.leave(calls.module, calls)
            self._standins.pop()
        for calls in self._calls:  # a Ctrl-C may have come while they were armed
            if (known := StandIn.known_to(calls.module, calls)) is not None:
                known.leave(calls.module, calls)
        if self._eager:
            compiled.allow_compiled()
            self._eager = False
        self._calls = []  # a cycle

    def _let_go(self, running: Carried) -> None:
        """Keeps what an edit has raised: where the model caught it, it is raised behind its end."""
        if self._raised is None:
            self._raised = running.raised
        running.raised = None

    def _end_all(self, error: BaseException | None) -> None:
        running = [(turn.edit, turn.running) for turn in self._turns if turn.running is not None]
        for edit, carried in running:
            try:
                carried.call_ended()
                carried.drop()
            except Exception as late:
                if error is None:
                    raise
                add_note(error, f"While the edit at {edit.place} was ended, it raised {type(late).__name__}: {late}")
        if error is None or isinstance(error, Unwind):
            return
        writes = [access for _, carried in running for access in carried.history if access.verb != "read"]
        if note := failed.blame(self._tree, writes, "an edit"):
            add_note(error, note)

    def _begin(self, turn: Turn, calls: Calls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an edit up to its first wait."""
        module, edit = turn.module, turn.edit
        if turn.running is not None:  # of a call that failed
            turn.running.call_ended()
            turn.running.drop()
            self._let_go(turn.running)
        seen = self._seen if module is self._module else None
        if turn.is_first:
            if not self._steps[module]:
                self._called[module] = describe_inputs(args, kwargs)
            kind = None if self._seen is None or self._seen.plan.kind is None else self._seen.plan.kind()
            self._steps[module] += kind is None or kind.begins(self._steps[module])
            if seen is not None and kind is not None:
                seen.saw_call(kind, args, kwargs)
            elif seen is not None:
                seen.saw(args, kwargs)
        step = self._steps[module] - 1
        if turn.is_whole:
            model = self._model_of(module)
        else:
            model = self._model_of(self._tree.at(edit.path))
            if self._block is None:
                seen = None
            else:
                seen, step = self._block.seen, max(self._block.state.step, 0)
        body = partial(edit.body, EditTracer(model, step, seen), model)
        called = None if edit.told else self._called[module]
        options = {"carrier": edit.path, "records": self._records, "caller": self._caller}
        carried = turn.running = self._carry(self._tree, module, body, turn.rank, called, **options)
        if turn.tail is not None:
            turn.tail.port_fired()
        visit = carried.start(calls, args, kwargs)
        calls.skipped, calls.skip_value = visit.skipped, visit.skip_value
        return (visit.args, visit.kwargs) if visit.changed else None

    def _end(self, turn: Turn, _: Calls) -> None:
        carried = turn.running
        assert carried is not None
        asked = [self._tree.path(module) for module in carried.waited_for]
        if turn.is_whole:
            turn.edit.came_through(asked)
        elif not carried.has_ended and not is_below(asked[-1], self._tree.path(self._module)):
            carried.drop()
            turn.edit.ended_early(self._tree.path(self._module), asked)
        if sys.exc_info()[1] is not None:
            if carried.waits_for is not turn.module:  # torch is just going through this module's hooks
                carried.drop()
            return
        carried.call_ended()
        if not carried.has_ended:
            try:
                carried.close()
            except OutOfOrderError as error:
                text = str(error).splitlines()[0]
                if isinstance(error, (AlreadyPastError, StillRunningError)):
                    if not carried.skipped:
                        raise
                    text += f" Before that, `{self._tree.label(carried.skipped[-1])}` was skipped."
                turn.edit.tell(text + self._way_out(carried))
                carried.raised = None

    def _way_out(self, carried: Carried) -> str:
        """For what `generate` may have called outside of the model's forward, where this edit does not run."""
        if not self._generates or carried.waits_for is None:
            return ""
        path = self._tree.path(carried.waits_for)
        part = path.partition(".")[0]
        encoder = getattr(self._module, "get_encoder", lambda: None)()
        if isinstance(encoder, nn.Module) and carried.waits_for in set(encoder.modules()):
            part = self._tree.path(encoder)
        return (
            f" If `generate` calls `{part}` by itself, as it does with an encoder, edit that module: "
            f"model.{part}.edit(..., inplace=True). What follows for other modules is an edit of its own, then."
        )

    def _model_of(self, module: nn.Module) -> Any:
        path = self._tree.path(module)
        if module is self._module:
            return self._envoy
        return self._envoy.root._below(path) if path else self._envoy.root


def applies(run: Run | RowRun | None, hook: bool) -> bool:
    """Whether edits take part in a call of a module: a plain one, or one in a block with `hook=True`.

    Never in an edit: it would run itself.
    """
    return run is None or (hook and not isinstance(run, Carried))


def _itself(module: Any) -> Any:
    return module


def replayed(envoy: Any, call: Callable[..., Any], fn: str | None, target: Target | None = None) -> Callable[..., Any]:
    """`call`, which is the module or its method `fn`, with the edits of the tree at work in it."""
    above = not edits_now(envoy._tree)  # an edit that traces a part of its model means it without itself

    def run(*args: Any, **kwargs: Any) -> Any:
        return Replay(envoy, fn, kwargs, target, above=above).around(call, *args, **kwargs)

    return run
