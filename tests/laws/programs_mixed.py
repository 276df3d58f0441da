"""Random programs that combine what the others keep apart: edits, a generation, rows or invokes, a cache, traces of the
same model in the block, waits in vain that are caught, and blocks left early: `raise`, `break`, `return`, `stop()`.
"""

import dataclasses
import warnings

import actors
import programs
import programs_edits
import programs_steps
import torch
from actors import Actor, Drawing, Item

import toys

ROWS = programs.ROWS
INVOKES = [[slice(0, 1), slice(1, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)], [slice(0, 3)], [None, slice(0, 3)]]
FOR_ROWS = {"read", "write", "edit", "augment"}


class ThrownError(Exception):
    """What a program throws."""


def module_of(seed):
    return programs_steps.module_of(seed).eval()


@dataclasses.dataclass
class Line(Item):
    """Further acts: `raise`, `return`, and `nested`, a trace in the block, with `items`. `caught`: it waits in vain."""

    items: list = dataclasses.field(default_factory=list)
    caught: bool = False

    def needs(self):
        return set() if self.act == "nested" else super().needs()

    def source(self):
        if self.act in ("raise", "return"):
            return "raise ThrownError" if self.act == "raise" else "return"
        return super().source()

    def lines(self):
        if self.act == "nested":
            inner = [item.source() for item in self.items]
            inner.append(f"{self.name} = inner.result; keep({self.name!r}, {self.name})")
            return [f"with {self.spelling}.trace(x0 * 1) as inner:", *actors.indented(inner)]
        if self.caught:
            return ["try:", f"    {self.source()}", "except OutOfOrderError:", f"    keep('caught {self.name}', None)"]
        return [self.source()]


@dataclasses.dataclass
class Block:
    """A block, of some rows or of all: lines before a loop over steps, its own (no `key`: there is none), the result.

    `breaks`: in which step, and before which line, the loop is left.
    """

    rows: slice | None
    first: list
    key: str = ""
    steps: tuple = ()
    body: list = dataclasses.field(default_factory=list)
    breaks: tuple = (None, 0)
    last: list = dataclasses.field(default_factory=list)
    names: dict = dataclasses.field(default_factory=dict)  # of tensors, with their numbers of rows

    def items(self, n):
        """One after the other, as the loop unrolls."""
        found = at(self.first, 0)
        for step in self.steps if self.key else ():
            if step >= n:
                break
            found.append(Item("begin", step=step))
            if step == self.breaks[0]:
                return [*found, *at(self.body[: self.breaks[1]], step), *self.last]
            found += at(self.body, step)
        if self.key.endswith(":") or any(step >= n for step in self.steps):
            found.append(Item("over"))
        return [*found, *self.last]

    def source(self, tracer, spelt):
        lines = [text for line in self.first for text in spelt(line)]
        if self.key:
            body = [spelt(line) for line in self.body]
            if self.breaks[0] is not None:
                body.insert(self.breaks[1], [f"if step == {self.breaks[0]}: break"])
            lines += [
                f"for step in {tracer}.iter[{self.key}]:",
                *actors.indented(text for texts in body for text in texts),
            ]
        return lines + [text for line in self.last for text in spelt(line)]


def at(items, step):
    return [dataclasses.replace(item, step=step) for item in items]


@dataclasses.dataclass
class Program:
    seed: int
    n: int  # steps; 0: a trace
    edits: list
    form: str  # whole, rows or invokes
    blocks: list
    cache: bool
    in_function: bool
    again: bool  # without the edits
    grad: bool

    def source(self):
        lines = [line for number, edit in enumerate(self.edits) for line in edit.source(number)] + self.run()
        return "\n".join(lines + ["model.clear_edits()", *self.run()] * self.again) + "\n"

    def run(self):
        lines = [f"{name} = {start(size)}" for block in self.blocks for name, size in sorted(block.names.items())]
        given, fn = ("x, n", "fn='generate'") if self.n else ("x", "")
        bound = "(a, b, c)" if self.form == "rows" else "tracer"
        body = ["cache = tracer.cache(clone=True)"] * self.cache
        for block in self.blocks:
            source = block.source("a.tracer" if self.form == "rows" else "tracer", self.spelt)
            if self.form == "invokes":
                data = given.replace("x", f"x[{block.rows.start}:{block.rows.stop}]") if block.rows else ""
                source = [f"with tracer.invoke({data}):", *actors.indented(source)]
            body += source
        whole = ", ".join(filter(None, ["" if self.form == "invokes" else given, fn]))
        lines += [f"with model.trace({whole}) as {bound}:", *actors.indented(body)]
        lines += ["keep_cache(cache)"] * self.cache
        return ["def block():", *actors.indented(lines), "block()"] if self.in_function else lines

    def spelt(self, line):
        if self.form != "rows":
            return line.lines()
        tracer = "a.tracer"
        if line.rows is not None:
            tracer = "abc"[line.rows.start]
            line = dataclasses.replace(line, spelling=tracer + line.spelling.removeprefix("model"))
        return [text.replace("tracer.result", f"{tracer}.result").replace("tracer.stop", "a.tracer.stop")
                for text in line.lines()]  # fmt: skip


def start(size):
    return "x0" if size == ROWS else f"x0[:{size}]"


def program(seed):
    rng = actors.seeded(seed, "mixed")
    root, n = module_of(seed), rng.choice([0, 0, 1, 2, 3])
    edits = [edit for number in range(rng.choice([0, 0, 1, 1, 2])) if (edit := edit_of(rng, root, number, n))]
    form = rng.choice(["whole", "whole", "rows", "invokes"])
    drawn = Blocks(rng, root, n, form)
    blocks = [drawn.block(cut) for cut in (rng.choice(INVOKES) if form == "invokes" else [None])]
    early = any(item.act in ("raise", "return", "stop") for block in blocks for item in block.items(max(n, 1)))
    cache = form == "whole" and not early and rng.random() < 0.4
    return Program(seed, n, edits, form, blocks, cache, drawn.in_function, rng.random() < 0.3, rng.random() < 0.5)


def edit_of(rng, root, number, n):
    owner = rng.choice(["", "", "inner", "inner.first"])
    module = root.get_submodule(owner)
    if isinstance(module, toys.Recursive):  # an edit runs once for its outermost call
        return None
    items, known = [], {"x0"}
    for item in programs_edits.drawn(rng, module, rng.randint(1, 5), 1000 * (number + 1)):
        if item.needs() <= known and not (item.act == "skip" and not item.path and not owner and n):
            items.append(item)
            known |= {item.name} if item.act in ("read", "call") else set()
    form = rng.choice(["function", "decorator", "with"])
    return programs_edits.Edit(owner, form, bool(owner) or rng.random() < 0.5, items)


class Blocks:
    """Draws the blocks of one program."""

    def __init__(self, rng, root, n, form):
        self.rng, self.root, self.n, self.form = rng, root, n, form
        self.in_function, self.count = rng.random() < 0.5, 0

    def name(self):
        self.count += 1
        return f"v{self.count}"

    def block(self, cut):
        rng = self.rng
        is_part = cut is not None and (cut.start, cut.stop) != (0, ROWS)
        self.cut, self.rows, block = cut, cut if is_part else None, Block(cut, [])
        if not self.n or rng.random() < 0.3:
            block.first = self.body(block.names, rng.randint(1, 4 if self.n else 8))
        if self.n:
            at = int(bool(block.first))
            keys = [(f"{at}:", range(at, 20)), (f"{at}:{at + 2}", range(at, at + 2)), (f"{at}", [at])]
            block.key, steps = rng.choice([*keys, (f"{at}::2", range(at, 20, 2))])
            block.steps, block.body = tuple(steps), self.body(block.names, rng.randint(0, 6))
            if rng.random() < 0.15 and at < self.n:
                block.breaks = (at, rng.randint(0, len(block.body)))
        ends = any(item.act in ("raise", "return", "stop") for item in block.items(max(self.n, 1)))
        if not ends and not (self.n and self.rows) and rng.random() < 0.7:
            rows = rng.choice([None, slice(0, 1), slice(1, 2)]) if self.form == "rows" and not self.n else self.rows
            block.last = [Line("read", port="result", name=self.name(), rows=rows)]
        return block

    def body(self, names, count):
        rng, drawing, found, was_whole = self.rng, Drawing(self.rng, self.root, self.root), [], None
        for _ in range(count):
            rows = self.rows
            if self.form == "rows" and rng.random() < 0.8:
                rows = rng.choice([slice(0, 1), slice(1, 2), slice(2, 3)])
            size = ROWS if rows is None else rows.stop - rows.start
            pool = [start(size), *sorted(name for name, of in names.items() if of == size)]
            dice, before = rng.random(), drawing.at
            if dice < 0.07:
                item = drawing.call(pool)
            elif dice < 0.14:
                item, size = self.nested(), ROWS
            else:
                if not drawing.move(before) or (drawing.at == before and (rows is None) is not was_whole):
                    drawing.at = before
                    continue
                item = drawing.draw(pool, None if self.form == "whole" else FOR_ROWS, rows)
                if item is None or (item.act == "skip" and not item.path):
                    drawing.at = before
                    continue
                was_whole = rows is None
            value = item.value.replace(f"({ROWS}, ", f"({size}, ")
            item = Line(**{**vars(item), "name": self.name(), "value": value})
            found.append(item)
            if item.act in ("call", "nested") or (item.act == "read" and item.port != "ins"):
                names[item.name] = size
        self.leave(found, drawing)
        return found

    def nested(self):
        path = self.rng.choice(["", "inner"])
        self.count += 10
        items = programs_edits.drawn(
            self.rng, self.root.get_submodule(path), self.rng.randint(0, 3), 100 * (100 + self.count)
        )
        items = [below(path, item) for item in items if not item.needs()]
        return Line("nested", path=path, spelling=f"model.{path}".rstrip("."), items=items)

    def leave(self, found, drawing):
        """At times, has the lines wait in vain at the end, or leave the block in the middle."""
        rng = self.rng
        if self.form != "rows" and drawing.at > 1 and rng.random() < 0.08:
            path = drawing.paths[drawing.events[0][1]][0]
            spelling = programs.spell(rng, path)
            found.append(Line("read", path, "in", self.name(), spelling=spelling, rows=self.rows, caught=True))
        elif rng.random() < 0.08:
            acts = ["raise", "stop"] + ["return"] * (self.in_function and self.form != "invokes")
            found.insert(rng.randint(0, len(found)), Line(rng.choice(acts)))


def below(path, item):
    item = programs_edits.below(path, item)
    if path and item.act != "call":
        item.spelling = programs.spell(actors.seeded(0, item.path), item.path)
    return item


class Stage(actors.Stage):
    """May run while another does; `records` is what a cache of all modules has, by module."""

    def __init__(self, *args):
        super().__init__(*args)
        self.records = {}

    def run(self, call, *args):
        was = {module: module.__dict__.get("forward") for module in self.module.modules()}
        try:
            super().run(call, *args)
        finally:
            for module, forward in was.items():
                if forward is not None:
                    module.forward = forward

    def offer(self, place, here):
        if place != "begin":  # where a step begins, the turn of the edits is first
            super().offer(place, here)

    def leaving(self, module, args, kwargs, output):
        if self.busy:
            return None
        value = super().leaving(module, args, kwargs, output)
        self.records.setdefault(module, []).append(programs.copied(value))
        return value

    def check_none_waits(self, step=None):
        for actor in self.actors:
            while (item := actor.next()) is not None and item.port is not None and (step is None or item.step == step):
                if not getattr(item, "caught", False):
                    self.fail(actor, "missed")
                    self.end(actor)
                    break
                self.env["keep"](f"caught {item.name}", None)
                actor.at += 1
                self.advance(actor, None, None)

    def advance(self, actor, place, here):
        moved = super().advance(actor, place, here)
        while (item := actor.next()) is not None and item.act in ("raise", "return", "nested"):
            actor.at += 1
            if item.act == "return":
                actor.at = len(actor.items)
            elif item.act == "raise":
                self.fail(actor, "thrown")
                self.end(actor)
            else:
                self.nested(actor, item)
            self.compute(actor)
            moved = super().advance(actor, place, here) or True
        return moved

    def is_due(self, item, place):
        return item.act not in ("raise", "return", "nested") and super().is_due(item, place)

    def nested(self, actor, item):
        self.busy, module = True, self.root.get_submodule(item.path)
        try:
            parts = set(module.modules())
            edits = [(one if one in parts else module, items) for _, (one, items) in self.edits
                     if one in parts or module in set(one.modules())]  # fmt: skip
            inner = Stage(module, self.root, [Actor(item.items)], dict(self.env), edits)
            inner.run(module, self.env["x0"] * 1)
            if inner.raised is None:
                self.bind(item, inner.result)
        finally:
            self.busy = False
        if inner.raised is not None:
            self.fail(actor, inner.raised)
            self.end(actor)


def with_hooks(module, prog):
    env, kept = actors.environment(prog.seed)
    edits = [(module.get_submodule(e.owner), [programs_edits.below(e.owner, item) for item in e.items])
             for e in prog.edits]  # fmt: skip
    is_copied = len([block for block in prog.blocks if block.rows]) > 1  # put together for the batch
    with torch.set_grad_enabled(prog.grad):
        for given in [edits, []][: 1 + prog.again]:
            env.update({name: eval(start(size), env) for block in prog.blocks for name, size in block.names.items()})
            blocks = [Actor(block.items(max(prog.n, 1))) for block in prog.blocks]
            stage = Stage(module, module, blocks, env, given)
            x = env["x"].clone() if is_copied else env["x"]
            stage.run(*(module.generate, x, prog.n) if prog.n else (module, x))
            if stage.raised is not None:
                break
            if prog.cache:
                env["keep"]("cache", [stage.records.get(one, []) for one in module.modules()])
    return outcome(module, env, kept, stage.raised, prog)


def with_trace(model, module, prog, errors):
    env, kept = actors.environment(prog.seed)

    def keep_cache(cache):
        visits = [cache["model." + path if path else "model"].visits for path, _ in module.named_modules()]
        env["keep"]("cache", [[programs.copied(visit.output) for visit in of] for of in visits])

    env.update(model=model, n=prog.n, keep_cache=keep_cache)
    env.update(ThrownError=ThrownError, OutOfOrderError=errors.OutOfOrderError)
    with torch.set_grad_enabled(prog.grad), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "An edit was left waiting")
        try:
            raised = actors.raised_by(prog, env, errors)
        except ThrownError:
            raised = "thrown"
    return outcome(module, env, kept, raised, prog)


def outcome(module, env, kept, raised, prog):
    if prog.n and prog.edits and raised == "missed":
        kept = []  # a step is over where the next begins, behind the turn of the edits
    return actors.outcome(module, env, kept, raised, prog.grad)
