"""Says why a wait could not be satisfied. Runs only after something went wrong."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from torch import nn

from nnsight.core.history import user_place
from nnsight.core.inputs import has_forward
from nnsight.core.spelling import quoted
from nnsight.core.stages import Stages
from nnsight.core.tree import Attached, Tree
from nnsight.core.twin import Calls, calls_of
from nnsight.errors import (
    AlreadyPastError,
    BlockError,
    CalledFewerTimesError,
    NeverCalledError,
    OutOfOrderError,
    StillRunningError,
    WriteError,
)

if TYPE_CHECKING:
    from nnsight.core.counter import StepCounter
    from nnsight.core.ports import Port
    from nnsight.core.run import Run


def why(
    run: Run,
    module: nn.Module,
    kind: str,
    stood: Port | StepCounter | None,
    ahead: int,
    elsewhere: str | None = None,
    verb: str = "read",
) -> BlockError:
    """The error for a wait that its run did not serve.

    Args:
        stood: Where the run was when it was asked.
        ahead: How many calls `.next()` skipped.
        elsewhere: Where the module was called instead, if it was.
        verb: What was to be done there: "read", "write" or "skip".
    """
    name = run.tree.name_of(module, kind)
    state, facts = run.state, {"you_wrote": user_place().source}
    if run.outcome in ("stopped", "failed in the model"):
        return AlreadyPastError(f"`{name}` can't be had any more: this run has {_ENDS[run.outcome]}.", **facts)
    if run.counter is not None and run.counter.has_outside and run.counter.is_outside(module, run.tree):
        return _outside(run, module, name, kind, facts)
    if not isinstance(module, Attached) and module not in run.tree:
        kind_of = type(module).__name__
        return NeverCalledError(f"This {kind_of} is no part of the model any more: another took its place.", **facts)
    if run.generates and state.ended:
        return over(run, f"`{name}`", f"`{name}` within `for step in tracer.iter[:]:`")
    if (given := _given_a_forward(run.tree, module)) is not None:
        run.tree.forget()
        return StillRunningError(
            f"`{name}` can't be caught: `{run.tree.label(given)}` was given a forward of its own since something in it "
            "was first asked for. That is known from now on.",
            **facts,
            instead="the same block again",
        )
    if run.generates:
        facts["step"] = str(state.block_step)
    before = [access for access in run.history if access.step == state.block_step]
    if skipped := [a for a in before if a.verb == "skipped" and a.module in run.tree.above(module)]:
        above = run.tree.label(skipped[-1].module)
        facts["skipped"] = f"`{above}`, at {skipped[-1].place.quoted}"
        return NeverCalledError(f"`{name}` has no value: `{above}` above it was skipped, so it never ran.", **facts)
    earlier = [access for access in before if access.module is module]
    if (left_out := _left_out(run, module, name, bool(earlier), facts)) is not None:
        return left_out
    if ahead:
        facts["asked_for"] = f"{ahead} more call{'s' * (ahead > 1)} of `{run.tree.label(module)}`, with `.next()`"
        if run.generates:
            facts["instead"] = "for step in tracer.iter[:]:    which goes on to the next step; .next() stays in one"
        return CalledFewerTimesError(f"`{name}` has no such call: the forward pass ended before it.", **facts)
    if (counter := run.counter) is not None and counter.has_several and (earlier or _has_begun_another_call(run)):
        first = _KEEP.get(verb, f"{verb} it there") if earlier else f"{verb} it before that line"
        further = f"{run.tree.label(module)}.next().{kind} for that of a further call in this step"
        facts["instead"] = f"{first}; or {further}"
    if earlier:
        facts["before"] = f"{earlier[-1].verb} at {earlier[-1].place.quoted}"
        keep = _KEEP.get(verb, f"{verb} it there, before the model runs on")
        of_next = "; of the next step it is asked for in `for step in tracer.iter[:]:`" if run.generates else ""
        facts.setdefault("instead", keep + of_next)
        again = ", and did not call it again" if counter is None or not counter.has_several else ""
        return AlreadyPastError(f"`{name}` is past: the model ran on from it{again}.", **facts)
    if elsewhere:
        return OutOfOrderError(f"`{name}` is past, or only called {elsewhere}, where this run can't pause.", **facts)
    return _by_twin(run, module, kind, stood, facts, verb)


def nothing_takes(run: Run, module: nn.Module, part: str = "") -> WriteError:
    """The error for a write to the input of a module that is skipped in this call, for all or for one `part`."""
    label, step = run.tree.label(module), max(run.state.step, 0)
    here = label if isinstance(module, Attached) else run.tree.spelled(module)
    skips = [a for a in run.history if a.verb == "skipped" and a.module is module and a.step == step]
    return WriteError(
        f"Nothing takes what is written to `{label}.input`{part}: the {_what(module)} is skipped in this call.",
        you_wrote=user_place().source,
        skipped=f"at {skips[-1].place.quoted}" if skips else "by an edit",
        instead=f"{here}.output = ..., which it has all the same; or {here}.skip(...) again, which has the last word",
    )


def _what(module: nn.Module) -> str:
    return "operation" if isinstance(module, Attached) else "module"


def _left_out(run: Run, module: nn.Module, name: str, met: bool, facts: dict[str, str]) -> OutOfOrderError | None:
    """For what somebody else skipped something above of; `met`: whether the block came by an earlier call of it."""
    around = run.tree.above(module)
    for skipped in run._hold.skipped:
        what = run.tree.label(skipped)
        if skipped in around and met:
            return CalledFewerTimesError(f"`{name}` has no such call: `{what}` above it was skipped once.", **facts)
        if skipped in around:
            return NeverCalledError(f"`{name}` has no value: `{what}` above it was skipped, so it never ran.", **facts)
        if isinstance(skipped, Attached) and skipped.place[0] in around and not _has_run(module):
            return OutOfOrderError(f"`{name}` is past, or was left out with `{what}`, which was skipped.", **facts)
    return None


def _given_a_forward(tree: Tree, module: nn.Module) -> nn.Module | None:
    """A list of modules that is called by now, and was not when the tree last looked who calls what is in it."""
    for one in (module, *tree.above(module)):
        if type(one) in (nn.ModuleList, nn.ModuleDict) and "forward" in vars(one):
            known = [callers for child, callers in list(tree.callers.items()) if one in tree.above(child)]
            if any(one not in callers for callers in known):
                return one
    return None


def _has_begun_another_call(run: Run) -> bool:
    """Whether the model has gone on to a further call in the step that the block is in."""
    state = run.state
    return not state.ended and state.step == state.block_step and state.turn > state.block_turn


def _has_run(module: nn.Module) -> bool:
    """Whether the run came by, which of what is inside a module is known without a twin."""
    return isinstance(module, Attached) and module.has_run


def over(run: Run, what: str, instead: str) -> AlreadyPastError:
    """The error for something asked of a generation that has come to its end."""
    if run.outcome in _ENDS:
        return AlreadyPastError(
            f"{what} can't be had any more: this run has {_ENDS[run.outcome]}.", you_wrote=user_place().source
        )
    count = f"{run.state.step + 1} step{'s' * (run.state.step != 0)}"
    return AlreadyPastError(
        f"{what} can't be had any more: the generation is over, after {count}.",
        you_wrote=user_place().source,
        instead=instead,
    )


_KEEP = {"read": "keep the value from there in a variable"}
_ENDS = {
    "stopped": "been stopped",
    "failed in the model": "ended when the model failed",
    "failed in the block": "ended when its block failed",
}


def no_result(run: Run) -> AlreadyPastError:
    """The error for the result of a run that did not come to it."""
    facts = {"you_wrote": user_place().source}
    if run.outcome == "stopped":
        facts["instead"] = (
            "break, and tracer.result behind the loop: that lets the model run to its end"
            if run.generates
            else "no tracer.stop(), which leaves out the rest of the model"
        )
    end = _ENDS.get(run.outcome, "been dropped")
    return AlreadyPastError(f"There is no result: this run has {end}.", **facts)


def _by_twin(
    run: Run, module: nn.Module, kind: str, stood: Port | StepCounter | None, facts: dict[str, str], verb: str
) -> BlockError:
    name, is_met_midway = run.tree.name_of(module, kind), False
    if isinstance(module, Attached):
        if (said := _inside(run, name, module, facts, verb, stood)) is not None:
            return said
        is_met_midway, module = module.is_met_midway, module.place[0]
    if not has_forward(module):
        what, here = "nothing calls it", run.tree.spelled(module)
        if (first := next(filter(has_forward, module.modules()), None)) is not None:
            what = "the modules in it are called one by one"
            every = f"    or [one.{kind} for one in {here}]" if first in module.children() else ""
            facts["instead"] = f"{run.tree.spelled(first)}.{kind}{every}"
        kind_of = type(module).__name__
        return NeverCalledError(f"`{name}` has no value: a {kind_of} has no forward, and {what}.", **facts)
    stages = run.counter if run.counter is not None and run.counter.has_outside else None
    ran = run.module if stages is None else stages.module  # what the inputs that are known were given to
    is_told = stages is None or module is ran or ran in run.tree.above(module)
    calls = calls_of(ran, run.called or run.state.first_call) if is_told else Calls([], {}, False)
    is_inside = stood is not None and module in calls.around.get(stood.module, ())
    if is_inside and kind == "output" and not is_met_midway:
        facts["it_stood"] = _standing(run, stood)
        facts["instead"] = f"touch `{run.tree.label(module)}.input` before that line"
        return StillRunningError(
            f"`{name}` can't be caught: its call began before anything below it was asked for.", **facts
        )
    if module in calls.order:
        facts["it_stood"] = _standing(run, stood)
        facts.setdefault("instead", _earlier(run, name, stood, verb))
        return AlreadyPastError(f"`{name}` is past: the model had run beyond it when you asked.", **facts)
    if run.tree.edits and not run.tree.called_by_edits.isdisjoint({module, *run.tree.above(module)}):
        facts["it_stood"] = _standing(run, stood)
        facts["instead"] = f"{verb} `{name}` before that line, or in a second trace"
        return OutOfOrderError(f"`{name}` is past, or this run did not call it: an edit is what does.", **facts)
    if not calls.complete:
        facts["it_stood"] = _standing(run, stood)
        return OutOfOrderError(f"`{name}` is past, or was never called: this run ended without coming there.", **facts)
    facts.update(_what_ran(run.tree, run.tree.path(module), calls.order))
    if (above := _uses_weights_of(run.tree, module)) is not None and above in calls.order:
        label = run.tree.label(above)
        facts["perhaps"] = f"`{label}` gives its weights to a function: print(model.get({label!r}).source)"
        if above is run.tree.root:
            facts["perhaps"] = "the model gives its weights to a function: print(model.source)"
    if any(run.tree.is_only_in(one, module) for one in calls.order):
        label = run.tree.label(module)
        facts["because"] = f"it was run without a call, by `{label}.forward(...)` say, which no hook of torch's sees"
        facts["instead"] = f"what is in it, or a model that calls `{label}(...)`"
    facts.update(_by_the_block(run, module, kind))
    return NeverCalledError(f"`{name}` has no value: this forward pass never called it.", **facts)


def _by_the_block(run: Run, module: nn.Module, kind: str) -> dict[str, str]:
    """For what the block called itself: as a function, or with `hook=True`, after which nothing in it is written."""
    tree = run.tree
    here = tree.spelled(module)
    if module in run.recorded:
        return {
            "because": "the block's own call of it is over, and what came out of that is the block's",
            "instead": f"{here}.{kind} = ... in an edit that calls it, or in a trace of that alone, {here}.trace(x)",
        }
    called = next((one for one in (module, *tree.above(module)) if one in run.functions), None)
    if called is None:
        return {}
    return {
        "because": f"the block called `{tree.label(called)}` as a function, of which nothing is kept",
        "instead": f"{tree.spelled(called)}(..., hook=True), and then {here}.{kind}",
    }


def _uses_weights_of(tree: Tree, module: nn.Module) -> nn.Module | None:
    """The module above, if its forward names this one and its weights, as `F.linear(x, self.head.weight)` does."""
    path, _, name = tree.path(module).rpartition(".")
    if not name or not any(one is not None for one in module._parameters.values()):
        return None
    above = tree.at(path)
    code = getattr(getattr(type(above), "forward", None), "__code__", None)
    names = getattr(code, "co_names", ())
    return above if name in names and not {*module._parameters}.isdisjoint(names) else None


def _outside(run: Run, module: nn.Module, name: str, kind: str, facts: dict[str, str]) -> OutOfOrderError:
    """For what is called before or behind all steps: a text encoder, say."""
    counter, tree = run.counter, run.tree
    assert isinstance(counter, Stages)
    calls = counter.calls
    around = [one for one in (module, *tree.above(module)) if one in calls]
    if not around:
        inside = [tree.label(one) for one in calls if module in tree.above(one)]
        facts["it_called"] = quoted(inside) or "nothing of it"
        if inside:
            facts["instead"] = f"model.{inside[-1]}.{kind}"
        return NeverCalledError(f"`{name}` has no value: this run never called that module.", **facts)
    inputs, step = calls[around[-1]]
    found = Calls([module], {}, True) if module is around[-1] else calls_of(around[-1], inputs)
    if found.complete and module not in found.order:
        facts.update(_what_ran(tree, tree.path(module), found.order))
        return NeverCalledError(f"`{name}` has no value: this run never called that module.", **facts)
    before = step < 0
    facts["it_came"] = "before the first step" if before else "behind the last step"
    facts["instead"] = "before the loop over the steps, and before anything in them" if before else "behind the loop"
    return AlreadyPastError(f"`{name}` is past: the model had run beyond it when you asked.", **facts)


def _inside(
    run: Run, name: str, site: Attached, facts: dict[str, str], verb: str, stood: Port | StepCounter | None
) -> BlockError | None:
    """For something inside a module that was entered: whether the run came by; `stood`: where it was."""
    if not site.was_entered:
        return None
    facts.update(site.its_line())
    if site.has_run:
        facts["it_stood"] = _standing(run, stood)
        facts["instead"] = _earlier(run, name, stood, verb)
        return AlreadyPastError(f"`{name}` is past: the model had run beyond it when you asked.", **facts)
    return site.never_came(name, facts)


def _earlier(run: Run, name: str, stood: Port | StepCounter | None, verb: str) -> str:
    """What to write for what is past: an earlier line, but where the very line that asks was there, as in a loop."""
    last = [] if stood is None else [access for access in run.history if access.module is stood.module]
    if last and last[-1].place == user_place():
        return f"`{name}` first, in the order in which the model runs, or in a second trace"
    return f"{verb} `{name}` before that line, or in a second trace"


def _standing(run: Run, stood: Port | StepCounter | None) -> str:
    if stood is None:
        return (
            "at the end"
            if run.state.ended and not run.history
            else "after its first step"
            if run.state.step
            else "at its end"
        )
    last = [access for access in run.history if access.module is stood.module]
    since = f", since {last[-1].place.quoted}" if last else ""
    return f"at `{run.tree.name_of(stood.module, stood.kind)}`{since}"


def _what_ran(tree: Tree, path: str, order: list[nn.Module]) -> dict[str, str]:
    inner = [called for module in dict.fromkeys(order) if (called := tree.path(module))]
    if not inner:
        return {"it_called": "no module below it"}
    near = (
        difflib.get_close_matches(path, inner, n=2, cutoff=0.6) or [c for c in inner if path.startswith(c + ".")][-1:]
    )
    several = f"{len(inner)} modules, `{inner[0]}` first and `{inner[-1]}` last"
    return {
        "it_called": several if len(inner) > 1 else f"`{inner[0]}` alone",
        "nearest": quoted(near),
    }
