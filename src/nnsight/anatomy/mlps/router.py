"""A router's logits where no module returns them: met at the product with its weight, in the forward of one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnsight.anatomy.checked import check_shape, check_tensor
from nnsight.anatomy.handed import handed
from nnsight.anatomy.interior import Interior, Ports, Site, SiteName
from nnsight.anatomy.layout import Part
from nnsight.anatomy.meeting import Meeting, Met
from nnsight.anatomy.mlps.inside import Routed
from nnsight.anatomy.parts import module_at, placed, standing
from nnsight.block.rows import whole_of
from nnsight.core.escape import let_escape
from nnsight.core.run import Run
from nnsight.core.specs import shape_of
from nnsight.core.state import Visit
from nnsight.errors import BlockError

if TYPE_CHECKING:
    from nnsight.node import Node


def read(root: Node, routed: Routed) -> Tensor:
    """The logits, [prompt, token, expert]. Changed in place, they change what the model goes on with."""
    node, part, site = _site(root, routed)
    run, whole = _runs(node)
    try:
        visit = run.read(site, "output")
    except AttributeError as error:
        let_escape(error)
        raise
    whole.history.call("router_logits", shape_of(visit.output))
    return handed(node, site, part, visit)


def write(root: Node, routed: Routed, value: Any) -> None:
    """Has the model go on with other logits."""
    check_tensor(value)
    node, part, site = _site(root, routed)
    run, whole = _runs(node)

    def replaced(visit: Visit, new: Tensor) -> Tensor:
        check_shape(f"{node._label}.router_logits", standing(run, part, visit.output), new)
        made: Tensor = placed(part, visit.output, new)
        return made

    run.write_output(site, value, replaced)
    whole.history.call("router_logits", shape_of(value))


def _site(root: Node, routed: Routed) -> tuple[Node, Part, Site]:
    node = module_at(root, routed.owner)
    _, whole = _runs(node)
    module = whole.own(node._module)
    whole.come_into(module)
    shape = root._module.get_parameter(routed.weight).shape
    interior = Router.asked.get(module)
    interior = Router(module, shape) if interior is None else interior
    if not whole.state.ended:
        interior.enter(whole)
    return node, Part(routed.owner, "output", flat=routed.flat), interior.site("routing")


def _runs(node: Node) -> tuple[Any, Run]:
    run = node._run_or_none() or node._run(f"{node._label}.router_logits")
    return run, whole_of(run)


class Router(Met):
    """The inside of a module in whose forward a router's logits are computed.

    Args:
        owner: The module.
        shape: Of the router's weight, [expert, model]: the first product with such a one is it.
    """

    ports: ClassVar[Ports] = {"router_logits": ("routing", "output", 0)}
    asked: ClassVar[dict[nn.Module, Interior]] = {}  # its own: attention may be computed in the same module

    def __init__(self, owner: nn.Module, shape: torch.Size) -> None:
        super().__init__(owner)
        self.shape = shape

    def copied(self, part: nn.Module) -> Router:
        return Router(part, self.shape)

    def meeting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Meeting:
        return _Meet(self)

    def never_came(self, where: SiteName, name: str, facts: dict[str, str]) -> BlockError:
        because = "its forward computes no product with the router's weight"
        return self._lacks(name, because, ".source, which has all that its forward does", facts)


class _Meet(Meeting):
    """Meets the first product with a weight of the router's shape."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self._router, self._met = router, False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_product = function is functional.linear and len(args) > 1 and not self._met
        if not is_product or args[1].shape != self._router.shape:
            return function(*args, **kwargs)
        self._met = True
        return self._router.visit("routing", lambda hidden: function(hidden, *args[1:], **kwargs), args[0])
