"""Takes the body of a `with` out of its place, so that it can run at another time, or more than once.

`Block.of(frame)`, called in `__enter__`, finds the body of the `with` that is being entered there. `Skip` leaves it
out: a trace function raises at its first instruction, and `__exit__` swallows that. `Block.function(names)` is the body
as a function, for one that runs again and again; `Body` is the body with names of its own, for one that runs once and
whose names are bound around it afterwards. Both are compiled under the body's own file name and line numbers, so that
errors, debuggers and coverage see the user's line.

Source is read here and nowhere else. Where there is none, and where Python can't leave a body out, the error says so.
"""

from __future__ import annotations
import __future__

import ast
import copy
import ctypes
import dis
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any, ClassVar, NamedTuple

from nnsight.errors import BlockError

_SEES_OPCODES = sys.version_info[:2] != (3, 12)  # there, a frame that runs already gets line events only
_STORES = {"STORE_NAME", "STORE_FAST", "STORE_GLOBAL", "STORE_DEREF"}
_FUNCTION = 0x01 | 0x02  # CO_OPTIMIZED and CO_NEWLOCALS: a frame that keeps its names in slots
_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
_ASK = "__nnsight_ask__"
_SUM = "__nnsight_sum__"
_MOST_FOUND = 512  # blocks that are remembered with their source


class Block:
    """The body of one `with`, found but not yet compiled.

    Attributes:
        line: The line of the `with`.
        names: All that the body reads or binds, and does not keep inside a nested function.
        binds: Those that it binds.
        outer: Those that it binds in a function around (`global` and `nonlocal`).
        globals: Those that it says to be `global`.
    """

    _found: ClassVar[dict[tuple[CodeType, int, bool], tuple[list[str], Block]]] = {}
    _globals: dict[str, Any]

    def __init__(self, frame: FrameType, body: list[ast.stmt], line: int) -> None:
        self.line, self._body, self._frame_name = line, body, frame.f_code.co_name
        self._code, self.target = frame.f_code, _target(frame)
        self._closures: dict[tuple[frozenset[str], frozenset[str]], CodeType] = {}
        trial = self._compile((), ())
        self.binds = frozenset(trial.co_varnames + trial.co_cellvars)
        self.names = self.binds | frozenset(_global_names(trial))
        said = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Global)]
        self.globals = frozenset(name for node in said for name in node.names)
        self.outer: frozenset[str] = frozenset()
        self._declared: frozenset[str] = frozenset()
        if frame.f_code.co_flags & _FUNCTION == _FUNCTION:
            own = {*frame.f_code.co_varnames, *frame.f_code.co_cellvars, *frame.f_code.co_freevars}
            self._declared = self.binds - own
            self.outer = self._declared | (self.binds & {*frame.f_code.co_freevars})

    @classmethod
    def of(cls, frame: FrameType, instead: str, *, in_place: bool = False) -> Block:
        """The body of the `with` that `frame` is entering right now.

        Args:
            instead: What to write where it can't be had; a part of the error.
            in_place: Whether it is to mean what it means in its place: a `return` leaves the function around it.

        Raises:
            BlockError: There is no `with`, no source, or a body that can't stand elsewhere.
        """
        key, lines = (frame.f_code, frame.f_lasti, in_place), _lines(frame)
        known_lines, block = cls._found.get(key, (None, None))
        if block is None or known_lines is not lines:
            block = cls._find(frame, instead, in_place)
            if len(cls._found) >= _MOST_FOUND:
                cls._found.clear()
            cls._found[key] = lines, block
        block = copy.copy(block)
        block._globals = frame.f_globals  # of a module that was loaded from the same code, another
        return block

    @classmethod
    def _find(cls, frame: FrameType, instead: str, in_place: bool) -> Block:
        statement, item = _statement(frame, instead)
        body: list[ast.stmt] = statement.body
        if later := statement.items[item + 1 :]:
            body = [ast.copy_location(ast.With(items=later, body=body), statement)]
        _check(body, frame, statement, instead, in_place)
        body = [_Mangled.within(_Super.within(part, frame), frame, statement) for part in body]
        try:
            block = cls(frame, body, statement.lineno)
        except SyntaxError as error:
            raise _refused(frame, f"it can't stand elsewhere ({error.msg})", instead) from None
        if not block.names - block.binds <= _all_names(frame.f_code):
            raise _refused(frame, "its file was changed since it was loaded", instead)
        if in_place:
            _check_names(block, frame, instead)
        return block

    def enters(self, method: str) -> bool:
        """Whether a `with` in the body calls a method of this name."""
        items = [
            item for part in self._body for node in ast.walk(part) if isinstance(node, ast.With) for item in node.items
        ]
        calls = [item.context_expr.func for item in items if isinstance(item.context_expr, ast.Call)]
        return any(isinstance(called, ast.Attribute) and called.attr == method for called in calls)

    def function(self, names: Iterable[str] = ()) -> Callable[..., Any]:
        """The body as a function of these names, which it would otherwise look for among the globals."""
        code = self._compile(tuple(sorted(set(names) - self._declared)), tuple(sorted(self._declared)))
        return FunctionType(code, self._globals, self._frame_name)

    def closure(self, cells: Mapping[str, CellType], asked: frozenset[str] = frozenset()) -> FunctionType:
        """The body as a function without parameters whose names are these cells.

        Args:
            cells: One for each name that it binds, and for each that it is not to look for among the globals.
            asked: Names for whose value it calls what is in the cell `_ASK`, each time.
        """
        key = frozenset(cells), asked
        code = self._closures.get(key) or self._closures.setdefault(key, self._closure(*key))
        return FunctionType(
            code, self._globals, self._frame_name, closure=tuple(cells[name] for name in code.co_freevars)
        )

    def _closure(self, names: frozenset[str], asked: frozenset[str]) -> CodeType:
        shared = _Shared(asked)
        body = [part for one in self._body for part in _listed(shared.visit(copy.deepcopy(one)))]
        if own := sorted(self.binds - self._declared):
            body = [ast.copy_location(ast.Nonlocal(names=own), self._body[0]), *body]
        inner = self._define((), tuple(sorted(self._declared)), body)
        around = self._define(tuple(sorted(names - self._declared)), (), [inner])
        code = self._code_of(self._code_of(self._compiled(around).co_consts).co_consts)
        return code.replace(co_name=self._frame_name)

    def _compile(self, names: tuple[str, ...], declared: tuple[str, ...]) -> CodeType:
        code = self._code_of(self._compiled(self._define(names, declared, self._body)).co_consts)
        return code.replace(co_name=self._frame_name)

    def _define(self, names: tuple[str, ...], declared: tuple[str, ...], body: list[ast.stmt]) -> ast.FunctionDef:
        if declared:
            body = [ast.copy_location(ast.Global(names=list(declared)), self._body[0]), *body]
        parameters = ast.arguments(
            posonlyargs=[],
            args=[],
            kwonlyargs=[ast.arg(arg=name) for name in names],
            kw_defaults=[None] * len(names),
            defaults=[],
        )
        define = ast.FunctionDef(
            name="carried", args=parameters, body=body, decorator_list=[], returns=None, type_params=[]
        )
        define.lineno, define.end_lineno, define.col_offset, define.end_col_offset = (
            self.line,
            self._body[-1].end_lineno,
            0,
            0,
        )
        return define

    def _compiled(self, define: ast.FunctionDef) -> CodeType:
        module = ast.fix_missing_locations(ast.Module(body=[define], type_ignores=[]))
        flags = self._code.co_flags & _FUTURE
        return compile(module, self._code.co_filename, "exec", flags=flags, dont_inherit=True)

    @staticmethod
    def _code_of(constants: tuple[Any, ...]) -> CodeType:
        return next(part for part in constants if isinstance(part, CodeType))


class Body:
    """A block that runs once, elsewhere, with names of its own.

    Args:
        block: The block.
        values: What its names stand for when it begins; of others it looks among the globals.
        asked: Names that are looked up anew each time, by `ask`: those that another block may bind.
    """

    def __init__(
        self,
        block: Block,
        values: Mapping[str, Any],
        asked: frozenset[str] = frozenset(),
        ask: Callable[[str], Any] | None = None,
    ) -> None:
        self._given = given = {name: value for name, value in values.items() if name not in asked}
        self.cells = {name: CellType() for name in block.binds | asked} | {n: CellType(v) for n, v in given.items()}
        self.function = block.closure({**self.cells, _ASK: CellType(ask)} if asked else self.cells, asked)

    def __call__(self) -> None:
        self.function()

    def bound(self) -> dict[str, Any]:
        """The names that it has bound so far, and what they stand for."""
        found = {name: cell.cell_contents for name, cell in self.cells.items() if has(cell)}
        return {n: value for n, value in found.items() if n not in self._given or value is not self._given[n]}


def has(cell: CellType) -> bool:
    """Whether a name's cell holds a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class _Skipped(BaseException):
    """Raised at the first instruction of a body that is left out. Recognised by identity."""


class Skip:
    """Leaves out `block`, the body of the `with` that `frame` is entering.

    Made in `__enter__`, with what that returns; `__exit__` asks `done(error)` whether the body was left out.
    """

    def __init__(self, frame: FrameType, block: Block, entered: Any) -> None:
        self._frame, self._error = frame, _Skipped()
        self._at, self._names = block.target.offset, _values(block.target.names, entered)
        self._old = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes
        frame.f_trace_opcodes = _SEES_OPCODES
        frame.f_trace = self._local
        sys.settrace(_ignore)

    def done(self, error: BaseException | None) -> bool:
        """Puts back what traced before (a debugger's function, coverage's), and says whether the body was left out."""
        old, local, opcodes = self._old
        sys.settrace(old)
        self._frame.f_trace, self._frame.f_trace_opcodes = local, opcodes
        self._frame, self._names = None, {}  # type: ignore[assignment]
        self._error.__traceback__ = None  # a cycle, which holds the frame
        return error is self._error

    def _local(self, frame: FrameType, event: str, _: Any) -> Any:
        at = frame.f_lasti
        if event == "opcode" and at == self._at:
            for name, (kind, value) in self._names.items():
                (frame.f_globals if kind == "STORE_GLOBAL" else frame.f_locals)[name] = value
            raise self._error
        if event == "line" and at > self._at:
            raise self._error
        return self._local


def _ignore(*_: Any) -> None:
    return None


def write_back(frame: FrameType, names: dict[str, Any]) -> None:
    """Binds names in a frame that goes on later, as if the body had run in its place."""
    around = frame.f_locals
    around.update(names)
    if sys.version_info < (3, 13):  # there, `f_locals` is a copy, which would keep all that is in it
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
        if frame.f_code.co_flags & _FUNCTION == _FUNCTION:
            around.clear()


class _Target(NamedTuple):
    """What stands behind `as`: the offset of the last instruction that binds it, and what is bound, in order."""

    offset: int
    names: list[tuple[str, str]] | None  # None: something else than names


def _target(frame: FrameType) -> _Target:
    following = [one for one in dis.get_instructions(frame.f_code) if one.offset > frame.f_lasti]
    names: list[tuple[str, str]] = []
    to_come = 1
    for one in following:
        if one.opname in ("CACHE", "EXTENDED_ARG", "NOP"):
            continue
        if one.opname == "UNPACK_SEQUENCE":
            to_come += (one.arg or 0) - 1
        elif one.opname in _STORES:
            names.append((one.opname, one.argval))
        elif one.opname == "STORE_FAST_STORE_FAST":
            names += [("STORE_FAST", name) for name in one.argval]
        elif one.opname == "STORE_FAST_LOAD_FAST":
            names.append(("STORE_FAST", one.argval[0]))
        elif one.opname == "POP_TOP":
            return _Target(one.offset, names)
        else:
            break
        if len(names) == to_come:
            return _Target(one.offset, names)
    return _Target(-1, None)


def _values(names: list[tuple[str, str]] | None, entered: Any) -> dict[str, tuple[str, Any]]:
    values = list(entered) if len(names or ()) > 1 else [entered]
    return {name: (kind, value) for (kind, name), value in zip(names or (), values, strict=False)}


def unpacks(frame: FrameType) -> bool:
    """Whether the `with` that `frame` is entering unpacks what it is given: `as (tracer, edited)`."""
    return _following(frame) in ("UNPACK_SEQUENCE", "UNPACK_EX")


def binds_nothing(frame: FrameType) -> bool:
    """Whether there is no `as` in the `with` that `frame` is entering."""
    return _following(frame) == "POP_TOP"


def _following(frame: FrameType) -> str:
    """The name of the instruction that takes what the entered `with` gives."""
    following = (one for one in dis.get_instructions(frame.f_code) if one.offset > frame.f_lasti)
    return next((one.opname for one in following if one.opname not in ("CACHE", "EXTENDED_ARG", "NOP")), "")


def enters_with(frame: FrameType) -> bool:
    """Whether the instruction that `frame` is in the middle of is the entering of a `with`."""
    return frame.f_lasti in _entries(frame.f_code)


def _entries(code: CodeType) -> list[int]:
    """The offsets of all instructions that enter a `with`, in order."""
    found, loaded = [], False
    for one in dis.get_instructions(code):
        if one.opname in ("SETUP_WITH", "BEFORE_WITH"):
            found.append(one.offset)
        elif one.opname == "LOAD_SPECIAL" and one.arg == 0:
            loaded = True
        elif loaded and one.opname == "CALL":
            found.append(one.offset)
            loaded = False
    return found


# The statement that a frame is in.


def _statement(frame: FrameType, instead: str) -> tuple[ast.With, int]:
    """The `with` that a frame is entering, and which of its items."""
    if not enters_with(frame):
        raise BlockError(
            "This can only be entered by a `with` statement of its own: its body has to be found.", instead=instead
        )
    lines = _lines(frame)
    try:
        statements = _withs("".join(lines))
    except SyntaxError:
        raise _refused(frame, "its source can't be had", instead) from None
    line = frame.f_lineno
    found = [one for one in statements if line in _header(one)]
    if len(found) != 1:
        raise _refused(frame, "its source can't be had", instead)
    header = _header(found[0])
    line_of = dict(_instruction_lines(frame.f_code))
    here = [at for at in _entries(frame.f_code) if line_of.get(at) in header]
    return found[0], here.index(frame.f_lasti) % len(found[0].items)


def _lines(frame: FrameType) -> list[str]:
    """The text of the frame's file, notebook cell, doctest; empty where it can't be had."""
    name = frame.f_code.co_filename
    linecache.checkcache(name)
    return linecache.getlines(name, frame.f_globals)


@lru_cache(maxsize=32)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


@lru_cache(maxsize=32)
def _withs(text: str) -> list[ast.With]:
    return [one for one in ast.walk(_parsed(text)) if isinstance(one, ast.With)]


def _header(statement: ast.With) -> range:
    """The lines from the `with` to its colon."""
    ends = [
        part.end_lineno or 0 for item in statement.items for part in (item.context_expr, item.optional_vars) if part
    ]
    return range(statement.lineno, max(ends) + 1)


def _instruction_lines(code: CodeType) -> Iterator[tuple[int, int | None]]:
    for start, end, line in code.co_lines():
        for at in range(start, end, 2):
            yield at, line


# What can't stand elsewhere, or can't be left out.


def _check(body: list[ast.stmt], frame: FrameType, statement: ast.With, instead: str, in_place: bool) -> None:
    """Refuses a body that can't stand elsewhere, or that Python can't leave out here."""
    for what in _leaving(body, in_loop=False):
        if what == "return" and not in_place:
            continue
        raise _refused(frame, f"`{what}` in it belongs to what stands around it", instead)
    target = _target(frame)
    if target.names is None or (not _SEES_OPCODES and _needs_opcodes(body[0], statement)):
        what = "this Python can't leave it out" if target.names is not None else "what stands behind `as` is no name"
        raise _refused(frame, what, instead)


def _check_names(block: Block, frame: FrameType, instead: str) -> None:
    """Refuses a body that looks at the names around it by itself, or whose names can't all be had here."""
    if looks := sorted(block.names & {"locals", "eval", "exec", "vars", "dir"}):
        raise _refused(frame, f"`{looks[0]}` in it looks at the names around it", instead)
    if block.names & {*frame.f_code.co_freevars} - frame.f_locals.keys():
        raise _refused(frame, "in a class, the names of the function around it can't be had", instead)


def _needs_opcodes(first: ast.stmt, statement: ast.With) -> bool:
    """Whether a line event comes too late to leave a body out, or inside the body's own `try`."""
    return first.lineno in _header(statement) or isinstance(first, (ast.Try, getattr(ast, "TryStar", ast.Try)))


def _leaving(body: Iterable[ast.AST], *, in_loop: bool) -> Iterator[str]:
    """The statements that act on a loop or function around the body."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, (ast.Break, ast.Continue)) and not in_loop:
            yield type(node).__name__.lower()
        elif isinstance(node, ast.Return):
            yield "return"
        elif isinstance(node, (ast.Yield, ast.YieldFrom)):
            yield "yield"
        elif isinstance(node, (ast.Await, ast.AsyncFor, ast.AsyncWith)):
            yield "await"
        elif isinstance(node, ast.Nonlocal):
            yield "nonlocal"
        elif isinstance(node, (ast.For, ast.While)):
            yield from _leaving(node.body, in_loop=True)
            yield from _leaving([part for part in ast.iter_child_nodes(node) if part not in node.body], in_loop=in_loop)
        else:
            yield from _leaving(ast.iter_child_nodes(node), in_loop=in_loop)


def _refused(frame: FrameType, why: str, instead: str) -> BlockError:
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return BlockError(
        f"The body of this `with` can't be taken out of its place: {why}.",
        you_wrote=line or f"line {frame.f_lineno} of {frame.f_code.co_filename}",
        instead=instead,
    )


# Names.


def _global_names(code: CodeType) -> Iterator[str]:
    """The names that a function's code, and the functions in it, look for among the globals."""
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            yield one.argval
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _global_names(part)


def _all_names(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            names |= _all_names(part)
    return names


class _Shared(ast.NodeTransformer):
    """Has a block that is to run once ask for the names that another one may bind, each time it needs them."""

    def __init__(self, names: frozenset[str], *, inner: bool = False) -> None:
        self._names, self._inner = names, inner

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not isinstance(node.ctx, ast.Load) or node.id not in self._names:
            return node
        return ast.fix_missing_locations(ast.copy_location(self._asking(node.id), node))

    @staticmethod
    def _asking(name: str) -> ast.expr:
        return ast.Call(ast.Name(_ASK, ast.Load()), [ast.Constant(name)], [])

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self.generic_visit(node)
        target = node.target
        if not isinstance(target, ast.Name) or target.id not in self._names:
            return node
        # The name is bound when the value is there, for which the block may wait: others would take what stood before.
        before = ast.Assign([ast.Name(_SUM, ast.Store())], self._asking(target.id))
        node.target, after = ast.Name(_SUM, ast.Store()), ast.Assign([target], ast.Name(_SUM, ast.Load()))
        return [ast.fix_missing_locations(ast.copy_location(part, node)) for part in (before, node, after)]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        """A name that is bound around a function can't be annotated in it."""
        self.generic_visit(node)
        if self._inner or not isinstance(node.target, ast.Name):
            return node
        return ast.copy_location(ast.Assign([node.target], node.value) if node.value else ast.Pass(), node)

    def visit_MatchClass(self, node: ast.MatchClass) -> Any:
        """Its class has to be a name."""
        node.patterns = [self.visit(pattern) for pattern in node.patterns]
        node.kwd_patterns = [self.visit(pattern) for pattern in node.kwd_patterns]
        return node

    def _function(self, node: Any) -> Any:
        """Its defaults and decorators stand outside of it."""
        inner, arguments = self._within(_bound_within(node)), node.args
        arguments.defaults = [self.visit(default) for default in arguments.defaults]
        arguments.kw_defaults = [default and self.visit(default) for default in arguments.kw_defaults]
        if isinstance(node, ast.Lambda):
            node.body = inner.visit(node.body)
            return node
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.body = [part for one in node.body for part in _listed(inner.visit(one))]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        inner = self._within(_bound_within(node))
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.bases = [self.visit(base) for base in node.bases]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        node.body = [part for one in node.body for part in _listed(inner.visit(one))]
        return node

    def _comprehension(self, node: Any) -> Any:
        """Its first iterable stands outside of it, and what it binds with `:=` as well."""
        targets = [part for one in node.generators for part in ast.walk(one.target)]
        inner = self._within({part.id for part in targets if isinstance(part, ast.Name)})
        for at, one in enumerate(node.generators):
            one.iter = (inner if at else self).visit(one.iter)
            one.ifs = [inner.visit(condition) for condition in one.ifs]
        for name in {"elt", "key", "value"} & {*node._fields}:
            setattr(node, name, inner.visit(getattr(node, name)))
        return node

    def _within(self, bound: set[str]) -> _Shared:
        return _Shared(self._names - bound, inner=True)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function  # noqa: N815  ast's names
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension  # noqa: N815


def _bound_within(scope: ast.AST) -> set[str]:
    """The names that a function or class binds for itself: parameters, targets, imports."""
    found: set[str] = set()
    elsewhere: set[str] = set()
    for node in ast.walk(scope):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere.update(node.names)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            found.add(node.name or "")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node is not scope:
            found.add(node.name)
    return found - elsewhere


def _listed(statements: Any) -> list[ast.stmt]:
    return statements if isinstance(statements, list) else [statements]


class _Super(ast.NodeTransformer):
    """`super()` in a body means `super(__class__, self)`, of the method that the body stands in."""

    def __init__(self, first: str) -> None:
        self._first = first

    @classmethod
    def within(cls, part: ast.stmt, frame: FrameType) -> ast.stmt:
        if "__class__" not in frame.f_code.co_freevars or not frame.f_code.co_argcount:
            return part
        spelt_out: ast.stmt = cls(frame.f_code.co_varnames[0]).visit(copy.deepcopy(part))
        return spelt_out

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args and not node.keywords:
            names = [ast.Name("__class__", ast.Load()), ast.Name(self._first, ast.Load())]
            node.args = [ast.copy_location(name, node) for name in names]
        return node

    def visit_FunctionDef(self, node: ast.AST) -> ast.AST:
        return node  # which has a first argument of its own

    visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_FunctionDef  # noqa: N815  ast's names


class _Mangled(ast.NodeTransformer):
    """`self.__x` in a body that stands in a class means `self._Class__x`, also where the body stands elsewhere."""

    def __init__(self, owner: str) -> None:
        self._owner = owner.lstrip("_")

    @classmethod
    def within(cls, part: ast.stmt, frame: FrameType, statement: ast.With) -> ast.stmt:
        private = [name for name in _all_names(frame.f_code) if name.startswith("_") and "__" in name[1:]]
        owners = {name[1:].partition("__")[0] for name in private if name[1] != "_"}
        if not owners:
            return part
        tree = _parsed("".join(_lines(frame)))
        inside = [
            one
            for one in ast.walk(tree)
            if isinstance(one, ast.ClassDef) and one.lineno <= statement.lineno <= (one.end_lineno or 0)
        ]
        if not inside or inside[-1].name.lstrip("_") not in owners:
            return part
        mangled: ast.stmt = cls(inside[-1].name).visit(copy.deepcopy(part))  # others may have parsed this text too
        return mangled

    def _name(self, name: str) -> str:
        private = name.startswith("__") and not name.endswith("__")
        return f"_{self._owner}{name}" if private else name

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._name(node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._name(node.attr)
        self.generic_visit(node)
        return node
