"""Random programs on a batch: rows of one trace (`as (a, b, c)`), and prompts that come with invokes.

The reference runs the whole batch, and slices. Values of one row, or one invoke, are used in others, in either order.
"""

import dataclasses

import actors
import programs
import torch
from actors import Actor, Drawing, Item

ROWS = programs.ROWS
CUTS = [
    [slice(0, 1), slice(1, 2), slice(2, 3)],
    [slice(0, 1), slice(1, 3)],
    [slice(0, 2), slice(2, 3)],
]


def module_of(seed):
    """Without dropout: blocks that stand beside each other may call modules in more than one order."""
    return programs.module_of(seed).eval()


@dataclasses.dataclass
class Program:
    """Blocks, each with its rows; None is the whole batch. `live`: all stand in one block, in the items' order."""

    seed: int
    cuts: list
    blocks: list
    live: bool
    in_function: bool
    grad: bool

    def source(self):
        if self.live:
            scopes = ", ".join(self.scope(cut) for cut in self.cuts)
            lines = [f"with model.trace(x) as ({scopes}):", *actors.indented(self.lines(self.blocks[0]))]
        else:
            lines = ["with model.trace() as tracer:"]
            for cut, block in zip(self.cuts, self.blocks, strict=True):
                given = "" if cut is None else f"x[{cut.start}:{cut.stop}]"
                lines += actors.indented([f"with tracer.invoke({given}):"]) + actors.indented(self.lines(block), 2)
            lines += [f"keep('{name} after', {name})" for name in self.bound()]
        if self.in_function:
            lines = ["def block():", *actors.indented(lines), "block()"]
        return "\n".join(lines) + "\n"

    def bound(self):
        """The names that all blocks have bound in the end."""
        fails = any(item.act == "stop" or item.name == "missed" for block in self.blocks for item in block)
        return (
            [] if fails or self.live else [item.name for block in self.blocks for item in block if item.act == "read"]
        )

    def lines(self, block):
        return [self.line(item) for item in block]

    def line(self, item):
        if not self.live or item.rows is None:
            return item.source()
        spelling = self.scope(item.rows) + item.spelling.removeprefix("model")
        if item.port == "result":
            return item.source().replace("tracer.", f"{self.scope(item.rows)}.")
        return dataclasses.replace(item, spelling=spelling).source()

    @staticmethod
    def scope(cut):
        return "abc"[cut.start]


def program(seed):
    rng = actors.seeded(seed, "rows")
    live = rng.random() < 0.35
    cuts = CUTS[0] if live else list(rng.choice(CUTS))
    if not live:
        if rng.random() < 0.15:
            cuts = [slice(0, 3)]
        if rng.random() < 0.4:
            cuts.insert(rng.randint(0, len(cuts)), None)
    root = module_of(seed)
    blocks, grad = blocks_of(rng, root, cuts, live), rng.random() < 0.5
    return Program(seed, cuts, blocks, live, rng.random() < 0.5, grad)


def blocks_of(rng, root, cuts, live):
    """Items for each block, drawn in the order in which the model comes by."""
    drawing = Drawing(rng, root, root)
    blocks = [[] for _ in cuts]
    stood, ended = [-1] * len(cuts), [False] * len(cuts)
    names = {0: [], 1: ["x0[:1]"], 2: ["x0[:2]"], 3: ["x0"]}
    here = None  # whether rows, or the whole, were asked for at the event where this stands
    for _ in range(rng.randint(2, 12)):
        one = rng.randrange(len(cuts))
        rows = cuts[one]
        if live and rng.random() < 0.15:
            rows = None
        if ended[one]:
            continue
        before = drawing.at
        if not drawing.move(max(stood) if live else stood[one]):
            drawing.at = before
            continue
        whole = rows is None
        if drawing.at == before and whole != here:
            continue
        size = ROWS if whole else rows.stop - rows.start
        narrow = rows if not whole and (live or len([cut for cut in cuts if cut]) > 1) else None
        can_skip = all(cut is None for cut in cuts)
        pool = names[size] if rng.random() < 0.4 else names[size][-2:]
        item = drawing.draw(pool, None if can_skip else set(ACTS), narrow)
        if item is None:
            drawing.at = before
            continue
        item.value = item.value.replace("(3, 4)", f"({size}, 4)")
        here = whole
        blocks[one].append(item)
        stood[one] = drawing.at
        if item.act == "read" and item.port != "ins":
            names[size].append(item.name)
        if not live and rng.random() < 0.04:
            blocks[one].append(Item("stop"))
            ended[one] = True
    for one, cut in enumerate(cuts):
        narrow = cut if live or len([c for c in cuts if c]) > 1 else None
        if not ended[one] and rng.random() < 0.3:
            blocks[0 if live else one].append(Item("read", port="result", name=f"result{one}", rows=narrow))
        elif not live and not ended[one] and rng.random() < 0.06 and stood[one] > 2:
            path = drawing.paths[drawing.events[0][1]][0]
            spelling = programs.spell(rng, path)
            blocks[one].append(Item("read", path=path, port="in", name="missed", spelling=spelling, rows=narrow))
    return [merged(blocks)] if live else blocks


ACTS = ("read", "write", "edit", "augment")


def merged(blocks):
    """One block of all rows' items, in the order in which they were drawn."""
    items = [item for block in blocks for item in block]
    return sorted(items, key=lambda item: (item.port == "result", int(item.name[1:]) if item.port != "result" else 0))


def with_hooks(module, prog):
    env, kept = actors.environment(prog.seed)
    stage = actors.Stage(module, module, [Actor(block) for block in prog.blocks], env)
    is_copied = not prog.live and len([cut for cut in prog.cuts if cut]) > 1  # put together for the batch
    with torch.set_grad_enabled(prog.grad):
        stage.run(module, env["x"].clone() if is_copied else env["x"])
    for name in prog.bound() if stage.raised is None else []:
        env["keep"](f"{name} after", env[name])
    return actors.outcome(module, env, kept, stage.raised, prog.grad)


def with_trace(model, module, prog, errors):
    env, kept = actors.environment(prog.seed)
    env.update(model=model)
    with torch.set_grad_enabled(prog.grad):
        raised = actors.raised_by(prog, env, errors, late="can't be")
    return actors.outcome(module, env, kept, raised, prog.grad)
