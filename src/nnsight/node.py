"""What an Envoy and a scope have in common: a module in the tree, and the values that pass through it."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from nnsight.absent import METHODS
from nnsight.block.first import check_pair, first_input, with_first_input
from nnsight.block.rows import RowRun, whole_of
from nnsight.block.source import Source
from nnsight.core.escape import let_escape
from nnsight.core.history import no_such_name, user_place
from nnsight.core.inputs import explain_call, has_forward
from nnsight.core.no_value import NoValue
from nnsight.core.run import Run
from nnsight.core.spelling import nearest
from nnsight.core.state import Visit
from nnsight.core.turns import Turn
from nnsight.errors import BlockError, UnknownIndexError, UnknownNameError, WriteError
from nnsight.kinds import PORTS

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Node(NoValue):
    """A module in the tree, and the values that pass through it."""

    _module: nn.Module
    _own_names: ClassVar[Collection[str]] = ()  # that it has beside those of its class and its module
    _turn: Turn | None = None  # the call of a module that it means, where one module is several layers

    @abstractmethod
    def _child(self, name: str) -> Node | None:
        """The child module of this name, or None."""

    @abstractmethod
    def _run(self, what: str = "") -> Run | RowRun:
        """The run that this node asks for values; `what` is asked for, if not a value of the module itself."""

    @abstractmethod
    def _run_or_none(self) -> Run | RowRun | None: ...

    @abstractmethod
    def _weakly(self) -> Callable[[], Node | None]:
        """Makes this node again, for who must not hold its run."""

    # The values.

    @property
    def output(self) -> Any:
        """What the module's forward returned, exactly; the model runs up to there and waits. Assigning replaces it.

        Raises:
            OutsideTraceError: No trace of this model is open here.
            AlreadyPastError: The model ran on from this module, or beyond it.
            NeverCalledError: The forward pass does not call it.
            WriteError: What is assigned can't go on from there.
        """
        try:
            return self._run().read(self._module, "output").output
        except AttributeError as error:
            let_escape(error)
            raise

    @output.setter
    def output(self, value: Any) -> None:
        self._run().write_output(self._module, value)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All that the module's forward is called with, as `(args, kwargs)`. Assigning replaces both.

        Raises: As for `output`.
        """
        visit = self._read_input()
        return visit.args, visit.kwargs

    @inputs.setter
    def inputs(self, value: Any) -> None:
        check_pair(value, "envoy")
        self._run().write_inputs(self._module, lambda _: value)

    @property
    def input(self) -> Any:
        """The first positional input of the module's forward, or else the first keyword one. Assigning replaces it.

        Raises: As for `output`, and BlockError where the forward is called with nothing.
        """
        return first_input(self._read_input(), lambda: self._label)

    @input.setter
    def input(self, value: Any) -> None:
        self._run().write_inputs(self._module, lambda visit: with_first_input(visit, value, lambda: self._label))

    def skip(self, value: Any) -> None:
        """Leaves out the module's forward in this call: `layer.skip(layer.input)`.

        Args:
            value: What the module returns instead. It may be made from the module's input.

        Raises:
            AlreadyPastError: The model ran beyond the module.
            NeverCalledError: The forward pass does not call it.
            WriteError: The module's forward has run, or a step of a generation would be left out.
        """
        self._run().skip(self._module, value)

    @property
    def source(self) -> Source:
        """The operations inside the module's forward: `print(envoy.source)`, `envoy.source.<name>.output`."""
        return Source(self)

    def next(self, calls: int = 1) -> Node:
        """This module in a later call of the same step: `cell.next().output`, `cell.next(2).norm.output`.

        Args:
            calls: How many calls on, counted from the one where the run stands, or else from the module's next one.

        Raises:
            BlockError: It is no whole number from 1 on; or, later, nothing was asked for behind `next`.
        """
        self._run().next(self._module, calls)
        return self

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Calls the module. In a trace of its model that is its `forward`, with no hooks and no effect on the run.

        Args:
            args: As the module takes them.
            hook: True: with its hooks, and recorded: its inner values can be read afterwards
                (`model.sae.encoder.output`).
            kwargs: As the module takes them.

        Returns:
            What the module returns.
        """
        for given in (*args, *kwargs.values()):
            if isinstance(given, NoValue):
                raise given._is_no_value(f"`{self._label}` can't be called with it")
        run = self._run_or_none()
        if run is None:
            return self._module(*args, **kwargs)
        if hook:
            return run.record(self._module, args, kwargs)
        whole_of(run).functions.add(self._module)
        module = run.own(self._module)
        try:
            return module.forward(*args, **kwargs)
        except (TypeError, AttributeError) as error:
            explain_call(error, module, len(args) + len(kwargs), self._label)
            raise

    def _read_input(self) -> Visit:
        try:
            return self._run().read(self._module, "input")
        except AttributeError as error:
            let_escape(error)
            raise

    # The tree.

    @property
    @abstractmethod
    def path(self) -> str:
        """Where the module stands, as in "model.transformer.h.5"; the root is "model"."""

    @property
    def _label(self) -> str:
        """The path as errors and receipts print it: below the root, which is "model"."""
        return self.path.removeprefix("model.")

    @property
    @abstractmethod
    def _spelled(self) -> str:
        """What leads here in Python, as errors say what to write: `model.transformer.h[3]`."""

    def get(self, path: str) -> Any:
        """What a dotted path below this module leads to: `model.get("transformer.h.5.output")`.

        The whole model also takes a module's `.path`, which begins with "model".

        Raises:
            UnknownNameError: A name in it leads nowhere.
        """
        first, _, rest = path.partition(".")
        if first == self.path == "model":
            child = self._child("model")
            if child is None or (rest and self._child(rest.partition(".")[0]) is not None):
                return self._below(rest) if rest else self
        return self._below(path)

    def modules(self, include_fn: Callable[[Any], bool] | None = None, names: bool = False) -> list[Any]:
        """All modules from this one down, each once, this one first.

        Args:
            include_fn: Says of an Envoy whether it is meant; None: all are.
            names: Whether each comes with its path, as in `named_modules`.
        """
        pairs = self.named_modules(include_fn)
        return pairs if names else [node for _, node in pairs]

    @abstractmethod
    def named_modules(self, include_fn: Callable[[Any], bool] | None = None) -> list[Any]:
        """`(path, module)` of every module from this one down, as in `modules`."""

    def _below(self, path: str) -> Any:
        found: Any = self
        for name in path.split("."):
            child = found._child(name) if isinstance(found, Node) else None
            found = getattr(found, name) if child is None else child
        return found

    def _at(self, names: tuple[str, ...]) -> Node:
        """The module that these names of children lead to."""
        found: Node = self
        for name in names:
            child = found._child(name)
            if child is None:
                raise found._unknown(name)
            found = child
        return found

    def __getitem__(self, key: int | slice | str) -> Any:
        """A child by its number, `model.h[5]`; several by a slice; what a path leads to, `model["h.5.mlp"]`."""
        if isinstance(key, str):
            return self.get(key)
        numbered = type(self._module) is nn.ModuleList and type(key) is int and key >= 0
        if numbered and (child := self._child(str(key))) is not None:
            return child
        names = list(self._module._modules.keys())
        if isinstance(key, slice):
            return Several(self._child(name) for name in names[key])
        if not hasattr(key, "__index__"):
            raise self._in_brackets(key)
        try:
            return self._child(names[key])
        except IndexError:
            raise self._no_index(key) from None

    def __delitem__(self, key: Any) -> NoReturn:
        here = f"{self._spelled}[{key!r}]"
        raise BlockError(
            f"`{self._label}[{key!r}]` can't be taken out of its place.",
            you_wrote=user_place().source,
            instead=f"{here}.skip({here}.input), in a trace or an edit, to leave it out",
        )

    def __iter__(self) -> Iterator[Node]:
        children = [self._child(name) for name in list(self._module._modules.keys())]
        return (child for child in children if child is not None)

    def __len__(self) -> int:
        if not isinstance(self._module, CONTAINERS):
            kind, spelled = type(self._module).__name__, self._spelled
            raise TypeError(f"`{self._label}` is a {kind}, which has no length; its value may: len({spelled}.output)")
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, child: Any) -> bool:
        """Whether it has a child of this name, or this child, as `list(envoy)` has it."""
        if isinstance(child, Node):
            return any(child._module is one for one in self._module._modules.values())
        return child in self._module._modules

    def _further_names(self) -> dict[str, str]:
        """The names that `rename=` gave below this module, and the paths they lead to."""
        return {}

    def __dir__(self) -> list[str]:
        own = {*object.__dir__(self), *dir(self._module)}
        hidden = {f"E_{name}" for name in self._module._modules if hasattr(type(self), name)}
        return sorted({*own, *self._further_names(), *hidden})

    _is = "a module, not a value"

    def _names(self) -> tuple[str, str]:
        return self._label, self._spelled

    def _in_brackets(self, key: Any, then: str = "") -> BlockError:
        """For what is neither the number nor the name of a child; `then`: what stood behind the brackets."""
        here = self._spelled
        if has_forward(self._module):
            instead = f"{here}.output[...]{then}"
        elif isinstance(key, (tuple, list)) and not then:
            instead = f"[{here}[i].output for i in {key!r}]"
        else:
            instead = f"{here}[{int(key) if isinstance(key, float) and key.is_integer() else 0}].output{then}"
        return self._is_no_value("in brackets it takes the number or the name of a child", instead)

    def _no_index(self, index: int) -> UnknownIndexError:
        count = len(self._module._modules)
        span = f"0 to {count - 1}, or -{count} to -1" if count else "none"
        return UnknownIndexError(
            f"`{self._label}` has no child at index {index}.",
            you_wrote=user_place().source,
            it_has=f"{count} children: {span}",
            instead=f"{self._spelled}.output[{index}], for its value" if has_forward(self._module) else None,
        )

    def _unknown(self, name: str) -> UnknownNameError:
        further = self._further_names()
        names = [*self._module._modules.keys(), *further, *self._own_names, *dir(type(self)), *dir(self._module)]
        near = nearest(name, {n: None for n in names if not n.startswith("_")}, n=3)
        return UnknownNameError(
            f"`{self._label}`, a {type(self._module).__name__}, has no `{name}`.",
            you_wrote=user_place().source,
            because=METHODS.get(name),
            nearest=near,
            instead=self._uniform_of(name)
            or (f"{self._spelled}.output.{name}" if hasattr(Tensor, name) and not near else None),
            children=", ".join(self._called(name, further) for name in list(self._module._modules.keys())[:12]),
        )

    def _uniform_of(self, name: str) -> str | None:
        """What leads to this, where it is a uniform name of a layer that is asked for by the module's own names."""
        return None

    def _called(self, child: str, further: dict[str, str]) -> str:
        """A child by all its names: `ff/mlp`."""
        return "/".join([*(name for name, path in further.items() if path == f"{self.path}.{child}"), child])


def is_nearly_a_port(name: str) -> bool:
    """Whether a name is a misspelt `output` or the like, rather than one that a user means."""
    return bool(difflib.get_close_matches(name, (*PORTS, "source", "skip"), n=1, cutoff=0.8))


class Several(list[Any]):
    """Modules of a slice, `model.h[3:5]`: a list, which has no value of its own."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise no_such_name(
            name,
            f"`{name}` is asked of one module, and a slice is a list of {len(self)}.",
            f"[one.{name} for one in model.layers[2:4]]",
        )

    def __setattr__(self, name: str, _: Any) -> NoReturn:
        raise WriteError(
            f"`{name}` is assigned to one module, and a slice is a list of {len(self)}.",
            you_wrote=user_place().source,
            instead=f"for one in model.layers[2:4]: one.{name} = ...",
        )
