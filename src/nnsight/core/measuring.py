"""Which axes of a value are rows and which are tokens: measured on a twin, never guessed from a size that matches.

The twin runs on fake inputs of three sizes, (row, token) = (3, 7), (5, 7) and (3, 11). An axis of a module's input or
output that goes 3, 5, 3 has the rows; 7, 7, 11 the tokens; 21, 35, 33 both, flattened; one that stays is neither. What
moves in any other way is not known, and nothing is cut there. A model that decides by its values runs on random inputs
instead, on two of each size (valued.py). Where a decoder was given answers of unequal length, a fourth run, with longer
ones, shows their axis. For what is inside a module, one more, on a long prompt, tells what is filled up to a chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from nnsight.core.axes import Axes, Axis, Measured, Path, Place, Unknown, Where
from nnsight.core.copies import watch
from nnsight.core.modes import without_modes
from nnsight.core.specs import Inputs, TensorSpec, Weak, specs_in
from nnsight.core.tree import Attached, Tree
from nnsight.core.twin import Twin
from nnsight.core.valued import ValuedTwin, valued_twin
from nnsight.core.values import holds_tensors, mapped, tensors_in

Owners = type[nn.Module] | nn.Module | None  # inside which modules it is looked: of this class, or this one
EITHER_WAY = (nn.RNNBase, nn.MultiheadAttention)  # modules that take [token, row, ...] unless `batch_first`
_MOST_KINDS = 64  # of inputs, that a tree remembers
# (row, token, answer); only differences count, so that no size of a model's can interfere
SIZES = ((3, 7, 13), (5, 7, 13), (3, 11, 13))
LONGER_ANSWER = (3, 7, 17)
FAR = (3, 300, 13)  # longer than what prompts are filled up to where they are gone through in chunks


def measure(
    tree: Tree,
    module: nn.Module,
    fn: str | None,
    inputs: Inputs,
    guesses: list[dict[Path, Axes]],
    inside: Attached | None,
    exact: bool,
) -> Measured:
    """Runs a twin of `module` on inputs of several sizes.

    Args:
        tree: Where the module stands; what was measured is kept there, until a module comes or goes.
        fn: The method that is run instead of the module, if any.
        inputs: What the inputs look like.
        guesses: Which axes of the inputs may have the rows and the tokens; those hold that the twin can run with.
        inside: Something inside a module; what is beside it is measured too, and in all modules of that one's class.
        exact: Whether only inputs of the same sizes count as of one kind.
    """
    if (closed := next(_closed_in(inputs), None)) is not None:
        return Measured(failed=f"an input is a {closed}, in which it isn't known what the rows are")
    sizes = tuple(spec.shape for _, spec in specs_in(inputs)) if exact else ()
    key = module, module.training, fn, _kind(inputs), tuple(tuple(guess.items()) for guess in guesses), sizes
    ask = partial(_known, tree, module, fn, inputs, guesses, inside)
    if inside is None:
        return ask(key, None)
    owner, place = inside.place[0], inside.measured_with
    measured = ask((*key, type(owner), place), type(owner))  # in all layers at once: each alone is a run of all layers
    return measured if owner in measured.inside else ask((*key, owner, place), owner)


def _known(
    tree: Tree,
    module: nn.Module,
    fn: str | None,
    inputs: Inputs,
    guesses: list[dict[Path, Axes]],
    inside: Attached | None,
    key: Any,
    owners: Owners,
) -> Measured:
    """What was measured before, or else is now."""
    if key in tree.measured:
        known: Measured = tree.measured[key]
        return known
    with without_modes():  # the block's: one that counts operations, say
        try:
            twin = Twin(module, inputs)
        except Exception as error:  # noqa: BLE001  any model may refuse to be copied in any way, and another time not
            return Measured(failed=f"the model can't be copied to measure its axes ({_brief(error)})")
        measured = _measure(tree, twin, module, fn, inputs, guesses, inside, owners)
        if measured.failed and guesses and (valued := valued_twin(module)) is not None:
            again = _measure(tree, valued, module, fn, inputs, guesses, inside, owners)
            measured = measured if again.failed else again
    if len(tree.measured) >= _MOST_KINDS:
        tree.measured.clear()
    tree.measured[key] = measured
    return measured


def _measure(
    tree: Tree,
    twin: Twin | ValuedTwin,
    module: nn.Module,
    fn: str | None,
    inputs: Inputs,
    guesses: list[dict[Path, Axes]],
    inside: Attached | None,
    owners: Owners,
) -> Measured:
    ruler = _Ruler(twin)
    tried: list[Measured] = []
    for guess in guesses:
        has_tokens = any("token" in axes for axes in guess.values())
        has_answers = any("answer" in axes for axes in guess.values())
        sizes: Any = (*(SIZES if has_tokens else SIZES[:2]), *([LONGER_ANSWER] if has_answers else []))
        if twin.has_values:  # twice, on other values: what depends on these follows nothing then
            sizes *= 2
        with ruler.looking_into(twin, inside, owners):
            seen = [ruler.run(twin, _resized(inputs, guess, *size), module, fn) for size in sizes]
            far, failed_far = seen[-1]
            if inside is not None and has_tokens:
                far, failed_far = ruler.run(twin, _resized(inputs, guess, *FAR), module, fn)
        found = _compare(tree, [shapes for shapes, _ in seen], sizes)
        _forget_sorted(found, twin.sorting)
        if twin.has_values:
            _forget_flattened(found)
        near = [seen[0][0], seen[len(seen) // 2][0]] if twin.has_values else [seen[0][0]]  # of one size
        _forget_chunks(found, near, seen[-1][0] if failed_far else far)
        failed = next((failure for _, failure in seen if failure), "")
        if mixed := _mixed(tree, found):
            failed, found = mixed, {}
        tried.append(Measured(found, failed, _shapes_in(seen[0][0])))
    hold = [measured for measured in tried if not measured.failed] or tried[-1:]
    return _agreed(hold) if hold else Measured(failed="its inputs have no tensor")


def _forget_chunks(
    found: dict[Place, dict[Path, Axes | Unknown]],
    near: list[dict[Any, dict[Path, torch.Size]]],
    far: dict[Any, dict[Path, torch.Size]],
) -> None:
    """Where tokens are gone through one by one, or in chunks, a row's part begins with the padding of the batch.

    What is filled up to a chunk is as long for one short prompt as for another, and longer for a long one.

    Args:
        found: What was found.
        near: The shapes in a run on short prompts; where values decide, in two on other values.
        far: The shapes in a run on longer ones.
    """
    *short, long = [Counter((where, kind) for where, kind, _ in seen) for seen in (*near, far)]
    for (where, kind, call), shapes in far.items():
        place, before = found.get((where, kind), {}), near[0].get((where, kind, call), {})
        is_repeated = {calls[where, kind] for calls in short} == {short[0][where, kind]} != {long[where, kind]}
        for path, shape in shapes.items():
            axes, old = place.get(path), before.get(path, shape)
            if not isinstance(axes, tuple) or "row" not in axes:
                continue
            is_filled = len(shape) != len(axes) or any(
                not axis and now != size for axis, now, size in zip(axes, shape, old, strict=True)
            )
            if is_filled or (is_repeated and "token" not in axes):
                place[path] = Unknown("tokens are gone through in chunks there, the padding of the batch too", axes)


def _forget_sorted(found: dict[Place, dict[Path, Axes | Unknown]], sorting: Collection[nn.Module]) -> None:
    """Inside a mixture of experts the sizes can be those of rows and tokens, where each token has one expert."""
    inside = {part for mixture in sorting for part in mixture.modules() if part is not mixture}
    for (where, _), place in found.items():
        if where in inside or (isinstance(where, tuple) and (where[0] in inside or where[0] in sorting)):
            place.update(dict.fromkeys(place, Unknown("the tokens of all rows are sorted by expert there")))


def _forget_flattened(found: dict[Place, dict[Path, Axes | Unknown]]) -> None:
    """What depends on values may sort the tokens of all rows."""
    for place in found.values():
        for path, axes in place.items():
            if isinstance(axes, tuple) and any("*" in axis for axis in axes):
                place[path] = Unknown(
                    "its rows and tokens are flattened into one axis, in an order that may depend on values"
                )


def _mixed(tree: Tree, found: dict[Place, dict[Path, Axes | Unknown]]) -> str:
    """What would take the rows for time steps; "" where nothing does."""
    for (module, kind), place in found.items():
        if isinstance(module, EITHER_WAY) and kind == "input":
            axes = next(iter(place.values()), ())
            if not isinstance(axes, tuple) or axes[:1] != ("row",):
                continue
            if len(axes) == 2:
                return f"`{tree.label(module)}` takes them for steps in time, since its input has no axis beside them"
            if len(axes) == 3 and not module.batch_first:
                return (
                    f"`{tree.label(module)}`, without `batch_first`, takes them for steps in time. Where they are on "
                    "the model's second axis: NNsight(..., batch_axis=1)"
                )
    return ""


def _agreed(measured: list[Measured]) -> Measured:
    """What all guesses about the inputs say that the model can run with."""
    first, *others = measured
    for place, found in first.axes.items():
        for path, axes in found.items():
            if any(other.axes.get(place, {}).get(path) != axes for other in others):
                found[path] = Unknown("it depends on which of the inputs have rows, and the model runs either way")
    return first


class _Ruler:
    """Notes the shapes of all that goes into and comes out of the parts of a twin.

    Their hooks hold it, so that it must not hold the twin.
    """

    def __init__(self, twin: Twin | ValuedTwin) -> None:
        self._shapes: dict[tuple[Where, str, int], dict[Path, torch.Size]] = {}
        for original, part in twin.parts:
            watch(part, self._noting(original, "input"), self._noting(original, "output"))

    def looking_into(self, twin: Twin | ValuedTwin, inside: Attached | None, owners: Owners) -> ExitStack:
        """Has values inside some modules noted too."""
        stack = ExitStack()
        for original, part in twin.parts:
            if inside is not None and (original is owners or type(original) is owners):
                stack.enter_context(inside.looking(original, part, self.note))
        return stack

    def run(
        self, twin: Twin | ValuedTwin, inputs: Inputs, module: nn.Module, fn: str | None
    ) -> tuple[dict[Any, dict[Path, torch.Size]], str]:
        self._shapes = {}
        try:
            self.note(module, "result", twin.run(inputs, fn))
        except Exception as error:  # noqa: BLE001  any model may fail on fake tensors in any way
            return self._shapes, f"the model can't be run on fake tensors to measure its axes ({_brief(error)})"
        return self._shapes, ""

    def _noting(self, original: nn.Module, kind: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            self.note(original, kind, output[0] if output else (args, kwargs))

        return note

    def note(self, module: Where, kind: str, value: Any) -> None:
        call = 0
        while (module, kind, call) in self._shapes:
            call += 1
        tensors = tensors_in(value)
        self._shapes[module, kind, call] = {path: tensor.shape for path, tensor in tensors if not tensor.is_nested}


def _shapes_in(seen: dict[Any, dict[Path, torch.Size]]) -> dict[tuple[Any, str, Path], list[torch.Size]]:
    found: dict[tuple[Any, str, Path], list[torch.Size]] = {}
    for (module, kind, _), shapes in seen.items():
        for path, shape in shapes.items():
            found.setdefault((module, kind, path), []).append(shape)
    return found


def _compare(tree: Tree, seen: list[dict[Any, dict[Path, torch.Size]]], sizes: Any) -> dict[Place, Any]:
    found: dict[Place, dict[Path, Axes | Unknown]] = {}
    for (module, kind, call), shapes in seen[0].items():
        others = [run.get((module, kind, call), {}) for run in seen[1:]]
        place = found.setdefault((module, kind), {})
        for path, shape in shapes.items():
            axes = _axes([shape, *(other.get(path) for other in others)], sizes)
            if place.setdefault(path, axes) != axes:
                place[path] = Unknown("its axes are not the same in all calls of the module")
    for (module, _), place in found.items():
        for path, axes in place.items():
            if isinstance(axes, tuple) and "row*token" in axes:
                place[path] = _ordered(axes, tree, module, found)
    return found


def _axes(shapes: list[torch.Size | None], sizes: Any) -> Axes | Unknown:
    """The axes of one tensor, from its shapes in the runs."""
    first = shapes[0]
    assert first is not None
    known = [shape for shape in shapes if shape is not None and len(shape) == len(first)]
    if len(known) < len(shapes):
        return Unknown("it is not there, or has other axes, when the batch has another size")
    rows, tokens, answers = zip(*sizes, strict=True)
    kinds: dict[tuple[int, ...], Axis] = {
        rows: "row",
        tokens: "token",
        answers: "answer",
        tuple(r * t for r, t, _ in sizes): "row*token",
    }
    axes: list[Axis] = []
    for at, moves in enumerate(zip(*known, strict=True)):
        kind: Axis | None = "" if len(set(moves)) == 1 else kinds.get(moves)
        if kind is None:
            of = [f"{r} rows of {t}" if len(set(tokens)) > 1 else f"{r} rows" for r, t, _ in sizes]
            runs = ", ".join(f"{n} for {size}" for n, size in zip(moves, of, strict=True))
            return Unknown(f"its axis {at} follows neither rows nor tokens ({runs})")
        axes.append(kind)
    if sum("row" in axis for axis in axes) > 1:
        return Unknown("it has the rows on two axes")
    return tuple(axes)


def _ordered(axes: Axes, tree: Tree, where: Where, found: dict[Place, dict[Path, Axes | Unknown]]) -> Any:
    """Which of rows and tokens comes first where they are flattened: as in the nearest value above that isn't."""
    module = where[0] if isinstance(where, tuple) else where
    for above in (module, *tree.above(module)):
        for kind in ("input", "output"):
            for whole in found.get((above, kind), {}).values():
                if isinstance(whole, tuple) and "row" in whole and "token" in whole:
                    first = whole.index("row") < whole.index("token")
                    return tuple("token*row" if axis == "row*token" and not first else axis for axis in axes)
    return Unknown("its rows and tokens are flattened into one axis, and nothing tells which comes first")


def _resized(inputs: Inputs, guess: dict[Path, Axes], rows: int, tokens: int, answers: int) -> Inputs:
    size = {"row": rows, "token": tokens, "answer": answers}

    def at(value: Any, path: Path) -> Any:
        if isinstance(value, TensorSpec):
            axes = guess.get(path, ("",) * len(value.shape))
            shape = [size.get(axis, old) for axis, old in zip(axes, value.shape, strict=True)]
            return value._replace(shape=torch.Size(shape))
        new = mapped(value, lambda key, item: at(item, (*path, key)))
        return value if new is None else new

    args, kwargs = inputs
    return at(args, (0,)), at(kwargs, (1,))


def _kind(value: Any) -> Any:
    """What two inputs must have in common for their axes to be the same: all but the sizes."""
    if isinstance(value, TensorSpec):
        return len(value.shape), value.dtype, value.device
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, dict):
        return type(value), tuple((key, _kind(item)) for key, item in value.items())
    return type(value.reference()) if isinstance(value, Weak) else repr(value)


def _closed_in(value: Any) -> Iterator[str]:
    """The classes of objects among the inputs that hold tensors of their own, and so rows that can't be told."""
    if isinstance(value, Weak):
        referent = value.reference()
        if referent is None or holds_tensors(referent):
            yield value.kind
    elif not isinstance(value, TensorSpec) and isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _closed_in(item)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
