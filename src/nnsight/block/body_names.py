"""Has the names in the body of a `with` mean elsewhere what they mean in its place.

Private names of a class, `super()`, and the names that a block shares with others that run beside it.
"""

from __future__ import annotations

import ast
import copy
import dis
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from nnsight.block.statements import lines_of, parsed

ASK = "__nnsight_ask__"
_SUM = "__nnsight_sum__"


def global_names(code: CodeType) -> Iterator[str]:
    """The names that a function's code, and the functions in it, look for among the globals."""
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            yield one.argval
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from global_names(part)


def all_names(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            names |= all_names(part)
    return names


class Shared(ast.NodeTransformer):
    """Has a block that is to run once ask for the names that another one may bind, each time it needs them."""

    def __init__(self, names: frozenset[str], *, inner: bool = False) -> None:
        self._names, self._inner = names, inner

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not isinstance(node.ctx, ast.Load) or node.id not in self._names:
            return node
        return ast.fix_missing_locations(ast.copy_location(self._asking(node.id), node))

    @staticmethod
    def _asking(name: str, *also: ast.expr) -> ast.expr:
        return ast.Call(ast.Name(ASK, ast.Load()), [ast.Constant(name), *also], [])

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self.generic_visit(node)
        target = node.target
        if not isinstance(target, ast.Name) or target.id not in self._names:
            return node
        # The name is bound when the value is there, for which the block may wait: others would take what stood before.
        before = ast.Assign([ast.Name(_SUM, ast.Store())], self._asking(target.id))
        node.target, after = ast.Name(_SUM, ast.Store()), ast.Assign([target], ast.Name(_SUM, ast.Load()))
        return [ast.fix_missing_locations(ast.copy_location(part, node)) for part in (before, node, after)]

    def visit_For(self, node: ast.For) -> Any:
        """In a loop over steps, who is asked is told what each step has bound, and that the loop is over."""
        self.generic_visit(node)
        if self._inner or not _goes_through_steps(node.iter):
            return node
        body, bound = [], dict[str, None]()
        for statement in node.body:
            names = [name for name in _bound_by(statement) if name in self._names]
            bound.update(dict.fromkeys(names))
            body += [statement, *(ast.Expr(self._asking(name, ast.Constant("bound"))) for name in names)]
        node.body = body
        over = [ast.Expr(self._asking(name, ast.Constant("over"))) for name in bound]
        return [ast.fix_missing_locations(ast.copy_location(one, node)) for one in (node, *over)]

    def visit_Delete(self, node: ast.Delete) -> Any:
        """Of a name that is asked for, the one who is asked keeps in mind that it is gone."""
        self.generic_visit(node)
        names = [one.id for one in node.targets if isinstance(one, ast.Name) and one.id in self._names]
        if self._inner or not names:
            return node
        node.targets = [one for one in node.targets if not (isinstance(one, ast.Name) and one.id in names)]
        gone = [ast.Expr(self._asking(name, ast.Constant("gone"))) for name in names]
        statements = [*gone, *([node] if node.targets else [])]
        return [ast.fix_missing_locations(ast.copy_location(one, node)) for one in statements]

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
        node.body = [part for one in node.body for part in listed(inner.visit(one))]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        inner = self._within(_bound_within(node))
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.bases = [self.visit(base) for base in node.bases]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        node.body = [part for one in node.body for part in listed(inner.visit(one))]
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

    def _within(self, bound: set[str]) -> Shared:
        return Shared(self._names - bound, inner=True)

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


def _goes_through_steps(iterable: ast.expr) -> bool:
    """Whether what a loop goes through is written as steps are: `tracer.iter[...]`, `tracer.all()`, or around these."""
    return any(isinstance(node, ast.Attribute) and node.attr in ("iter", "all") for node in ast.walk(iterable))


def _bound_by(statement: ast.stmt) -> list[str]:
    """The names that an assignment binds, wherever it comes by."""
    if isinstance(statement, ast.With):
        return [name for one in statement.body for name in _bound_by(one)]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
        targets = [statement.target]
    else:
        return []
    parts = [part for target in targets for part in ast.walk(target)]
    return [part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def bound_inside(body: list[ast.stmt]) -> set[str]:
    """The names that functions in a body bind outside of themselves, with `nonlocal`."""
    functions = [
        one for part in body for one in ast.walk(part) if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    said = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Nonlocal)]
    return {name for node in said for name in node.names}


def listed(statements: Any) -> list[ast.stmt]:
    return statements if isinstance(statements, list) else [statements]


class Super(ast.NodeTransformer):
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


class Mangled(ast.NodeTransformer):
    """`self.__x` in a body that stands in a class means `self._Class__x`, also where the body stands elsewhere."""

    def __init__(self, owner: str) -> None:
        self._owner = owner.lstrip("_")

    @classmethod
    def within(cls, part: ast.stmt, frame: FrameType, statement: ast.With) -> ast.stmt:
        private = [name for name in all_names(frame.f_code) if name.startswith("_") and "__" in name[1:]]
        owners = {name[1:].partition("__")[0] for name in private if name[1] != "_"}
        if not owners:
            return part
        tree = parsed("".join(lines_of(frame)))
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
