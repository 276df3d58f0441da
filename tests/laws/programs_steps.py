"""Random programs with loops over the steps of a generation."""

import dataclasses

import actors
import programs
import torch
from actors import Actor, Drawing, Item
from torch import nn


class Generates(nn.Module):
    """Runs itself again and again on what it gave."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(self.inner(x))

    def generate(self, x, n):
        found = []
        for _ in range(n):
            x = self(x)
            found.append(x)
        return torch.stack(found)


def module_of(seed):
    return Generates(programs.module_of(seed))


@dataclasses.dataclass
class Loop:
    key: str  # how its steps are spelt
    steps: list  # which these are, of as many as there may be
    body: list  # (guard, item)

    def source(self):
        head = "for step in tracer.all():" if self.key == "all" else f"for step in tracer.iter[{self.key}]:"
        lines = [f"if {guard}: {item.source()}" if guard else item.source() for guard, item in self.body]
        return [head, *actors.indented(lines)]


@dataclasses.dataclass
class Program:
    seed: int
    n: int
    first: list  # items before any loop: step 0
    loops: list
    last: list  # items after the loops: where the last one stopped
    result: bool
    names: set
    grad: bool

    def source(self):
        lines = [f"{name} = x0" for name in sorted(self.names)]
        lines += [item.source() for item in self.first]
        lines += [line for loop in self.loops for line in loop.source()]
        lines += [item.source() for item in self.last]
        lines += ["result = tracer.result; keep('result', result)"] * self.result
        start = "with model.trace(x, n, fn='generate') as tracer:"
        return "\n".join([start, *actors.indented(lines)]) + "\n"

    def items(self):
        """One line after the other, as the loops unroll."""
        step, found = 0, [at_step(item, 0) for item in self.first]
        over = False
        for loop in self.loops:
            for step_ in loop.steps:
                if step_ >= self.n:
                    over = True
                    break
                step = step_
                found.append(Item("begin", step=step))
                for guard, item in loop.body:
                    if not guard or eval(guard, {"step": step}):
                        found.append(at_step(item, step))
            if over or loop.key in ("all", ":"):
                found.append(Item("over"))
        found += [at_step(item, step) for item in self.last]
        if self.result:
            found.append(Item("read", port="result", name="result"))
        return found


def at_step(item, step):
    return dataclasses.replace(item, step=step)


def program(seed):
    rng = actors.seeded(seed, "steps")
    root, n = module_of(seed), rng.randint(1, 4)
    first, loops, last, names, position = [], [], [], set(), 0
    if rng.random() < 0.3:
        first, position = body_of(rng, root, names, rng.randint(1, 3)), 0
    over = False
    for _ in range(rng.choice([1, 1, 1, 2])):
        key, steps = key_of(rng, position + bool(first and not loops))
        body = body_of(rng, root, names, rng.choice([0, 2, 3, 4, 6]))
        loops.append(Loop(key, steps, [(guard(rng), item) for item in body]))
        over = key in ("all", ":") or any(step >= n for step in steps)
        if over:
            break
        position = steps[-1] + 1 if steps else position
    if not over and rng.random() < 0.5 and not any(loop.body for loop in loops):
        last = body_of(rng, root, names, rng.randint(1, 3))
    if rng.random() < 0.1:
        loops[-1].body = [("", item) for item in body_of(rng, root, names, 2, wild=True)]
    if not over and rng.random() < 0.1:
        last = [*last, Item("stop")]
    return Program(seed, n, first, loops, last, rng.random() < 0.7, names, rng.random() < 0.5)


def key_of(rng, position):
    """A spelling of steps from `position` on, and which they are."""
    many = range(20)
    choices = [
        ("all", list(many[position:])) if position == 0 else (f"{position}:", list(many[position:])),
        (":", list(many)) if position == 0 else (f"{position}:", list(many[position:])),
        (f"{position}:{position + 2}", [position, position + 1]),
        (f"{position}::2", list(many[position::2])),
        (f"{position}:{position + 4}:3", [position, position + 3]),
        (str(position), [position]),
        (f"[{position}, {position + 2}]", [position, position + 2]),
    ]
    return rng.choice(choices)


def guard(rng):
    return rng.choice(["", "", "", "step in (0, 2)", "step % 2", "step > 0"])


def body_of(rng, root, names, count, wild=False):
    """Items that one step comes by, in its order; `wild`: and then one that it has passed."""
    drawing, found = Drawing(rng, root, root), []
    drawing.count = 10 * len(names) + 1
    for _ in range(count):
        if rng.random() < 0.1:
            item = drawing.call(["x0", *sorted(names)])
        elif not drawing.move(drawing.at):
            break
        elif (item := drawing.draw(["x0", *sorted(names)])) is None or (item.act == "skip" and not item.path):
            continue  # a whole step can't be left out
        found.append(item)
        if item.act == "call" or (item.act == "read" and item.port != "ins"):
            names.add(item.name)
    if wild and found:
        path = drawing.paths[drawing.events[0][1]][0]
        found.append(Item("read", path=path, port="in", name=drawing.name(), spelling=programs.spell(rng, path)))
    return found


def with_hooks(module, prog):
    env, kept = actors.environment(prog.seed)
    env.update(dict.fromkeys(prog.names, env["x0"]))
    stage = actors.Stage(module, module, [Actor(prog.items())], env)
    torch.manual_seed(prog.seed)
    with torch.set_grad_enabled(prog.grad):
        stage.run(module.generate, env["x"], prog.n)
    return actors.outcome(module, env, kept, stage.raised, prog.grad)


def with_trace(model, module, prog, errors):
    env, kept = actors.environment(prog.seed)
    env.update(model=model, n=prog.n)
    torch.manual_seed(prog.seed)
    with torch.set_grad_enabled(prog.grad):
        raised = actors.raised_by(prog, env, errors)
    return actors.outcome(module, env, kept, raised, prog.grad)
