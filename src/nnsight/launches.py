"""From what `trace`, `scan` and `tracer.invoke` are given to a run that can begin."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight.block import replay
from nnsight.block.edit import check_not_in_its_own
from nnsight.block.invokes import Invokes
from nnsight.block.launch import Launch
from nnsight.core import compiled
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.errors import InputError, ModelError

if TYPE_CHECKING:
    from nnsight.block.scan import ScanRun
    from nnsight.running import Runnable


def check_method(envoy: Runnable, fn: Any) -> None:
    """Refuses a `fn` that is neither a function nor a method of the module."""
    if callable(fn) or (isinstance(fn, str) and callable(getattr(envoy._module, fn, None))):
        return
    if isinstance(fn, str):
        raise envoy._unknown(fn)
    raise InputError(f"`fn` is a method's name, or a function, not {fn!r}.", you_wrote=user_place().source)


def launch(envoy: Runnable, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: type[Run] = Run) -> Launch:
    """A run of the module, or of its method `fn`, on inputs that `_prepare` made; `kind` is its class."""
    if isinstance(envoy._module, nn.DataParallel):
        raise ModelError(
            f"`{envoy._label}` is a DataParallel, which runs copies of its module on other threads, where none can "
            "pause.",
            you_wrote=user_place().source,
            instead="NNsight(model.module)",
        )
    tree = envoy._tree
    if (root := tree.top()) is not None:
        root._ready()
    module = envoy._module  # behind `_ready`, which may have loaded another one
    if fn == "generate":
        kwargs = compiled.eager_generation(module, kwargs)
    call = fn if callable(fn) else getattr(module, fn) if fn else module
    if tree.edits:
        check_not_in_its_own(tree, module)
        call = replay.replayed(envoy, call, fn)
    return envoy._launched(partial(kind, tree, module, call, args, kwargs), fn, args, kwargs)


def invokes(envoy: Runnable, fn: str | None, shared: dict[str, Any]) -> Invokes:
    """The prompts of a trace that come one by one; `shared` are the keywords that the trace itself was given."""
    envoy._check_shared(fn, shared)

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return envoy._prepare_invoke(fn, shared, args, envoy._without_options(kwargs))

    opens = "with model.generate(prompt, ...):" if fn == "generate" else "with model.trace(prompt):"
    return Invokes(prepare, partial(_launch_invokes, envoy, fn, shared), envoy._tree, opens)


def _launch_invokes(
    envoy: Runnable, fn: str | None, shared: dict[str, Any], given: list[Any], kind: type[Run] = Run
) -> tuple[Launch, list[int]]:
    if not given:
        return launch(envoy, fn, *envoy._prepare(fn, (), shared), kind), []
    args, kwargs, counts = envoy._together(fn, given)
    return launch(envoy, fn, args, kwargs, kind), counts


def scan_launch(envoy: Runnable, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """A run of a fake copy of the module, or of its method `fn`, on what was given to `scan`."""
    if envoy._tree.edits:
        check_not_in_its_own(envoy._tree, envoy._module)
    if fn == "generate":
        raise InputError(
            "A generation can't be scanned: after each token, its value says whether it is the last.",
            you_wrote=user_place().source,
            instead="model.scan(prompt), which is one forward pass",
        )
    if fn is not None:
        check_method(envoy, fn)
    if callable(fn):
        raise InputError(
            "A scan runs a copy of the module, which a function doesn't call.",
            you_wrote=user_place().source,
            instead='fn="a method"',
        )
    args, kwargs = envoy._prepare_scan(fn, args, kwargs)
    return envoy._launched(partial(_scan_run, envoy, fn, args, kwargs), fn, args, kwargs)


def _scan_run(
    envoy: Runnable, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, seen: Any = None, **_: Any
) -> ScanRun:
    from nnsight.block.scan import scan_run  # torch's fake tensors take long to import

    root = envoy.root
    run = scan_run(envoy, fn, args, kwargs, root._planned_device(), root._make_scannable)
    run.seen = seen
    return run
