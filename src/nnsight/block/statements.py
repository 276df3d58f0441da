"""The `with` statement that a frame is entering, found in its source, and why its body can't be taken out or left out.

Source is read here and nowhere else. Where there is none, and where Python can't leave a body out, the error says so.
"""

from __future__ import annotations

import ast
import dis
import linecache
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType, FrameType

from nnsight.block.leave_out import SEES_OPCODES, entering, target_of
from nnsight.core.history import Place
from nnsight.errors import BlockError


def statement_of(frame: FrameType, instead: str) -> tuple[ast.With, int]:
    """The `with` that a frame is entering, and which of its items."""
    if not enters_with(frame):
        raise BlockError(
            "This can only be entered by a `with` statement of its own: its body has to be found.", instead=instead
        )
    lines = lines_of(frame)
    try:
        statements = _withs("".join(lines))
    except SyntaxError:
        raise refused(frame, "its source can't be had", instead) from None
    line = frame.f_lineno
    found = [one for one in statements if line in _header(one)]
    if len(found) != 1:
        raise refused(frame, "its source can't be had", instead)
    header = _header(found[0])
    line_of = dict(_instruction_lines(frame.f_code))
    here = [at for at in _entries(frame.f_code) if line_of.get(at) in header]
    return found[0], here.index(entering(frame)) % len(found[0].items)


def lines_of(frame: FrameType) -> list[str]:
    """The text of the frame's file, notebook cell, doctest; empty where it can't be had."""
    name = frame.f_code.co_filename
    linecache.checkcache(name)
    return linecache.getlines(name, frame.f_globals)


@lru_cache(maxsize=32)
def parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SystemError:  # Python counts the depth of what it parses for all threads together
        return ast.parse(text)


@lru_cache(maxsize=32)
def _withs(text: str) -> list[ast.With]:
    return [one for one in ast.walk(parsed(text)) if isinstance(one, ast.With)]


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


def enters_with(frame: FrameType) -> bool:
    """Whether the instruction that `frame` is in the middle of is the entering of a `with`."""
    return entering(frame) in _entries(frame.f_code)


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


# What can't stand elsewhere, or can't be left out.


def check(body: list[ast.stmt], frame: FrameType, statement: ast.With, instead: str, in_place: bool) -> None:
    """Refuses a body that can't stand elsewhere, or that Python can't leave out here."""
    for what in _leaving(body, in_loop=False):
        if what == "return" and not in_place:
            continue
        raise refused(frame, f"`{what}` in it belongs to what stands around it", instead)
    target = target_of(frame)
    first = next((part for part in body if not is_nothing(part)), None)
    if target.names is None or (not SEES_OPCODES and first is not None and _needs_opcodes(first, statement)):
        what = "this Python can't leave it out" if target.names is not None else "what stands behind `as` is no name"
        raise refused(frame, what, instead)


def _needs_opcodes(first: ast.stmt, statement: ast.With) -> bool:
    """Whether a line event comes too late to leave a body out, or inside the body's own `try`."""
    return first.lineno in _header(statement) or isinstance(first, (ast.Try, getattr(ast, "TryStar", ast.Try)))


def is_nothing(statement: ast.stmt) -> bool:
    """Whether a statement does nothing: `pass`, `...`, a docstring."""
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def first_line_of(statement: ast.stmt) -> int:
    """Where a statement begins: at its first decorator, if it has some."""
    return min([statement.lineno, *[part.lineno for part in getattr(statement, "decorator_list", ())]])


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


def deleted_in(body: Iterable[ast.AST]) -> Iterator[str]:
    """The names that a body unbinds: with `del`, and behind an `except ... as name`."""
    for node in body:
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
            yield node.id
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from deleted_in(ast.iter_child_nodes(node))


def refused(frame: FrameType, why: str, instead: str) -> BlockError:
    return BlockError(
        f"The body of this `with` can't be taken out of its place: {why}.",
        you_wrote=Place(frame.f_code, frame.f_lineno).source,
        instead=instead,
    )
