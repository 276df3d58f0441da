"""Random programs on the operations of a forward that is drawn too: calls, assignments, a helper's own operations.

The reference evaluates the statements of that forward one by one, and never looks at its code object.
"""

import dataclasses
import linecache
from collections import Counter

import actors
import programs
import torch
from actors import Actor, Item
from torch import nn

import toys

WIDTH = programs.WIDTH


@dataclasses.dataclass
class Statement:
    """`target = callee(*args, **kwargs)`, or `target = args[0] + args[1]`; `times`: how often it runs."""

    target: str
    callee: str | None
    args: list
    kwargs: dict
    times: int = 1
    call: str | None = None  # the names of its operations
    assign: str = ""

    def source(self):
        given = [*self.args, *(f"{name}={value}" for name, value in self.kwargs.items())]
        line = f"{self.target} = " + (f"{self.callee}({', '.join(given)})" if self.callee else " + ".join(self.args))
        return [line] if self.times == 1 else [f"for _ in range({self.times}):", "    " + line]


HELPER = ["def helper(x, scale=1.0):", "    y = torch.tanh(x)", "    return torch.mul(y, scale)", "", ""]


def statements(seed):
    rng, names, found = actors.seeded(seed, "forward"), ["x"], []
    counts = Counter()
    for _ in range(rng.randint(2, 6)):
        target = rng.choice([*names, "a", "b", "c"])
        one, other = rng.choice(names), rng.choice(names)
        statement = rng.choice(
            [
                Statement(target, "torch.tanh", [one], {}),
                Statement(target, "torch.mul", [one, other], {}),
                Statement(target, "torch.add", [one, other], {"alpha": 0.5}),
                Statement(target, "self.lin", [one], {}),
                Statement(target, "self.act", [one], {}),
                Statement(target, "helper", [one], {"scale": 0.5}),
                Statement(target, None, [one, other], {}),
                Statement(one, "torch.sin", [one], {}, times=rng.choice([2, 3])),
                Statement(target, f"{one}.cos", [], {}),
            ]
        )
        for part in ("callee", "target"):
            text = getattr(statement, part)
            if text is not None:
                name = text.replace(".", "_")
                setattr(statement, "call" if part == "callee" else "assign", f"{name}_{counts[name]}")
                counts[name] += 1
        found.append(statement)
        if statement.target not in names:
            names.append(statement.target)
    return found, names[-1]


def module_of(seed):
    """A module of the class whose forward has these statements; its file is one that `linecache` knows."""
    found, last = statements(seed)
    lines = [*HELPER, "class Drawn(nn.Module):"]
    lines += ["    def __init__(self):", "        super().__init__()"]
    lines += [f"        self.lin, self.act = nn.Linear({WIDTH}, {WIDTH}), nn.Tanh()", "", "    def forward(self, x):"]
    lines += ["        " + line for statement in found for line in statement.source()] + [f"        return {last}"]
    source, name = "\n".join(lines) + "\n", f"<forward {seed}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = {"torch": torch, "nn": nn}
    exec(compile(source, name, "exec"), space)
    return toys.seeded(space["Drawn"](), seed)


@dataclasses.dataclass
class Program:
    seed: int
    items: list
    grad: bool

    def source(self):
        lines = [item.source() for item in self.items] + ["keep('result', tracer.result)"]
        return "\n".join(["with model.trace(x) as tracer:", *actors.indented(lines)]) + "\n"


def events_of(found):
    """`(kind, place, number of inputs, keyword inputs)` of a plain forward, in order."""
    events = []

    def visit(place, count, kwargs, inner=()):
        events.append(("in", place, count, kwargs))
        for one in inner:
            visit(*one)
        events.append(("out", place, count, kwargs))

    for statement in found:
        for _ in range(statement.times):
            if statement.callee is not None:
                inner = []
                if statement.callee == "helper":
                    of = f"source.{statement.call}.source"
                    inner = [(f"{of}.torch_tanh_0", 1, {}), (f"{of}.y_0", 1, {}), (f"{of}.torch_mul_0", 1, None)]
                elif statement.callee.startswith("self."):
                    inner = [(statement.callee[5:], 1, {})]
                visit(f"source.{statement.call}", len(statement.args), statement.kwargs, inner)
            visit(f"source.{statement.assign}", 1, {})
    return [*events, ("out", "", 1, {})]


def program(seed):
    rng = actors.seeded(seed, "source")
    found, _ = statements(seed)
    events, at, items, names = events_of(found), -1, [], ["x0"]
    for _ in range(rng.randint(1, 8)):
        if at < 0 or rng.random() < 0.7:
            later = range(at + 1, min(len(events), at + 1 + rng.choice([3, 8, 30])))
            if not later:
                break
            wanted = rng.choice(later)
            if any(event[:2] == events[wanted][:2] for event in events[max(at, 0) : wanted]):
                continue
            if not items and not events[wanted][1].startswith("source"):
                continue  # once the forward runs, it is too late to ask for its operations
            if at >= 0 and events[at][1] in ("lin", "act") and "self_" in events[wanted][1]:
                continue  # and inside a call, for that call
            at = wanted
        kind, place, count, kwargs = events[at]
        item = draw(rng, kind, place, count, kwargs, names, f"v{len(items)}")
        items.append(item)
        if item.act == "skip":
            del events[at + 1 : next(i for i in range(at, len(events)) if events[i][:2] == ("out", place))]
        elif item.act == "read" and item.port != "ins":
            names.append(item.name)
    return Program(seed, items, rng.random() < 0.6)


def draw(rng, kind, place, count, kwargs, names, name):
    value = programs.expression(rng, names)
    common = {"path": place, "spelling": f"model.{place}" if place else "model", "name": name}
    if kind == "out":
        return Item(rng.choice(["read", "read", "write", "edit", "augment"]), port="out", value=value, **common)
    is_call = kwargs is not None and place.rpartition(".")[2][:2] not in ("a_", "b_", "c_", "x_", "y_")
    acts = ["read whole"] + ["read", "write", "edit", "augment"] * (count > 0)
    acts += ["skip", "skip"] * is_call + ["write whole"] * (is_call and count > 0)
    act = rng.choice(acts)
    if act == "read whole":
        return Item("read", port="ins", **common)
    if act == "write whole":
        args = "".join(f"{programs.expression(rng, names)}, " for _ in range(count))
        return Item("write", port="ins", value=f"(({args}), {kwargs})", **common)
    if act == "read":
        return Item("read", port="in", **common)
    return Item(act, port="skip" if act == "skip" else "in", value=value, **common)


class Statements(actors.Stage):
    """Runs statements; each operation is a place where actors act."""

    def place_of(self, path):
        return path

    def forward(self, found, last, x):
        self.names = {"x": x}
        for statement in found:
            for _ in range(statement.times):
                self.names[statement.target] = self.visit(
                    f"source.{statement.assign}", same, (self.value(statement),), {}
                )
        return self.event("out", "", self.names[last], ((x,), {}))

    def value(self, statement):
        args = tuple(self.names[name] for name in statement.args)
        if statement.callee is None:
            return args[0] + args[1]
        place = f"source.{statement.call}"
        if statement.callee == "helper":
            return self.visit(place, self.helper(f"{place}.source"), args, statement.kwargs)
        if statement.callee.startswith("self."):
            name = statement.callee[5:]
            forward = self.root.get_submodule(name).forward
            return self.visit(
                place, lambda *args, **kwargs: self.visit(name, forward, args, kwargs), args, statement.kwargs
            )
        of, _, name = statement.callee.partition(".")
        return self.visit(place, getattr(torch if of == "torch" else self.names[of], name), args, statement.kwargs)

    def helper(self, place):
        def call(x, scale=1.0):
            y = self.visit(f"{place}.y_0", same, (self.visit(f"{place}.torch_tanh_0", torch.tanh, (x,), {}),), {})
            return self.visit(f"{place}.torch_mul_0", torch.mul, (y, scale), {})

        return call

    def event(self, kind, place, value, inputs=None):
        here = actors.Here(value, place, inputs)
        self.offer((kind, place), here)
        return here.value

    def visit(self, place, call, args, kwargs):
        self.counter += 1
        number = self.counter
        args, kwargs = self.event("in", place, (args, kwargs))
        output = self.skips[number] if number in self.skips else call(*args, **kwargs)
        return self.event("out", place, output, (args, kwargs))


def same(value):
    return value


def with_hooks(module, prog):
    env, kept = actors.environment(prog.seed)
    stage = Statements(nn.Identity(), module, [Actor(prog.items)], env)
    found, last = statements(prog.seed)
    with torch.set_grad_enabled(prog.grad):
        stage.run(lambda x: stage.forward(found, last, x), env["x"])
        if stage.raised is None:
            env["keep"]("result", stage.result)
    return actors.outcome(module, env, kept, stage.raised, prog.grad)


def with_trace(model, module, prog, errors):
    env, kept = actors.environment(prog.seed)
    env.update(model=model)
    with torch.set_grad_enabled(prog.grad):
        raised = actors.raised_by(prog, env, errors)
    return actors.outcome(module, env, kept, raised, prog.grad)
