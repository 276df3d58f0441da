"""Takes the body of a `with` out of its place, so that it can run at another time, or more than once.

`Block.of(frame)`, called in `__enter__`, finds the body of the `with` that is being entered there. `Block.function`
is the body as a function of names, for one that runs again and again; `Body` is the body with names of its own, for one
that runs once and whose names are bound around it afterwards. Both are compiled under the body's own file name and line
numbers, so that errors, debuggers and coverage see the user's line.

`leave_out.py` leaves the body out where it stands; `statements.py` finds it in its source, and says why it can't be
had; `body_names.py` has its names mean elsewhere what they mean there.
"""

from __future__ import annotations
import __future__

import ast
import copy
from collections.abc import Callable, Iterable, Mapping
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any, ClassVar

from nnsight.block.around import check_around, check_names, is_function
from nnsight.block.body_names import ASK, Mangled, Shared, Super, all_names, bound_inside, global_names, listed
from nnsight.block.leave_out import target_of
from nnsight.block.statements import (
    check,
    deleted_in,
    first_line_of,
    is_nothing,
    lines_of,
    refused,
    statement_of,
)

_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
_MOST_FOUND = 512  # blocks that are remembered with their source


class Block:
    """The body of one `with`, found but not yet compiled.

    Attributes:
        line: The line of the `with`.
        names: All that the body reads or binds, and does not keep inside a nested function.
        binds: Those that it binds.
        deletes: Those that it unbinds.
        outer: Those that it binds in a function around (`global` and `nonlocal`).
        first_line: Of the first statement that does something; None if none does.
        globals: Those that it says to be `global`.
    """

    _found: ClassVar[dict[tuple[CodeType, int, bool], tuple[list[str], Block]]] = {}
    _globals: dict[str, Any]

    def __init__(self, frame: FrameType, body: list[ast.stmt], line: int) -> None:
        self.line, self._body, self._frame_name = line, body, frame.f_code.co_name
        does = [part for part in body if not is_nothing(part)]
        self.first_line = first_line_of(does[0]) if does else None
        self._code, self.target = frame.f_code, target_of(frame)
        self._closures: dict[tuple[frozenset[str], frozenset[str]], CodeType] = {}
        trial = self._compile(tuple(sorted(bound_inside(body))), ())
        self.binds = frozenset(trial.co_varnames + trial.co_cellvars)
        self.names = self.binds | frozenset(global_names(trial))
        said = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Global)]
        self.globals = frozenset(name for node in said for name in node.names)
        self.deletes = frozenset(deleted_in(body))
        self.outer: frozenset[str] = frozenset()
        self._declared: frozenset[str] = frozenset()
        if is_function(frame):
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
        key, lines = (frame.f_code, frame.f_lasti, in_place), lines_of(frame)
        known_lines, block = cls._found.get(key, (None, None))
        if block is None or known_lines is not lines:
            block = cls._find(frame, instead, in_place)
            if len(cls._found) >= _MOST_FOUND:
                cls._found.clear()
            cls._found[key] = lines, block
        if in_place:
            check_around(block, frame, instead)
        block = copy.copy(block)
        block._globals = frame.f_globals  # of a module that was loaded from the same code, another
        return block

    @classmethod
    def _find(cls, frame: FrameType, instead: str, in_place: bool) -> Block:
        statement, item = statement_of(frame, instead)
        body: list[ast.stmt] = statement.body
        if later := statement.items[item + 1 :]:
            body = [ast.copy_location(ast.With(items=later, body=body), statement)]
        check(body, frame, statement, instead, in_place)
        body = [Mangled.within(Super.within(part, frame), frame, statement) for part in body]
        try:
            block = cls(frame, body, statement.lineno)
        except SyntaxError as error:
            raise refused(frame, f"it can't stand elsewhere ({error.msg})", instead) from None
        if not block.names - block.binds <= all_names(frame.f_code):
            raise refused(frame, "its file was changed since it was loaded", instead)
        if in_place:
            check_names(block, frame, instead)
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
            asked: Names for whose value it calls what is in the cell `ASK`, each time.
        """
        key = frozenset(cells), asked
        code = self._closures.get(key) or self._closures.setdefault(key, self._closure(*key))
        return FunctionType(
            code, self._globals, self._frame_name, closure=tuple(cells[name] for name in code.co_freevars)
        )

    def _closure(self, names: frozenset[str], asked: frozenset[str]) -> CodeType:
        shared = Shared(asked)
        body = [part for one in self._body for part in listed(shared.visit(copy.deepcopy(one)))]
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
        ask: Callable[..., Any] | None = None,
    ) -> None:
        self._given = given = {name: value for name, value in values.items() if name not in asked}
        self.cells = {name: CellType() for name in block.binds | asked} | {n: CellType(v) for n, v in given.items()}
        self.function = block.closure({**self.cells, ASK: CellType(ask)} if asked else self.cells, asked)

    def __call__(self) -> None:
        self.function()

    def bound(self) -> dict[str, Any]:
        """The names that it has bound so far, and what they stand for."""
        found = {name: cell.cell_contents for name, cell in self.cells.items() if has(cell)}
        return {n: value for n, value in found.items() if n not in self._given or value is not self._given[n]}

    def unbound(self) -> dict[str, Any]:
        """The names that stood for something when it began and that it has unbound, and what they stood for."""
        return {name: value for name, value in self._given.items() if not has(self.cells[name])}


def has(cell: CellType) -> bool:
    """Whether a name's cell holds a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
