"""Rewrites a Python function so that each of its operations goes through a call of ours, and leaves the rest as it is.

`y = f(x)` becomes `y = OURS.assign("y_0", OURS.call("f_0", f, x))`. The new code has the file, the lines, the globals,
the closure and the defaults of the old. An operation is a call, or an assignment to one name; what runs as a function
of its own (a nested `def`, a `lambda`) is none, nor are calls that look at the frame they stand in (`super()`).
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import linecache
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from nnsight.core.history import user_place
from nnsight.errors import NoSourceError

_OURS = "__nnsight__"
_FRAME_BOUND = ("super", "locals", "globals", "vars", "dir", "eval", "exec", "breakpoint")
_FUTURES = functools.reduce(int.__or__, (getattr(__future__, f).compiler_flag for f in __future__.all_feature_names))
_NEW: Any = {"type_params": []} if "type_params" in ast.ClassDef._fields else {}


class Operation(NamedTuple):
    """A call or an assignment in a function: its name, its line, and whether it is a call."""

    name: str
    line: int
    is_call: bool


class Listing(NamedTuple):
    """What a function's source holds: its operations in the order of execution, and its lines from `first` on."""

    title: str
    operations: dict[str, Operation]
    first: int
    lines: tuple[str, ...]


def innermost(call: Any) -> FunctionType:
    """The Python function that a method, a partial or a decorated function comes down to."""
    while True:
        if isinstance(call, MethodType):
            call = call.__func__
        elif isinstance(call, functools.partial):
            call = call.func
        elif not isinstance(call, FunctionType):
            raise _no_source(f"{_describe(call)} has no Python source that operations could be listed from.")
        elif "__wrapped__" not in call.__dict__:
            return call
        else:
            call = call.__dict__["__wrapped__"]


def _no_source(what: str, instead: str | None = None) -> NoSourceError:
    return NoSourceError(what, you_wrote=user_place().source, instead=instead)


def listing(function: FunctionType) -> Listing:
    """The operations of a function's source."""
    return _rewriting(function.__code__, function.__code__.co_filename)[0]


def rewritten(call: Any, ours: Any) -> Any:
    """A copy of `call` whose innermost function passes its operations to `ours`; decorators are rebuilt around it.

    Args:
        call: A function, a method or a partial, decorated or not.
        ours: Has `call(name, function, *args, **kwargs)` and `assign(name, value)`.
    """
    if isinstance(call, MethodType):
        return MethodType(rewritten(call.__func__, ours), call.__self__)
    if isinstance(call, functools.partial):
        return functools.partial(rewritten(call.func, ours), *call.args, **call.keywords)
    if "__wrapped__" not in (call := _checked(call)).__dict__:
        code = _rewriting(call.__code__, call.__code__.co_filename)[1]
        return _copy(call, code, {**_cells(call), _OURS: CellType(ours)})
    inner = call.__dict__["__wrapped__"]
    holding = [name for name, cell in _cells(call).items() if _holds(cell, inner)]
    if not holding:
        raise _no_source(f"A decorator of {_describe(call)} keeps the function where it can't be exchanged.")
    inside = rewritten(inner, ours)
    wrapper = _copy(call, call.__code__, {**_cells(call), **{name: CellType(inside) for name in holding}})
    wrapper.__dict__["__wrapped__"] = inside
    return wrapper


def _checked(call: Any) -> FunctionType:
    if not isinstance(call, FunctionType):
        raise _no_source(f"{_describe(call)} has no Python source that operations could be listed from.")
    return call


def _describe(call: Any) -> str:
    if isinstance(call, type):
        return f"The class `{call.__name__}`"
    return f"`{getattr(call, '__qualname__', None) or type(call).__name__}`"


def _cells(function: FunctionType) -> dict[str, CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _copy(function: FunctionType, code: CodeType, cells: dict[str, CellType]) -> FunctionType:
    closure = tuple([cells[name] for name in code.co_freevars])
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__, new.__annotations__ = function.__kwdefaults__, function.__annotations__
    new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
    new.__dict__.update(function.__dict__)
    return new


@functools.lru_cache(maxsize=256)
def _rewriting(code: CodeType, filename: str) -> tuple[Listing, CodeType]:
    """`filename` stands in the key since two codes that differ in it alone are equal."""
    lines, node, class_name = _source_of(code)
    first, last = code.co_firstlineno, node.end_lineno or node.lineno
    rewriter = _Rewriter()
    rewriter.rewrite(node)
    title = f"{class_name}.{code.co_name}" if class_name else code.co_name
    listed = Listing(f"{title} ({Path(filename).name}:{first})", rewriter.found, first, tuple(lines[first - 1 : last]))
    return listed, _compiled(node, class_name, code, (_OURS,))


_Def = ast.FunctionDef | ast.AsyncFunctionDef


def _source_of(code: CodeType) -> tuple[list[str], _Def, str | None]:
    """The lines of the file, the `def` that `code` was compiled from, and the class that it stands in directly.

    Where what is cached of the file doesn't fit, as after a reload, the file is read again.
    """
    filename, has_lines = code.co_filename, False
    for refresh in (False, True):
        if refresh:
            linecache.checkcache(filename)
        lines = linecache.getlines(filename)
        has_lines = bool(lines) and not filename.startswith("<")  # `python -c` has lines under the name of all such
        found = _locate("".join(lines), code) if lines else None
        if found is not None and _fits(*found, code):
            return lines, *found
    if has_lines and code.co_name != "<lambda>":
        raise _no_source(
            f"{filename} isn't what `{code.co_name}` was compiled from: it has changed since, or an import hook did.",
            instead="start Python again, if you have changed the file",
        )
    what = "a lambda" if code.co_name == "<lambda>" else f"`{code.co_name}`, which was compiled from {filename}"
    raise _no_source(f"No source is to be had of {what}.", instead="a `def` in a file or a notebook cell")


def _fits(node: _Def, class_name: str | None, code: CodeType) -> bool:
    if any(isinstance(part, ast.Assert) for part in ast.walk(node)):
        return True  # pytest compiles asserts in its own way
    return _outline(_compiled(node, class_name, code, ())) == _outline(code)


@functools.lru_cache(maxsize=2)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _locate(text: str, code: CodeType) -> tuple[_Def, str | None] | None:
    """The `def` that `code` was compiled from, and the class that it stands in directly."""
    todo: list[tuple[ast.AST, str | None]] = [(_parsed(text), None)]
    while todo:
        node, class_name = todo.pop()
        if isinstance(node, _Def) and (node.name, _first_line(node)) == (code.co_name, code.co_firstlineno):
            return copy.deepcopy(node), class_name
        if isinstance(node, ast.ClassDef):
            class_name = node.name
        elif isinstance(node, _Def):
            class_name = None
        todo.extend((child, class_name) for child in ast.iter_child_nodes(node))
    return None


def _first_line(node: _Def) -> int:
    return min([node.lineno, *(part.lineno for part in node.decorator_list)])


def _compiled(node: _Def, class_name: str | None, code: CodeType, extra: tuple[str, ...]) -> CodeType:
    """Compiles a `def` in a surrounding that gives its names the scopes which they have in `code`.

    A class of the same name mangles `__private` names and lets `super()` find its cell. What it and the `def` are
    called must stay global within.
    """
    free = [name for name in code.co_freevars if not (class_name and name == "__class__")]
    bare = _bare(node)
    inside: ast.stmt = bare
    if class_name:
        inside = ast.ClassDef(name=class_name, bases=[], keywords=[], body=[bare], decorator_list=[], **_NEW)
    bound = class_name or node.name
    declared: list[ast.stmt] = [] if bound in free else [ast.Global(names=[bound])]
    names = [ast.arg(arg=name) for name in [*free, *extra]]
    arguments = ast.arguments(posonlyargs=[], args=names, kwonlyargs=[], kw_defaults=[], defaults=[])
    outer = ast.FunctionDef(name=_OURS, args=arguments, body=[*declared, inside], decorator_list=[], **_NEW)
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    top = compile(module, code.co_filename, "exec", flags=code.co_flags & _FUTURES, dont_inherit=True)
    compiled = next(part for part in _nested(top) if part.co_name == node.name and part.co_firstlineno == node.lineno)
    compiled = compiled.replace(co_firstlineno=code.co_firstlineno)
    return compiled.replace(co_qualname=code.co_qualname) if hasattr(code, "co_qualname") else compiled


def _outline(code: CodeType) -> list[Any]:
    """What two compilations of one source have in common: the bytecode itself depends on the module around it too."""
    steps = [(step.opname, step.arg) for step in dis.get_instructions(code) if step.opname.startswith(_ARITHMETIC)]
    plain = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    plain = [constant for constant in plain if not (isinstance(constant, str) and ".<locals>." in constant)]  # 3.10
    constants = [sorted(map(repr, part)) if isinstance(part, frozenset) else repr(part) for part in plain]
    return [code.co_names, code.co_varnames, constants, steps, [_outline(part) for part in _nested(code)]]


_ARITHMETIC = ("BINARY", "COMPARE", "UNARY", "INPLACE")


def _bare(node: _Def) -> _Def:
    """The `def` without what runs when it is defined: decorators, defaults, annotations."""
    none = ast.Constant(value=None)
    bare = copy.copy(node)
    bare.decorator_list, bare.returns = [], None
    old = node.args
    plain = [[ast.arg(arg=one.arg) for one in group] for group in (old.posonlyargs, old.args, old.kwonlyargs)]
    bare.args = ast.arguments(
        posonlyargs=plain[0], args=plain[1], kwonlyargs=plain[2],
        vararg=ast.arg(arg=old.vararg.arg) if old.vararg else None,
        kwarg=ast.arg(arg=old.kwarg.arg) if old.kwarg else None,
        defaults=[none for _ in old.defaults], kw_defaults=[none for _ in old.kw_defaults],
    )  # fmt: skip
    return bare


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_ORDER: dict[type, tuple[str, ...]] = {  # of execution, where it isn't that of the fields
    ast.Assign: ("value", "targets"),
    ast.AnnAssign: ("value", "target"),
    ast.For: ("iter", "target", "body", "orelse"),
    ast.AsyncFor: ("iter", "target", "body", "orelse"),
    ast.ListComp: ("generators", "elt"),
    ast.SetComp: ("generators", "elt"),
    ast.GeneratorExp: ("generators", "elt"),
    ast.DictComp: ("generators", "key", "value"),
    ast.comprehension: ("iter", "target", "ifs"),
}


class _Rewriter:
    """Names the operations of one function in the order in which they are executed, and wraps each."""

    def __init__(self) -> None:
        self.found: dict[str, Operation] = {}
        self._counts: Counter[str] = Counter()

    def rewrite(self, node: _Def) -> None:
        node.body = [self._visit(statement) for statement in node.body]

    def _visit(self, node: Any) -> Any:
        if not isinstance(node, ast.AST) or isinstance(node, _FUNCTIONS):
            return node
        callee = _dotted(node.func) or "call" if isinstance(node, ast.Call) else ""
        for field in _ORDER.get(type(node), node._fields):
            part = getattr(node, field, None)
            setattr(node, field, [self._visit(one) for one in part] if isinstance(part, list) else self._visit(part))
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _FRAME_BOUND):
            return self._wrapped("call", callee, node, [node.func, *node.args], node.keywords)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and (target := _dotted(node.targets[0])):
            node.value = self._wrapped("assign", target, node, [node.value], [])
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            node.value = self._wrapped("assign", _dotted(node.target), node, [node.value], [])
        return node

    def _wrapped(self, verb: str, base: str, node: Any, args: list[Any], keywords: list[ast.keyword]) -> ast.expr:
        name = f"{base}_{self._counts[base]}"
        self._counts[base] += 1
        self.found[name] = Operation(name, node.lineno, verb == "call")
        ours = ast.Attribute(value=ast.Name(id=_OURS, ctx=ast.Load()), attr=verb, ctx=ast.Load())
        call = ast.Call(func=ours, args=[ast.Constant(value=name), *args], keywords=keywords)
        for part in (call, ours, ours.value, call.args[0]):
            ast.copy_location(part, node)
        return call


def _dotted(node: ast.expr) -> str:
    """`self.act` as "self_act": names joined, subscripts dropped, and of a receiver that is computed only what follows.

    "" where there is none.
    """
    names: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        else:
            if isinstance(node, ast.Name):
                names.append(node.id)
            return "_".join(reversed(names))
