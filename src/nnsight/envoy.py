"""The module tree that a user sees: one Envoy a module, made when it is asked for.

An Envoy has no state of a run. `model.h[5].output` looks up the run of this tree that was opened last in this context, and
asks it for the value. A `Scope` is the same tree bound to one run: `tracer.model`.
"""

from __future__ import annotations

import difflib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from .block.calls import stands_in_with
from .block.tracer import Tracer
from .core.escape import escaping, raise_escaped
from .core.history import user_place
from .core.inputs import check_inputs
from .core.run import Run, open_run
from .core.state import Visit
from .core.tree import Tree
from .errors import OutsideTraceError, UnknownIndexError, UnknownNameError, WriteError

_PORTS = ("output", "input", "inputs")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Node(ABC):
    """A module in the tree, and the values that pass through it."""

    _module: nn.Module

    @abstractmethod
    def _child(self, name: str) -> Node | None:
        """The child module of this name, or None."""

    @abstractmethod
    def _run(self) -> Run:
        """The run that this node asks for values."""

    @abstractmethod
    def _run_or_none(self) -> Run | None: ...

    # The values.

    @property
    def output(self) -> Any:
        """What the module's forward returned, exactly; the model runs up to there and waits. Assigning replaces it.

        Raises:
            OutsideTraceError: No trace of this model is open here.
            AlreadyPastError: The model ran on from this module, or beyond it.
            NeverCalledError: The forward pass does not call it.
        """
        return self._read("output", lambda visit: visit.output)

    @output.setter
    def output(self, value: Any) -> None:
        self._run().write_output(self._module, value)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All that the module's forward is called with, as `(args, kwargs)`. Assigning replaces both."""
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = self._read("input", lambda visit: (visit.args, visit.kwargs))
        return inputs

    @inputs.setter
    def inputs(self, value: Any) -> None:
        if not isinstance(value, tuple) or [type(part) for part in value] != [tuple, dict]:
            raise WriteError(
                "`.inputs` takes a pair: a tuple of positional inputs and a dict of keyword inputs.",
                you_wrote=user_place().source,
                instead="envoy.inputs = (hidden,), {}    or envoy.input = hidden, which keeps the rest",
            )
        self._run().write_inputs(self._module, lambda _: value)

    @property
    def input(self) -> Any:
        """The first positional input of the module's forward, or else the first keyword one. Assigning replaces that one."""
        return self._read("input", self._first_input)

    @input.setter
    def input(self, value: Any) -> None:
        self._run().write_inputs(self._module, lambda visit: self._with_first_input(visit, value))

    def skip(self, value: Any) -> None:
        """Leaves out the module's forward in this call; `value` becomes its output. It may depend on the module's input."""
        self._run().skip(self._module, value)

    def next(self) -> Node:
        """This module at its call after the one where the run stands, or else after the next one: `cell.next().output`."""
        self._run().next(self._module)
        return self

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Calls the module. In a trace of its model that is its `forward`, with no hooks and no effect on the run.

        Args:
            hook: True: with its hooks, and recorded: its inner values can be read afterwards (`model.sae.encoder.output`).
        """
        run = self._run_or_none()
        if run is None:
            return self._module(*args, **kwargs)
        if hook:
            return run.record(self._module, args, kwargs)
        return self._module.forward(*args, **kwargs)

    def _read(self, kind: str, get: Callable[[Visit], Any]) -> Any:
        try:
            return get(self._run().read(self._module, kind))
        except AttributeError as error:
            raise escaping(error)

    def _first_input(self, visit: Visit) -> Any:
        if not visit.args and not visit.kwargs:
            raise WriteError(f"`{self.path}` was called without any input.", instead="`.inputs` is ((), {}) here")
        return visit.args[0] if visit.args else next(iter(visit.kwargs.values()))

    def _with_first_input(self, visit: Visit, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._first_input(visit)
        if visit.args:
            return (value, *visit.args[1:]), visit.kwargs
        return (), {**visit.kwargs, next(iter(visit.kwargs)): value}

    # The tree.

    @property
    @abstractmethod
    def path(self) -> str:
        """Where the module stands, as in "model.transformer.h.5"; the root is "model"."""

    def get(self, path: str) -> Any:
        """What a dotted path below this module leads to: `model.get("transformer.h.5.output")`."""
        found: Any = self
        for name in path.split("."):
            child = found._child(name) if isinstance(found, Node) else None
            found = getattr(found, name) if child is None else child
        return found

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return self.get(key)
        names = list(self._module._modules.keys())
        if isinstance(key, slice):
            return [self._child(name) for name in names[key]]
        try:
            return self._child(names[key])
        except IndexError:
            raise self._no_index(key) from None

    def __iter__(self) -> Iterator[Node]:
        children = (self._child(name) for name in self._module._modules.keys())
        return (child for child in children if child is not None)

    def __len__(self) -> int:
        if not isinstance(self._module, _CONTAINERS):
            raise TypeError(f"`{self.path}` is a {type(self._module).__name__}, which has no length")
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, name: str) -> bool:
        return name in self._module._modules

    def __repr__(self) -> str:
        return repr(self._module)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._module)})

    def _no_index(self, index: int) -> UnknownIndexError:
        count = len(self._module._modules)
        span = f"0 to {count - 1}, or -{count} to -1" if count else "none"
        return UnknownIndexError(
            f"`{self.path}` has no child at index {index}.",
            you_wrote=user_place().source,
            it_has=f"{count} children: {span}",
        )

    def _unknown(self, name: str) -> UnknownNameError:
        names = [*self._module._modules.keys(), *_PORTS, "skip", *vars(type(self)), *dir(self._module)]
        near = dict.fromkeys(difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=3))
        return UnknownNameError(
            f"`{self.path}`, a {type(self._module).__name__}, has no `{name}`.",
            you_wrote=user_place().source,
            nearest=", ".join(f"`{n}`" for n in near),
            children=", ".join(list(self._module._modules.keys())[:12]),
        )


class Envoy(Node):
    """A module of a model.

    Everything that is not here is the module's own: children come as Envoys; parameters, config and methods come as they are.
    A child with a name of ours (BERT has one called `output`) is had by index, `envoy["output"]`, or as `envoy.E_output`.
    """

    _tree: Tree
    _children: dict[str, Envoy]

    def __init__(self, module: nn.Module, tree: Tree) -> None:
        self._module, self._tree, self._children = module, tree, {}

    def _run_or_none(self) -> Run | None:
        return open_run(self._tree)

    def _run(self) -> Run:
        run = open_run(self._tree)
        if run is None:
            raise OutsideTraceError(
                f"A value of `{self.path}` was asked for where no trace of this model is open.",
                you_wrote=user_place().source,
                instead="with model.trace(...):  and this line inside it",
            )
        return run

    # Running.

    def trace(self, *args: Any, fn: str | None = None, trace: bool = True, **kwargs: Any) -> Any:
        """A trace of this module on these inputs: `with envoy.trace(x) as tracer:`. The module runs as the block asks.

        Args:
            args: The positional inputs of the module's forward.
            fn: Another method of the module to run instead of its forward.
            trace: False: no block, but a plain call, whose output is returned.
            kwargs: The keyword inputs of the module's forward.

        Raises:
            InputError: The module can't be called with these inputs.
        """
        return self._start(fn, args, kwargs, trace)

    def _trace_or_call(
        self, fn: str, args: tuple[Any, ...], kwargs: dict[str, Any], trace: bool | None, caller: FrameType
    ) -> Any:
        """A tracer where the call stands in a `with` (or `trace=True`), else the result of the plain call."""
        return self._start(fn, args, kwargs, stands_in_with(caller) if trace is None else trace)

    def _start(self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], trace: bool) -> Any:
        self._ready()
        args, kwargs = self._prepare(args, kwargs)
        module, tree = self._module, self._tree
        call = getattr(module, fn) if fn else module
        tracer = Tracer(
            lambda: Run(tree, module, call, args, kwargs, steps=fn == "generate"),
            lambda run: Scope(self, run),
        )
        return tracer if trace else tracer.run()

    def _ready(self) -> None:
        """Called before a run is made."""

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turns what was given to `trace` into the module's inputs."""
        check_inputs(self._module, args, kwargs, self.path)
        return args, kwargs

    # The tree.

    @property
    def path(self) -> str:
        below = self._tree.path(self._module)
        return f"model.{below}" if below else "model"

    @property
    def root(self) -> Envoy:
        """The model that this module belongs to."""
        top = self._tree.top()
        return Envoy(self._tree.root, self._tree) if top is None else top

    @property
    def parent(self) -> Envoy | None:
        """The module above this one; None for the root."""
        above = self._tree.path(self._module).rpartition(".")[0]
        if self._module is self._tree.root:
            return None
        return self.root.get(above) if above else self.root

    def modules(self, include_fn: Callable[[Envoy], bool] | None = None, names: bool = False) -> list[Any]:
        """All modules from this one down, as Envoys; with their paths if `names`. `include_fn` chooses among them."""
        pairs = self.named_modules(include_fn)
        return pairs if names else [envoy for _, envoy in pairs]

    def named_modules(self, include_fn: Callable[[Envoy], bool] | None = None) -> list[tuple[str, Envoy]]:
        """`(path, Envoy)` of every module from this one down, each once, this one first."""
        envoys = [self.get(name) if name else self for name, _ in self._module.named_modules()]
        return [(envoy.path, envoy) for envoy in envoys if include_fn is None or include_fn(envoy)]

    @property
    def device(self) -> torch.device | None:
        """Where the module's first parameter is; None without parameters."""
        first = next(self._module.parameters(), None)
        return None if first is None else first.device

    @property
    def devices(self) -> set[torch.device]:
        """Where the module's parameters are."""
        return {parameter.device for parameter in self._module.parameters()}

    def to(self, *args: Any, **kwargs: Any) -> Envoy:
        """Moves or casts the module, as `torch.nn.Module.to`."""
        self._module.to(*args, **kwargs)
        return self

    def cpu(self) -> Envoy:
        """Moves the module to the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | str | None = None) -> Envoy:
        """Moves the module to a CUDA device, the current one by default."""
        self._module.cuda(device)  # type: ignore[arg-type]
        return self

    def _child(self, name: str) -> Envoy | None:
        children = self._module._modules
        module = children[name] if name in children else None  # noqa: SIM401  TorchScript's has no `get`
        if module is None:
            return None
        child = self._children.get(name)
        if child is None or child._module is not module:
            child = self._children[name] = self._new_child(name, module)
        return child

    def _new_child(self, name: str, module: nn.Module) -> Envoy:
        if self._tree.first_place(module, (self._module, name)) == (self._module, name):
            return Envoy(module, self._tree)
        return self._elsewhere(module)

    def _elsewhere(self, module: nn.Module) -> Envoy:
        """The one Envoy of a module that was reached by another way than its path."""
        path = self._tree.path(module)
        envoy = self.root.get(path) if path else self.root
        assert isinstance(envoy, Envoy)
        return envoy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_module" not in self.__dict__:
            raise AttributeError(name)
        if name in _PORTS:
            raise_escaped()
        child = self._child(name) or (self._child(name[2:]) if name.startswith("E_") else None)
        if child is not None:
            return child
        try:
            value = getattr(self._module, name)
        except AttributeError:
            raise self._unknown(name) from None
        return self._elsewhere(value) if isinstance(value, nn.Module) and value in self._tree else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        elif isinstance(value, nn.Module):
            self.__dict__.pop(name, None)
            setattr(self._module, name, value)
            self._tree.forget()
        elif hasattr(self._module, name):
            setattr(self._module, name, value)
        elif self._run_or_none() is not None:
            raise self._unknown(name)  # a misspelt `.output = ...` must not pass in silence
        else:
            object.__setattr__(self, name, value)


class NNsight(Envoy):
    """Any PyTorch module, wrapped: its inner values can be read, changed and recomputed while it runs.

    Wrapping changes nothing on the module. A module that nobody asks about is never touched.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"NNsight wraps a torch.nn.Module, not a {type(module).__name__}")
        super().__init__(module, Tree(module))
        self._tree.top = weakref.ref(self)

    def _replace_module(self, module: nn.Module) -> None:
        """Puts another module of the same structure in place of the root. Envoys that were obtained before stay valid."""
        _point(self, module)
        self._tree.root = module

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tree.top = weakref.ref(self)


def _point(envoy: Envoy, module: nn.Module) -> None:
    for name, attached in envoy._module._modules.items():
        if name not in module._modules:
            module._modules[name] = attached
    envoy._module = module
    for name, child in envoy._children.items():
        if (below := module._modules.get(name)) is not None and child._module is not below:
            _point(child, below)


class Scope(Node):
    """A module of a model bound to one run, also where another run of the same model was opened later."""

    _envoy: Envoy
    _bound: Run

    def __init__(self, envoy: Envoy, run: Run) -> None:
        self._envoy, self._bound, self._module = envoy, run, envoy._module

    @property
    def path(self) -> str:
        return self._envoy.path

    @property
    def model(self) -> Scope:
        """The same module: `tracer.model.h[5]` and `tracer.h[5]` are one."""
        return self

    def _run_or_none(self) -> Run | None:
        return self._bound if self._bound.is_open else None

    def _run(self) -> Run:
        if not self._bound.is_open:
            raise OutsideTraceError(
                f"A value of `{self.path}` was asked for after the block of its trace.", you_wrote=user_place().source
            )
        return self._bound

    def _child(self, name: str) -> Scope | None:
        child = self._envoy._child(name)
        return None if child is None else Scope(child, self._bound)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_envoy" not in self.__dict__:
            raise AttributeError(name)
        if name in _PORTS:
            raise_escaped()
        value = getattr(self._envoy, name)
        return Scope(value, self._bound) if isinstance(value, Envoy) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._envoy, name, value)
