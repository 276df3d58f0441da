"""The module tree that a user sees: one Envoy a module, made when it is asked for.

An Envoy has no state of a run. `model.h[5].output` looks up the run of this tree that was opened last in this context,
and asks it for the value. A `Scope` (scopes.py) is the same tree bound to one run: `tracer.model`.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import nn

from nnsight import children
from nnsight.absent import refuse_options
from nnsight.block import edit as edits
from nnsight.block import replay
from nnsight.block.beginning import gathering
from nnsight.block.rows import RowRun, whole_of
from nnsight.block.steps import of_module
from nnsight.block.tracer import Tracer
from nnsight.core import offload
from nnsight.core.escape import raise_escaped
from nnsight.core.history import user_place
from nnsight.core.opened import OPEN, open_run
from nnsight.core.run import Run
from nnsight.core.tree import Tree
from nnsight.core.unloaded import lent
from nnsight.errors import OutsideTraceError
from nnsight.kinds import PORTS, check_names, descriptions, let_errors_out
from nnsight.methods import of_envoy
from nnsight.node import Node, is_nearly_a_port
from nnsight.running import Runnable
from nnsight.scopes import RowScope, Scope
from nnsight.shown import shown

if TYPE_CHECKING:
    from typing_extensions import Self


class Envoy(Runnable):
    """A module of a model.

    Everything that is not here is the module's own: children come as Envoys; parameters, config and methods come as
    they are. A child with a name of ours (BERT has one called `output`) is had by index, `envoy["output"]`, or as
    `envoy.E_output`.
    """

    _children: dict[str, Envoy]
    _below_known: dict[tuple[str, ...], Node]  # by the names on the way to them
    _escapes: ClassVar[frozenset[str]] = frozenset(PORTS)  # whose AttributeErrors are their own

    def __init__(self, module: nn.Module, tree: Tree) -> None:
        self._module, self._tree, self._children, self._below_known = module, tree, {}, {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_names(cls)
        cls._escapes |= let_errors_out(cls)

    def _run_or_none(self) -> Run | RowRun | None:
        run: Run | RowRun | None = open_run(self._tree)
        return run

    def _run(self, what: str = "") -> Run | RowRun:
        tree = self._tree
        if (opened := OPEN.get()) and (last := opened[-1]()) is not None and last.outer is tree and last.is_open:
            return last if type(last) is Run else last.asked()  # the usual case, with fewer calls
        run = open_run(tree)
        if run is None:
            if (trace := gathering(self._tree)) is not None:
                trace._run_alone("")
            if edits.original_is_traced(self._tree):
                raise OutsideTraceError(
                    f"A value of `{self._label}` was asked of an edited view, while the original is traced, unedited.",
                    you_wrote=user_place().source,
                    instead="with edited.trace(...):    in place of model.trace(...)",
                )
            raise OutsideTraceError(
                f"A value of `{what or self._label}` was asked for where no trace of this model is open.",
                you_wrote=user_place().source,
                because=_here(),
                instead="with model.trace(...):  and this line inside it",
            )
        return run

    def _weakly(self) -> Callable[[], Envoy]:
        return lambda: self

    def _bind(self, run: Run | RowRun, tracer: Tracer) -> Scope:
        return RowScope(self, run, tracer) if isinstance(run, RowRun) else Scope(self, run)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        run = self._run_or_none()
        if run is None:  # in a run of this model it has what it needs, and a scan needs no weights
            self.root._ready()
        if self._tree.edits and replay.applies(run, hook):
            return replay.Replay(self, block=run, above=hook).around(super().__call__, *args, hook=hook, **kwargs)
        return super().__call__(*args, hook=hook, **kwargs)

    # Edits that stay.

    @overload
    def edit(self, *, inplace: bool = False, **options: Any) -> edits.EditBlock: ...
    @overload
    def edit(self, function: Callable[..., Any], *, inplace: bool = False, **options: Any) -> Self: ...

    def edit(self, function: Callable[..., Any] | None = None, *, inplace: bool = False, **options: Any) -> Any:
        """Changes the model for all later runs: `with model.edit() as edited:`, `model.edit(function)`, `@model.edit`.

        The block runs at each call of this module, from its start on: once in a trace, once for each token in a
        generation. The edited model shares all modules with this one, which is not edited.

        Args:
            function: The edit, in the form that needs no source: `function(model)`, or `function(tracer, model)`.
            inplace: Edit this model itself; of a sub-module, such an edit takes part in runs of the whole model.
            options: None that mean anything: those of the existing package may be switched off.

        Returns:
            The edited model; without a function, what a `with` needs: it binds the edited model, or
            `as (tracer, edited)`; the tracer alone if `inplace`.

        Raises:
            BlockError: The body of the `with` can't be had or left out, or the function can't be an edit.
        """
        refuse_options(options)
        return edits.EditBlock(self, inplace) if function is None else edits.add(self, function, inplace)

    def clear_edits(self) -> None:
        """Takes away the edits of this module, and of all below it, in this model."""
        edits.clear(self)

    def _view(self) -> Self:
        """Another Envoy of the same module, whose edits are its own."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._children, view._below_known = {}, {}
        view._tree = self._tree.view(self._tree.edits)
        if self._module is self._tree.root:
            view._tree.top = weakref.ref(view)
        view._tree.family[:] = [one for one in view._tree.family if one() is not None]
        view._tree.family.append(weakref.ref(view))
        return view

    # The tree.

    @property
    def path(self) -> str:
        """Where the module stands, as in "model.transformer.h.5"; the root is "model"."""
        below = self._tree.path(self._module)
        return f"model.{below}" if below else "model"

    @property
    def _spelled(self) -> str:
        return self._tree.spelled(self._module, Envoy)

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
        return self.root._below(above) if above else self.root

    def named_modules(self, include_fn: Callable[[Envoy], bool] | None = None) -> list[tuple[str, Envoy]]:
        """`(path, Envoy)` of every module from this one down, as in `modules`."""
        envoys = [self._below(name) if name else self for name, _ in self._module.named_modules()]
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

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves or casts the module, as `torch.nn.Module.to`."""
        self._loaded().to(*args, **kwargs)
        return self

    def cpu(self) -> Self:
        """Moves the module to the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | str | None = None) -> Self:
        """Moves the module to a CUDA device, the current one by default."""
        self._loaded().cuda(device)  # type: ignore[arg-type]
        return self

    def _child(self, name: str) -> Envoy | None:
        children = self._module._modules
        module = children[name] if name in children else None  # noqa: SIM401  TorchScript's has no `get`
        if module is None:
            return self._aliased(name) if self._tree.aliases else None
        child = self._children.get(name)
        if child is None or child._module is not module:
            child = self._children[name] = self._new_child(name, module)
        return child

    def _at(self, names: tuple[str, ...]) -> Node:
        known = self._below_known.get(names)
        if known is not None:
            module: Any = self._module
            try:
                for name in names:
                    module = module._modules[name]
            except (KeyError, AttributeError):  # it was taken out, which `super` tells
                module = None
            if known._module is module:  # nobody has put another one there
                return known
        found = self._below_known[names] = super()._at(names)
        return found

    def _aliased(self, name: str) -> Envoy | None:
        target = self._tree.aliases.get(self.path, {}).get(name)
        return None if target is None else self.root._below(target.partition(".")[2])

    def _new_child(self, name: str, module: nn.Module) -> Envoy:
        if self._tree.first_place(module, (self._module, name)) == (self._module, name):
            kinds = self._tree.kinds
            kind = Envoy if kinds is None else kinds.of(self._tree, module) or Envoy
            return kind(module, self._tree)
        return self._elsewhere(module)

    def _elsewhere(self, module: nn.Module) -> Envoy:
        """The one Envoy of a module that was reached by another way than its path."""
        path = self._tree.path(module)
        envoy = self.root._below(path) if path else self.root
        assert isinstance(envoy, Envoy)
        return envoy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_module" not in self.__dict__:
            raise AttributeError(name)
        if name in self._escapes:
            raise_escaped()
        child, below = self._children.get(name), self._module._modules
        if child is None or name not in below or below[name] is not child._module:  # else `_child`, a call less
            child = self._child(name)
        if child is None and name.startswith("E_"):
            child = self._child(name[2:])
        if child is not None:
            return child
        try:
            value = getattr(self._module, name)
        except AttributeError:
            return self._missing(name)
        if isinstance(value, torch.Tensor) and (run := open_run(self._tree)) is not None:
            own = run.own(value)
            return offload.brought_in(self._module, name, value) if own is value and value.is_meta else own
        if isinstance(value, torch.Tensor) and value.is_meta and self._is_unloaded():
            return lent(value, f"{self._label}.{name}")
        if isinstance(value, nn.Module) and value in self._tree:
            return self._elsewhere(value)
        return of_envoy(self, name, value) if type(value) is MethodType else value

    def _is_unloaded(self) -> bool:
        """Whether the weights are not there yet; not asked in a scan, which needs none."""
        root = self._tree.top()
        return root is not None and not root._has_weights and open_run(self._tree) is None

    def _loaded(self) -> nn.Module:
        """The module, with its weights: for what is done to it."""
        if self._is_unloaded():
            self.root._ready()
        return self._module

    def _missing(self, name: str) -> Any:
        """What a name stands for that nothing here has."""
        if name in ("all", "iter") and (run := self._run_or_none()) is not None:
            whole = whole_of(run)
            if whole.generates and whole.plan is not None:
                return of_module(whole, self._label, name)
        raise self._unknown(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        elif isinstance(value, nn.Module):
            self.__dict__.pop(name, None)
            children.put(self, name, value)
        elif name in self._module._modules and value is not None:
            children.refuse(self, name, value)
        elif hasattr(self._module, name):
            setattr(self._loaded(), name, value)
            if name == "forward":
                self._tree.forget()  # a list that has one is called from now on
        elif self._run_or_none() is not None or is_nearly_a_port(name):
            raise self._unknown(name)  # a misspelt `.output = ...` must not pass in silence
        else:
            object.__setattr__(self, name, value)

    def __setitem__(self, key: int | str, value: Any) -> None:
        """Puts another module in the place of a child: `model.h[3] = torch.nn.Identity()`."""
        children.put_at(self, key, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
            return
        if (hasattr(type(self), name) or name in self._own_names) and name not in self._module._modules:
            raise self._is_kept(name, f"{self._spelled}.skip(value), to leave the module out, or ")
        if not hasattr(self._module, name):
            raise self._unknown(name)
        delattr(self._loaded(), name)
        self._children.pop(name, None)
        self._tree.forget()

    def _of_its_class(self, name: str) -> Any:
        """A property or method of a class of the user's own, which a scope of this module asks; None without one."""
        kind = type(self)
        ours = next(one for one in kind.__mro__ if one.__module__.startswith("nnsight."))
        if kind is ours or hasattr(ours, name):
            return None
        found = inspect.getattr_static(kind, name, None)
        return found if hasattr(found, "__get__") else None

    def _uniform_of(self, name: str) -> str | None:
        root = self._tree.top()
        if root is None or root is self:
            return None
        if "." not in self._label and (way := root._way_to_layers(name, f"{self._label}.")) is not None:
            return way
        if name not in ("attn", "mlp", "cross_attn"):
            return None
        found: str | None = root._uniform_names_of(self._tree.path(self._module))
        return None if found is None else f"{found}.{name}"

    def _way_to_layers(self, _name: str, _below: str) -> str | None:
        """Of the root: what leads to the layers in this module, for who looks for them by another model's names."""
        return None

    def _uniform_names_of(self, path: str) -> str | None:
        """Of the root: what a layer is called under uniform names that stands there, if it is known to be one."""
        number = path.rpartition(".")[2]
        if not number.isdigit() or not type(self._module).__module__.startswith("transformers."):
            return None
        return f"model = TransformersModel(module), and model.uniform.layers[{number}]"

    def _further_names(self) -> dict[str, str]:
        return self._tree.aliases.get(self.path, {})

    def __repr__(self) -> str:
        tree = self._tree
        described = {} if tree.kinds is None else tree.kinds.described(tree)
        if own := descriptions(type(self.root)):
            described[tree.root] = own
        return shown(self._module, self.path, tree.aliases, described) + edits.shown(tree, tree.path(self._module))


def _here() -> str | None:
    """A row for errors, in a thread in which a trace of another one would be missed."""
    thread = threading.current_thread()
    if thread is threading.main_thread():
        return None
    return f"this is thread {thread.name!r}, and a trace is open in the thread that opened it alone"
