"""Random blocks on random modules, and an interpreter of the same blocks that uses nothing but torch hooks.

`program(seed)` draws a module and a list of steps. `with_hooks` runs the steps with forward hooks, pre-hooks and a
replaced `forward`; `with_trace` renders them as Python source and runs that. Both return an `Outcome`, and law 3
says that these are equal, bit for bit.

The meaning of a step, on which the two must agree: a port is met at the event where the run stands, else at its next
event from there. A module is skipped at its input, where the run stands then. At a module's output its input can still
be read, but no longer written, nor the module skipped; nor its input, once it is skipped, since nothing takes that.
"""

import dataclasses
import random

import torch
from torch import nn

import toys

WIDTH, ROWS = toys.WIDTH, 3
DEVICE = "cpu"  # where the values of a program are; its module is moved by who runs it


# Modules


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.weight


class Counts(nn.Module):
    """Has a buffer that its forward changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Repeats(nn.Module):
    """Calls its child again and again, and has one that it never calls."""

    def __init__(self, inner, times):
        super().__init__()
        self.inner, self.times, self.unused = inner, times, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return x


class Named(nn.Module):
    """Its children stand in a ModuleDict, under names of which one is dotted-looking digits."""

    def __init__(self, first, second):
        super().__init__()
        self.parts = nn.ModuleDict({"left": first, "right": second})

    def forward(self, x):
        return self.parts["left"](x) - self.parts["right"](x)


class Takes(nn.Module):
    """Gives a tensor from a child that returns a tuple, or a dict."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, x):
        if isinstance(self.core, toys.DictCore):
            inner = self.core(x=x, scale=2.0)
            return inner["hidden"] + inner["extra"][0]
        hidden, (twice, number) = self.core(x)
        return hidden + twice * number


class Steps(nn.Module):
    """A recurrent loop over a cell of two arguments."""

    def __init__(self, times):
        super().__init__()
        self.cell, self.times = toys.Cell(), times

    def forward(self, x):
        state = x
        for _ in range(self.times):
            state = self.cell(x, state)
        return state


class Calling(nn.Module):
    """Calls the same child by position and then by keyword."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(x) + self.inner(input=x)


LEAVES = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Linear(WIDTH, WIDTH),
    nn.Tanh,
    nn.ReLU,
    nn.Identity,
    lambda: nn.LayerNorm(WIDTH),
    lambda: nn.Dropout(0.5),
    Scale,
    Counts,
]


def build(rng, depth, pool):
    """A random module of at most `depth` levels; `pool` collects those that may be shared later."""
    if pool and rng.random() < 0.12:
        return rng.choice(pool)
    if depth == 0 or rng.random() < 0.15:
        module = rng.choice(LEAVES)()
    else:

        def child():
            return build(rng, depth - 1, pool)

        module = rng.choice(
            [
                lambda: nn.Sequential(*[child() for _ in range(rng.randint(1, 3))]),
                lambda: toys.Pair(child(), child()),
                lambda: Residual(child()),
                lambda: Repeats(child(), rng.randint(1, 3)),
                lambda: Named(child(), child()),
                lambda: Takes(toys.TupleCore()),
                lambda: Takes(toys.DictCore()),
                lambda: Steps(rng.randint(1, 3)),
                Calling,
                toys.Layer,
                toys.Shared,
                lambda: toys.Recursive(rng.randint(0, 2)),
            ]
        )()
    pool.append(module)
    return module


def module_of(seed):
    """The random module of a seed, the same each time."""
    rng = random.Random(seed)
    module = toys.Pair(build(rng, 3, pool := []), build(rng, 2, pool))
    return toys.seeded(module, seed)


# Steps

OUTPUT_SHAPES = {
    toys.TupleCore: ("({0}, ({1}, 3))", ["[0]", "[1][0]"]),
    toys.DictCore: ('{{"hidden": {0}, "extra": [{1}]}}', ['["hidden"]', '["extra"][0]']),
}
INPUT_SHAPES = {
    toys.DictCore: '((), {{"x": {0}, "scale": 0.25}})',
    toys.Cell: "(({0}, {1}), {{}})",
}
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def output_shape(module):
    """How to write a whole output down, and how to reach the tensors in one."""
    return OUTPUT_SHAPES.get(type(module), ("{0}", [""]))


def input_shape(module):
    """How to write whole inputs down: (args, kwargs)."""
    return INPUT_SHAPES.get(type(module), "(({0},), {{}})")


@dataclasses.dataclass
class Step:
    """One line of a block.

    `act` is one of read, write, edit (in place), augment (`*=`), look back (the output, then the input of the same
    call), skip, call, stop; `port` one of in, ins, skip, out, result, or None where the step meets the run nowhere.
    """

    act: str
    path: str = ""
    port: str | None = None
    name: str = ""
    part: str = ""
    value: str = ""
    spelling: str = ""

    def source(self):
        where = self.spelling + {"in": ".input", "ins": ".inputs", "out": ".output"}.get(self.port, "") + self.part
        if self.port == "result":
            where = "tracer.result" + self.part
        if self.act == "read":
            return f"{self.name} = {where}; keep({self.name})"
        if self.act == "look back":
            return f"{self.name} = ({where}, {self.spelling}.input); keep({self.name})"
        if self.act == "write":
            return f"{where} = {self.value}"
        if self.act == "edit":
            return f"{where}[:] = {self.value}"
        if self.act == "augment":
            return f"{where} *= 0.5"
        if self.act == "skip":
            return f"{self.spelling}.skip({self.value})"
        if self.act == "call":
            return f"{self.name} = {self.spelling}({self.value}); keep({self.name})"
        return "tracer.stop()"


@dataclasses.dataclass
class Program:
    seed: int
    root: str
    steps: list
    grad: bool

    def source(self):
        root = spell(random.Random(0), self.root)
        lines = [f"with {root}.trace(x) as tracer:", *("    " + step.source() for step in self.steps)]
        return "\n".join(lines + ["    pass"] * (not self.steps)) + "\n"


def spell(rng, path):
    """One of the ways of writing a path down."""
    text = "model"
    names = path.split(".") if path else []
    if names and rng.random() < 0.1:
        return f'model["{path}"]'
    if names and rng.random() < 0.1:
        return f'model.get("{path}")'
    for name in names:
        text += f"[{name}]" if name.isdigit() else f'["{name}"]' if rng.random() < 0.1 else f".{name}"
    return text


def expression(rng, names):
    """A random [rows, width] value of variables that are tensors."""

    def one():
        return rng.choice(names)

    return rng.choice(
        [
            lambda: f"torch.full(({ROWS}, {WIDTH}), {rng.randint(-3, 3)}.5, device=x0.device)",
            lambda: f"{one()} * {rng.randint(-2, 3)}.25",
            lambda: f"{one()} + {one()}",
            lambda: f"{one()}.flip(0)",
            lambda: f"torch.tanh({one()})",
            lambda: f"{one()}.clone()",
            lambda: f"{one()}.detach()",
            lambda: one(),
        ]
    )()


def program(seed, module=None):
    """The random program of a seed, on the module of the same seed unless another is given.

    Most programs ask for what comes later only; about one in twenty asks at the end for any port whatever.
    """
    rng = random.Random(seed + 1)
    module = module_of(seed) if module is None else module
    paths = {}
    for path, child in module.named_modules(remove_duplicate=False):
        paths.setdefault(child, []).append(path)
    start, root = module, ""
    if rng.random() < 0.15:
        root = rng.choice([path for child in paths if simple(child) for path in paths[child]])
        start = module.get_submodule(root)
    events, position, kind, chosen = timeline(start), -1, None, None
    steps, names, count, wild = [], ["x0"], rng.randint(1, 10), rng.random() < 0.2
    while len(steps) < count:
        dice, name = rng.random(), f"v{len(steps)}"
        if dice < 0.12:
            where = spell(rng, rng.choice(paths[rng.choice([m for m in paths if simple(m)])]))
            steps.append(Step("call", name=name, value=expression(rng, names), spelling=where))
            names.append(name)
            continue
        if dice < 0.16:
            return Program(
                seed,
                root,
                [*steps, Step("stop"), Step("call", spelling="model", name="after", value="1")],
                rng.random() < 0.7,
            )
        if dice < 0.22:
            break
        if wild and dice < 0.6:
            others = [m for m in paths if not isinstance(m, (*CONTAINERS, toys.Recursive)) and m is not chosen]
            if others:
                steps.append(draw(rng, rng.choice(others), rng.choice(["in", "out"]), paths, names, len(steps)))
                break
        if position < 0 or rng.random() < 0.7:
            later = range(position + 1, min(len(events), position + 1 + rng.choice([3, 8, 30])))
            if not later:
                break
            wanted = events[rng.choice(later)][:2]
            if wanted == (kind, chosen):
                continue  # the run stands at this port: asking again is the same event, not the next
            position = next(e for e in range(position + 1, len(events)) if events[e][:2] == wanted)
            kind, chosen = wanted
        steps.append(draw(rng, chosen, kind, paths, names, len(steps)))
        if steps[-1].act == "skip":
            end = events.index(("out", chosen, events[position][2]))
            del events[position + 1 : end]
        elif steps[-1].act == "read" and steps[-1].port != "ins":
            names.append(steps[-1].name)
    if rng.random() < 0.5:
        shape, parts = output_shape(start)
        steps.append(Step("read", port="result", name="result", part=rng.choice(parts)))
        if rng.random() < 0.3:
            steps.append(Step("write", port="result", value=whole(rng, shape, names)))
            steps.append(Step("read", port="result", name="again", part=rng.choice(parts)))
    return Program(seed, root, steps, rng.random() < 0.7)


def simple(module):
    """Whether `module(tensor)` gives a tensor."""
    return not isinstance(module, CONTAINERS) and type(module) not in OUTPUT_SHAPES and type(module) not in INPUT_SHAPES


def whole(rng, shape, names):
    return shape.format(expression(rng, names), expression(rng, names))


def draw(rng, module, kind, paths, names, number):
    """A random step at one kind of event of a module."""
    path = rng.choice(paths[module])
    common = {"path": path, "spelling": spell(rng, path)}
    name = f"v{number}"
    if kind == "in":
        act = rng.choice(["read", "read", "write", "edit", "augment", "read whole", "write whole", "skip", "skip"])
        if act == "skip":
            return Step("skip", port="skip", value=whole(rng, output_shape(module)[0], names), **common)
        if act == "read whole":
            return Step("read", port="ins", name=name, **common)
        if act == "write whole" and not isinstance(module, toys.Recursive):
            return Step("write", port="ins", value=whole(rng, input_shape(module), names), **common)
        if act.startswith("read") or act == "write whole":
            return Step("read", port="in", name=name, **common)
        return Step(act, port="in", value=expression(rng, names), **common)
    shape, parts = output_shape(module)
    act = rng.choice(["read", "read", "read", "write", "write", "edit", "augment", "look back"])
    if act == "look back":
        return Step("look back", port="out", name=name, **common)
    if act == "write":
        return Step("write", port="out", value=whole(rng, shape, names), **common)
    if act == "augment" and isinstance(module, toys.TupleCore):
        act = "edit"
    return Step(act, port="out", name=name, value=expression(rng, names), part=rng.choice(parts), **common)


# The independent interpreter


class Stopped(Exception):
    pass


@dataclasses.dataclass
class Outcome:
    """What a program did: the values it kept, what it raised, and what it left behind."""

    kept: list
    raised: str | None
    given: torch.Tensor
    buffers: dict
    grads: object


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(copied(v) for v in value)
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return value


def close(a, b):
    """Like `equal`, for gradients that may have been added up in another order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) if isinstance(a, torch.Tensor) else equal(a, b)


def equal(a, b):
    """Bit for bit: type, shape and every bit, NaN equal to NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(torch.nan_to_num(a, 7.0), torch.nan_to_num(b, 7.0))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


class Hooks:
    """Runs the steps of a program by forward hooks on every module below `start`."""

    def __init__(self, start, model, steps, env):
        self.start, self.model, self.steps, self.env = start, model, list(steps), env
        self.at, self.busy, self.called, self.events, self.raised = 0, False, set(), [], None
        self.calls, self.skips = [], {}

    def value(self, text):
        return eval(text, self.env)

    def bind(self, step, value):
        self.env[step.name] = value
        self.env["keep"](value)

    def run(self, x):
        handles, originals = [], []
        for module in list(self.start.modules()):
            handles.append(module.register_forward_pre_hook(self.entering, with_kwargs=True))
            handles.append(module.register_forward_hook(self.leaving, with_kwargs=True))
            originals.append((module, module.forward))
            module.forward = self.running(module, module.forward)
        try:
            self.portless()
            self.result = self.start(x)
            while (step := self.next()) is not None and step.port == "result":
                self.at += 1
                if step.act == "read":
                    self.bind(step, part_of(self.result, step.part))
                else:
                    self.result = self.ready
                self.portless()
            if (step := self.next()) is not None:
                self.raised = "past" if self.model.get_submodule(step.path) in self.called else "never"
        except Stopped:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module, _ in originals:
                del module.forward

    def next(self):
        return self.steps[self.at] if self.at < len(self.steps) else None

    def portless(self):
        """Takes the steps that meet the run nowhere: they happen wherever it stands. So does the next write's value."""
        while (step := self.next()) is not None and step.port is None:
            self.at += 1
            if step.act == "stop":
                raise Stopped
            self.busy = True
            try:
                module = eval(step.spelling, {"model": Bare(self.model)})
                self.bind(step, module.forward(self.value(step.value)))
            finally:
                self.busy = False
        if step is not None and step.value:
            self.ready = self.value(step.value)

    def due(self, module, *ports):
        step = self.next()
        if step is None or step.port not in ports or self.model.get_submodule(step.path) is not module:
            return None
        return step

    def entering(self, module, args, kwargs):
        if self.busy:
            return None
        self.called.add(module)
        self.calls.append(len(self.events))
        self.events.append(("in", module, len(self.events)))
        while (step := self.due(module, "in", "ins", "skip")) is not None:
            self.at += 1
            if step.act == "skip":
                self.skips[self.calls[-1]] = self.ready
            else:
                args, kwargs = self.input(step, args, kwargs, untaken=self.calls[-1] in self.skips)
            self.portless()
        return args, kwargs

    def input(self, step, args, kwargs, late=False, untaken=False):
        """One step at an input; `late` (the run stands at the output) or `untaken`, only the object can change."""
        if step.act == "read":
            self.bind(step, (args, kwargs) if step.port == "ins" else first_of(args, kwargs))
            return args, kwargs
        first = first_of(args, kwargs)
        if step.act == "edit":
            first[:] = self.ready
            return args, kwargs
        if step.act == "augment":
            first *= 0.5
        if late or untaken:
            self.raised = "late" if late else "untaken"
            raise Stopped
        if step.port == "ins":
            return self.ready
        new = first if step.act == "augment" else self.ready
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    def running(self, module, forward):
        def call(*args, **kwargs):
            if self.busy:
                return forward(*args, **kwargs)
            return self.skips[self.calls[-1]] if self.calls[-1] in self.skips else forward(*args, **kwargs)

        return call

    def leaving(self, module, args, kwargs, output):
        if self.busy:
            return None
        self.events.append(("out", module, self.calls.pop()))
        stood = False
        while (step := self.due(module, "out", "in", "ins", "skip") if stood else self.due(module, "out")) is not None:
            stood = True
            self.at += 1
            if step.port == "skip":
                self.raised = "late"
                raise Stopped
            if step.port != "out":
                self.input(step, args, kwargs, late=True)
            elif step.act == "look back":
                self.bind(step, (output, first_of(args, kwargs)))
            elif step.act == "read":
                self.bind(step, part_of(output, step.part))
            elif step.act == "write":
                output = self.ready
            elif step.act == "edit":
                part_of(output, step.part)[:] = self.ready
            else:
                output = scaled(output, step.part)
            self.portless()
        return output


def first_of(args, kwargs):
    return args[0] if args else next(iter(kwargs.values()))


def part_of(value, part):
    return eval("value" + part, {"value": value})


def scaled(output, part):
    """What `port` + `part` `*= 0.5` leaves in the port."""
    env = {"output": output}
    exec(f"output{part} *= 0.5", env)
    return env["output"]


class Bare:
    """The spelling of an Envoy's path, on the module itself."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        if name == "get":
            return lambda path: self[path]
        if name == "forward":
            return self.module.forward
        return Bare(getattr(self.module, name))

    def __getitem__(self, key):
        return Bare(self.module.get_submodule(str(key)))


def timeline(start):
    """The events of a plain forward pass: (kind, module, number of the call)."""
    hooks = Hooks(start, start, [], {})
    state = {k: v.clone() for k, v in start.state_dict().items()}
    with torch.random.fork_rng(), torch.no_grad():
        hooks.run(torch.randn(ROWS, WIDTH))
        start.load_state_dict(state)
    return hooks.events


# Running a program, either way


def environment(seed):
    kept = []
    env = {"torch": torch, "keep": lambda value: kept.append((value, copied(value)))}
    generator = torch.Generator().manual_seed(seed)
    env["x"] = torch.randn(ROWS, WIDTH, generator=generator).to(DEVICE)
    env["x0"] = torch.randn(ROWS, WIDTH, generator=generator).to(DEVICE)
    return env, kept


def outcome(module, env, kept, raised, grad, given):
    """What is left after a run; `grad` also takes the gradients of everything kept."""
    snapshots, values = [copy for _, copy in kept], [copied(value) for value, _ in kept]
    grads = None
    if grad and raised is None:
        module.zero_grad()
        leaves = [t for value, _ in kept for t in tensors(value) if t.requires_grad]
        try:
            if leaves:
                sum((t * t).sum() for t in leaves).backward()
            grads = {name: copied(p.grad) for name, p in module.named_parameters()}
        except RuntimeError as error:
            grads = str(error).split(":")[0]
    buffers = {name: copied(b) for name, b in module.named_buffers()}
    return Outcome(snapshots + values, raised, copied(given), buffers, grads)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def with_hooks(module, prog):
    env, kept = environment(prog.seed)
    start = module.get_submodule(prog.root) if prog.root else module
    hooks = Hooks(start, module, prog.steps, env)
    torch.manual_seed(prog.seed)
    with torch.set_grad_enabled(prog.grad):
        hooks.run(env["x"])
    return outcome(module, env, kept, hooks.raised, prog.grad, env["x"])


KINDS = {"past": "AlreadyPastError CalledFewerTimesError", "never": "NeverCalledError"}


def late_or_untaken(error, late="any more"):
    """Which of the two mistakes that a program may make a WriteError tells of."""
    if late in str(error):
        return "late"
    assert str(error).startswith("Nothing takes what is written to `")
    assert " is skipped in this call." in str(error)
    return "untaken"


def with_trace(model, module, prog, errors, seeded=True):
    """Runs the program's source; `model` wraps `module`, `errors` is what `nnsight.errors` names."""
    env, kept = environment(prog.seed)
    env["model"] = model
    raised = None
    if seeded:
        torch.manual_seed(prog.seed)
    with torch.set_grad_enabled(prog.grad):
        try:
            exec(compile(prog.source(), f"<program {prog.seed}>", "exec"), env)
        except errors.WriteError as error:
            raised = late_or_untaken(error)
        except errors.BlockError as error:
            raised = next((kind for kind, names in KINDS.items() if type(error).__name__ in names.split()), repr(error))
    return outcome(module, env, kept, raised, prog.grad, env["x"])


def difference(a, b, grads=equal):
    """In words, what differs between two outcomes; empty where nothing does. `grads` compares gradients."""
    found = []
    if a.raised != b.raised:
        found.append(f"raised {a.raised} / {b.raised}")
    if len(a.kept) != len(b.kept):
        found.append(f"kept {len(a.kept)} values / {len(b.kept)}")
    for i, (one, other) in enumerate(zip(a.kept, b.kept)):
        if not equal(one, other):
            found.append(f"kept value {i}: {one} / {other}")
    for name, same in (("given", equal), ("buffers", equal), ("grads", grads)):
        if not same(getattr(a, name), getattr(b, name)):
            found.append(f"{name}: {getattr(a, name)} / {getattr(b, name)}")
    return "; ".join(found)
