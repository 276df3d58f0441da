"""The interior of one attention module: `q`, `k`, `v`, `z`, `scores` and `pattern`, read and assigned.

    q = read(model.transformer.h[3].attn, "q")              # [batch, token, head, d_head]
    write(model.transformer.h[3].attn, "pattern", pattern)  # [batch, head, query, key]

Nothing of a model's source is read. A module that calls transformers' attention interface is met there (interface.py);
another one where it calls torch's attention, or a softmax between two products of matrices (direct.py). Both have
sites (interior.py), at which a run waits as it does at modules, so that steps, rows, invokes, edits and errors are the
same here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnsight.anatomy.checked import check_tensor
from nnsight.anatomy.direct import Direct
from nnsight.anatomy.handed import copied_where_closed, is_one_of_several
from nnsight.anatomy.interface import Interfaced, interface_of
from nnsight.anatomy.interior import NAMES, Interior, Site
from nnsight.anatomy.layout import Part
from nnsight.anatomy.unheeded import warn
from nnsight.block.rows import RowRun, whole_of
from nnsight.core.escape import let_escape
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.state import Visit
from nnsight.errors import UnknownNameError, WriteError
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.node import Node

__all__ = ["NAMES", "read", "write"]


def read(node: Node, name: str) -> Tensor:
    """One of the values inside an attention module; the model runs up to there and waits.

    `q`, `k`, `v`, `z` leave the model's computation as it is, bit for bit. `scores` and `pattern` have this module
    attend eagerly in this one call, whatever implementation the model has: that is where they exist.

    Args:
        node: The attention module: an Envoy, or a scope of one run or one row.
        name: "q", "k", "v": what attention is called with, after rotary embedding; k and v with all keys of the cache.
            "z": what it returns, before the output projection. "scores": what softmax is given (scaled, soft-capped,
            masked). "pattern": what it returns, before dropout, in the dtype in which it is computed. Attention sinks
            are no keys: the rest of a row of the pattern goes to them.

    Returns:
        q and z: [batch, token, head, d_head]. k and v: [batch, token, kv_head, d_head]. scores and pattern:
        [batch, head, query, key]. Changed in place, it changes what the model goes on with.

    Raises:
        NotOnThisLayerError: The module has no such value.
        AlreadyPastError: The model ran beyond it. The order is q, k, v (in any order), scores, pattern, z; in a module
            that computes attention by hand q and k, scores, pattern, v, z. Read in that order, all of them are had of
            every model: v, which is made into z behind the pattern, is known there too.
        OutsideTraceError: No trace of this model is open here.
    """
    run, whole, site, kind, at = _port(node, name)
    if name == "v" and (arrays := _behind_scores(whole, site)) is not None:
        return _looked_back(f"{node._label}.v", run, site, at, arrays)
    try:
        visit = whole.read(site, kind, at) if run is whole else run.read(site, kind)
    except AttributeError as error:
        let_escape(error)
        raise
    value: Tensor = visit.output if kind == "output" else visit.args[at]
    if site.name == "softmax" and site.interior.unheeded is not None:
        implementation, dropped = site.interior.unheeded
        warn(type(whole.own(node._module)).__name__, dropped, implementation)
    if visit.port is not None and (run is not whole or is_one_of_several(value)):
        part = Part(f"{node._label}.{name}", kind, () if kind == "output" else (0, at))
        value = copied_where_closed(node, site, part, value)
    whole.history.call(name, shape_of(value))
    return value


def write(node: Node, name: str, value: Tensor) -> None:
    """Has the model go on with another value inside an attention module.

    Args:
        node: As in `read`.
        name: As in `read`.
        value: Of the shape that the value has; of a row's own tokens, where `node` is a row's scope.

    Raises:
        WriteError: It has another shape, or is no tensor.
        NotOnThisLayerError: The module has no such value.
        AlreadyPastError: The model ran beyond it.
    """
    run, whole, site, kind, at = _port(node, name)
    if not isinstance(value, Tensor):
        check_tensor(value, f"`{node._label}.{name}`")
    check = partial(_check, node, name)
    if kind == "input":
        run.write_inputs(site, partial(_with_input, at, value, check))
    elif run is whole:
        whole.write_output(site, value, lambda visit, new: check(visit.output, new))
    else:  # a row's, or an invoke's, which compares it with its own part
        run.write_output(site, value)
    whole.history.call(name, shape_of(value))


def _behind_scores(run: Run, site: Site) -> tuple[Tensor, ...] | None:
    """What the call of attention was given in whose softmax a run stands; None if it stands elsewhere."""
    visit = run.state.visit
    stands = None if visit is None or visit.port is None else visit.port.module
    if not isinstance(stands, Site) or stands.name != "softmax" or stands.interior is not site.interior:
        return None
    return site.interior.arrays(run.state.link.model()) if isinstance(site.interior, Interfaced) else None


def _looked_back(label: str, run: Run | RowRun, site: Site, at: int, arrays: tuple[Tensor, ...]) -> Tensor:
    """v, asked for behind the scores: known, but it can't be changed there in every model."""
    whole, value = whole_of(run), arrays[at]
    whole.history.note("read", site, "input", whole.state.step, value)
    if isinstance(run, RowRun):
        visit = Visit(None, arrays, {}, None)
        value = run.rows.shares(site, visit).take(visit, "input", run.index)[0][at]
        whole.history.amend(run.label, shape_of(value))
    whole.history.call("v", shape_of(value))
    Views.of(run).watch(value, partial(_refuse_change, label))
    return value


def _refuse_change(label: str, _: Tensor) -> None:
    raise WriteError(
        f"`{label}` was read behind the scores, where it can't be changed any more, and was changed in place.",
        instead="the change in front of the scores and the pattern; or of a copy, .clone()",
    )


def _port(node: Node, name: str) -> tuple[Any, Run, Site, str, int]:
    """Who is asked, the whole run behind it, and where: a site, "input" or "output", and which of the inputs."""
    if name not in NAMES:
        raise UnknownNameError(
            f"`{node._label}` has no `{name}`.", you_wrote=user_place().source, it_has=", ".join(NAMES)
        )
    run = node._run_or_none() or node._run(f"{node._label}.{name}")  # the label, which takes time, for its error
    whole = whole_of(run)
    module = whole.own(node._module)
    whole.come_into(module)
    interior = interior_in(whole, module)
    where, kind, at = interior.ports[name]
    site = interior.site(where)
    site.asked(name)
    return run, whole, site, kind, at


def expect(node: Node) -> None:
    """Has attention in this module met in the call that a run comes to next, where it must be known before it begins.

    A run that stands at the input of a module that computes attention itself can then be asked for what is inside.
    """
    run = node._run_or_none()
    if run is None:
        return
    whole = whole_of(run)
    module = whole.own(node._module)
    if interface_of(type(module)) is None:
        interior_in(whole, module)


def interior_in(run: Run, module: nn.Module) -> Interior:
    """The interior of a module's attention in this run, in whose calls it is met from here on."""
    kind = Direct if interface_of(type(module)) is None else Interfaced
    interior: Interior = kind.of(module)
    if not run.state.ended:
        interior.enter(run)
    return interior


def _with_input(
    at: int, value: Tensor, check: Callable[[Tensor, Tensor], Tensor], visit: Visit
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = list(visit.args)
    args[at] = check(args[at], value)
    return tuple(args), visit.kwargs


def _check(node: Node, name: str, old: Tensor, new: Tensor) -> Tensor:
    if old.shape != new.shape:
        raise WriteError(
            f"`{node._label}.{name}` has another shape than what you assigned.",
            you_wrote=user_place().source,
            it_has=show_shape(shape_of(old)),
            you_gave=show_shape(shape_of(new)),
        )
    return new
