"""`model.generator`: where programs written for the existing package look for what a generation returned."""

from __future__ import annotations

from typing import Any, NoReturn

from nnsight.block.rows import RowRun, whole_of
from nnsight.core.escape import escaping, raise_escaped
from nnsight.core.history import deprecated, user_place
from nnsight.core.run import Run
from nnsight.errors import BlockError, UnknownNameError
from nnsight.node import Node

_DEPRECATED = "`model.generator.output` is deprecated: write `tracer.result`."
_STREAMER = (
    "The token that a step has chosen is what the next step is called with: "
    'for step in tracer.iter[1:]: token = model.inputs[1]["input_ids"][:, -1]. All of them are in tracer.result.'
)


class Generator:
    """Stands for the generation in which it is asked; `.output` is its result, or that of a row or an invoke."""

    def __init__(self, node: Node) -> None:
        vars(self).update(_node=node)

    @property
    @escaping
    def output(self) -> Any:
        """`tracer.result`, and deprecated."""
        asked = self._generation()
        return asked.result if isinstance(asked, RowRun) else asked.returned()

    @output.setter
    def output(self, value: Any) -> None:
        asked = self._generation()
        if isinstance(asked, RowRun):
            asked.result = value
        else:
            asked.returned()
            asked.state.result = value

    def _generation(self) -> Run | RowRun:
        """What is asked for the result."""
        asked: Run | RowRun = self._node._run("generator.output")
        if not whole_of(asked).generates:
            raise BlockError(
                "`generator.output` is what a generation returns, and this is one forward pass.",
                you_wrote=user_place().source,
                instead="tracer.result    or with model.generate(...):",
            )
        deprecated(_DEPRECATED)
        return asked

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "output":
            raise_escaped()
        raise UnknownNameError(
            f"`generator` has no `{name}`: it stands for `tracer.result`, which is `generator.output`.",
            you_wrote=user_place().source,
            because=_STREAMER if name == "streamer" else None,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "output":
            getattr(self, name)
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return "<generator: its output is tracer.result>"
