"""Random programs with one or two edits that stay, on the root and on modules below it, and a block on top."""

import dataclasses
import warnings

import actors
import programs
import torch
from actors import Actor, Drawing


def module_of(seed):
    return programs.module_of(seed)


@dataclasses.dataclass
class Edit:
    owner: str
    form: str  # function, decorator or with
    inplace: bool
    items: list  # with paths from the owner on

    def source(self, number):
        lines, name = actors.indented(item.source() for item in self.items), f"edit_{number}"
        model = programs.spell(actors.seeded(number, self.owner), self.owner)
        inplace = f"inplace={self.inplace}"
        view = "model" if not self.inplace else "_"
        if self.form == "function":
            return [f"def {name}(model):", *lines, f"{view} = {model}.edit({name}, {inplace})"]
        if self.form == "decorator":
            return [f"@{model}.edit({inplace})", "def edited(model):", *lines, f"{view} = edited"]
        lines = [line.replace("model", "edited") for line in lines]
        return [f"with {model}.edit({inplace}) as (_, edited):", *lines, f"{view} = edited"]


@dataclasses.dataclass
class Program:
    seed: int
    edits: list
    block: list
    again: bool  # whether the edits are taken away afterwards, and the block runs once more
    grad: bool

    def source(self):
        lines = [line for number, edit in enumerate(self.edits) for line in edit.source(number)]
        lines += self.trace()
        if self.again:
            lines += ["model.clear_edits()", *self.trace()]
        return "\n".join(lines) + "\n"

    def trace(self):
        lines = [item.source() for item in self.block]
        return ["with model.trace(x) as tracer:", *actors.indented([*lines, "keep('result', tracer.result)"])]


def program(seed):
    rng = actors.seeded(seed, "edits")
    root = module_of(seed)
    edits = []
    for number in range(rng.choice([1, 1, 2, 2, 3])):
        owner = "" if rng.random() < 0.5 else rng.choice([p for p, m in root.named_modules() if programs.simple(m)])
        start = root.get_submodule(owner)
        if any(type(part).__name__ == "Recursive" for part in [start]):
            owner, start = "", root
        inplace = owner != "" or rng.random() < 0.5
        form = rng.choice(["function", "decorator", "with"])
        items = drawn(rng, start, rng.randint(1, 4), 100 * (number + 1))
        items = [item for item in items if item.act != "skip" or item.path]  # its own call has begun
        edits.append(Edit(owner, form, inplace, items))
    block = drawn(rng, root, rng.randint(0, 5), 0)
    return Program(seed, edits, block, rng.random() < 0.3, rng.random() < 0.6)


def drawn(rng, start, count, first):
    """Items that one call of a module comes by, in its order."""
    drawing, found, names = Drawing(rng, start, start), [], ["x0"]
    drawing.count, stood = first, -1
    for _ in range(count):
        if rng.random() < 0.1:
            item = drawing.call(names)
        else:
            before = drawing.at
            if not drawing.move(stood) or (item := drawing.draw(names)) is None:
                drawing.at = before
                continue
            stood = drawing.at
        found.append(item)
        if item.act == "call" or (item.act == "read" and item.port != "ins"):
            names.append(item.name)
    return found


def with_hooks(module, prog):
    env, kept = actors.environment(prog.seed)
    edits = [
        (module.get_submodule(edit.owner), [below(edit.owner, item) for item in edit.items]) for edit in prog.edits
    ]
    torch.manual_seed(prog.seed)
    with torch.set_grad_enabled(prog.grad):
        for given in [edits, []][: 1 + prog.again]:
            stage = actors.Stage(module, module, [Actor(prog.block)], env, given)
            stage.run(module, env["x"])
            if stage.raised is not None:
                break
            env["keep"]("result", stage.result)
    return actors.outcome(module, env, kept, stage.raised, prog.grad)


def below(owner, item):
    path = ".".join(name for name in (owner, item.path) if name)
    spelling = (
        item.spelling if item.act != "call" or not owner else item.spelling.replace("model", f'model.get("{owner}")')
    )
    return dataclasses.replace(item, path=path, spelling=spelling)


def with_trace(model, module, prog, errors):
    env, kept = actors.environment(prog.seed)
    env.update(model=model)
    torch.manual_seed(prog.seed)
    with torch.set_grad_enabled(prog.grad), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "An edit was left waiting")  # where something above was skipped
        raised = actors.raised_by(prog, env, errors)
    return actors.outcome(module, env, kept, raised, prog.grad)
