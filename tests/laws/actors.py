"""What the random programs of law 3 are made of beyond one block in one forward pass, and their independent meaning.

An `Actor` has a list of `Item`s, one a line: an invoke, an edit, the one block there is. `Stage` runs a module with
plain torch hooks and lets the actors do their items where the model comes by: in their order, each as far as it can. An
item may belong to a step of a generation, to some rows of the batch, or wait for a name that another actor binds.
"""

import dataclasses
import random

import programs
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


@dataclasses.dataclass
class Item(programs.Step):
    """A line of a block: a `programs.Step` for some rows (None: all) and a step of a generation (None: any).

    Further acts: `begin` is where a step begins, `over` where a generation has ended.
    """

    rows: slice | None = None
    step: int | None = None

    def source(self):
        return super().source().replace("keep(", f"keep({self.name!r}, ")

    def needs(self):
        """The names of values that it uses."""
        return {name for name in compile(self.value or "0", "", "eval").co_names if name[0] == "v"}


@dataclasses.dataclass(eq=False)
class Actor:
    items: list
    at: int = 0
    stopped: bool = False
    stood: object = None  # where it acted last
    ready: tuple = (-1, None)  # the value of its next item, computed as soon as it comes to that line

    def next(self):
        return self.items[self.at] if self.at < len(self.items) else None


def inputs_of(item, args, kwargs):
    """The inputs after an item has changed them."""
    first = programs.first_of(args, kwargs)
    if item.act == "edit":
        first[:] = item.ready
        return args, kwargs
    if item.port == "ins":
        return item.ready
    if item.act == "augment":
        first *= 0.5
    new = first if item.act == "augment" else item.ready
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})


class Here:
    """A value of the model's and where it stands: the inputs of a call, or its output; whole, or by rows."""

    def __init__(self, value, module=None, inputs=None):
        self.value, self.module, self.inputs = value, module, inputs
        self._held = tree_flatten(value)[0]  # what others may hold, too: a part of it that isn't written stays theirs
        self._wrote = set()  # who has written which leaf
        self._parts, self._handed_out = {}, {}
        self._left = {}  # the versions of wholes when they were replaced
        self._later = {}  # parts that were put, and aren't in the whole yet

    def take(self, rows):
        if rows is None:
            self.settle()
            return self.value
        if (rows.start, rows.stop) in self._later:
            self._write_out()
        return self.had(rows)

    def had(self, rows):
        """A part to make another one of."""
        key = (rows.start, rows.stop)
        if key in self._later:
            return self._later[key]
        if key not in self._parts:
            leaves, form = tree_flatten(self.value)
            of = [leaf if (key, i) in self._wrote else held for i, (leaf, held) in enumerate(zip(leaves, self._held))]
            part = tree_map(lambda t: t[rows] if isinstance(t, torch.Tensor) else t, tree_unflatten(of, form))
            self._parts[key], self._handed_out[key] = part, (tree_flatten(part)[0], of)
        return self._parts[key]

    def put(self, rows, value):
        """Replaces a part: the whole has it when the model goes on, or somebody asks for it."""
        if rows is None:
            self._parts.clear()
            self._wrote.clear()
            self.value, self._held = value, tree_flatten(value)[0]
            return
        self.had(rows)
        key = (rows.start, rows.stop)
        leaves, form = tree_flatten(value)
        new = [
            self._kept(key, i, part, leaf) for i, (part, leaf) in enumerate(zip(leaves, tree_flatten(self.value)[0]))
        ]
        self._later.pop(key, None)
        if all(part is leaf for part, leaf in zip(new, leaves)):
            self._parts[key] = value
        else:
            self._later[key] = tree_unflatten(new, form)

    def settle(self):
        """Before the model goes on: what was handed out is what it goes on with, also where gradients flow."""
        parts = {**self._parts, **self._later}
        self._put_together({key: tree_flatten(part)[0] for key, part in parts.items()}, flows=True)
        self._parts.clear()
        self._later.clear()

    def _write_out(self):
        """The whole is another tensor from then on, and other parts stay what they were."""
        self._put_together({key: tree_flatten(part)[0] for key, part in self._later.items()}, flows=False)
        for key, part in self._later.items():
            handed_out = self._handed_out[key][0]
            self._wrote |= {(key, i) for i, leaf in enumerate(tree_flatten(part)[0]) if leaf is not handed_out[i]}
            del self._parts[key]
        self._later.clear()
        for of in self._held:
            if isinstance(of, torch.Tensor):
                self._left.setdefault(id(of), of._version)

    def _is_as_it_was(self, key, i, part, leaf):
        """Whether a part is what was handed out, and the whole has all of it."""
        handed_out, of = (found[i] for found in self._handed_out[key])
        return part is handed_out and (of is leaf or self._left.get(id(of)) == of._version)

    def _kept(self, key, i, part, leaf):
        if not isinstance(leaf, torch.Tensor) or self._is_as_it_was(key, i, part, leaf):
            return part
        return leaf[slice(*key)].clone().copy_(part)

    def _put_together(self, parts, *, flows):
        leaves, form = tree_flatten(self.value)
        for i, leaf in enumerate(leaves):
            new = leaf
            for key, part in sorted(parts.items()):
                if not isinstance(leaf, torch.Tensor):
                    continue
                requires_grad = leaf.requires_grad or self._handed_out[key][1][i].requires_grad
                if self._is_as_it_was(key, i, part[i], leaf) and not (flows and requires_grad):
                    continue
                new = leaf.clone() if new is leaf else new
                new[slice(*key)] = part[i]
            leaves[i] = new
        self.value = tree_unflatten(leaves, form)


class Stage:
    """Runs `call` on a module with a plain hook at each of its modules, and lets actors act.

    Args:
        module: What runs.
        root: What the paths of items start from.
        actors: Those that act from the start, in their order.
        env: Where values are evaluated, and names bound.
        edits: `(module, items)`, acted anew in each call of the module, in this order and before the actors.
    """

    def __init__(self, module, root, actors, env, edits=None):
        self.module, self.root, self.actors, self.env = module, root, list(actors), env
        self.edits, self.acting = list(enumerate(edits or [])), []
        self.step, self.busy, self.raised, self.over = -1, False, None, False
        self.calls, self.skips, self.counter, self.failed = [], {}, 0, []

    def run(self, call, *args):
        handles, replaced = [], []
        for module in list(self.module.modules()):
            handles.append(module.register_forward_pre_hook(self.entering, with_kwargs=True))
            handles.append(module.register_forward_hook(self.leaving, with_kwargs=True))
            replaced.append(module)
            module.forward = self.running(module.forward)
        try:
            self.offer(None, None)
            self.result = call(*args)
            self.over = True
            self.offer("result", Here(self.result))
            self.check_none_waits()
        except programs.Stopped:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module in replaced:
                del module.forward

    def check_none_waits(self, step=None):
        """Raises as the block does that waits in vain for something, of a step that ends if one is given."""
        for actor in self.actors:
            item = actor.next()
            if item is not None and item.port is not None and (step is None or item.step == step):
                self.fail(actor, "missed")
                raise programs.Stopped

    # Where the model comes by.

    def entering(self, module, args, kwargs):
        if self.busy:
            return None
        self.counter += 1
        self.calls.append((self.counter, module))
        if module is self.module:
            self.step += 1
            self.offer("begin", None)
        new = [(rank, module, Actor(items)) for rank, (owner, items) in self.edits if owner is module]
        self.acting = sorted([*self.acting, *new], key=lambda acts: acts[0])
        here = Here((args, kwargs))
        self.offer(("in", module), here)
        return here.value

    def running(self, forward):
        def call(*args, **kwargs):
            if self.busy or self.calls[-1][0] not in self.skips:
                return forward(*args, **kwargs)
            return self.skips[self.calls[-1][0]]

        return call

    def leaving(self, module, args, kwargs, output):
        if self.busy:
            return None
        self.calls.pop()
        here = Here(output, module, (args, kwargs))
        self.offer(("out", module), here)
        self.acting = [acts for acts in self.acting if acts[1] is not module]
        if module is self.module and self.step >= 0:
            self.check_none_waits(self.step)
        return here.value

    def offer(self, place, here):
        """Lets all act, those first who come first, until none can."""
        while any(self.advance(actor, place, here) for actor in self.everyone()):
            pass
        if here is not None:
            here.settle()

    def everyone(self):
        return [actor for _, _, actor in self.acting] + self.actors

    def advance(self, actor, place, here):
        moved = self.compute(actor)
        while (item := actor.next()) is not None and (self.is_due(item, place) or self.looks_back(actor, item, here)):
            actor.at += 1
            moved = True
            if item.act == "stop":
                self.end(actor)
            elif item.act == "call":
                self.call(item)
            elif item.port is not None:
                item.ready = actor.ready[1]
                self.act(actor, item, here)
                actor.stood = here
            self.compute(actor)
        return moved

    def compute(self, actor):
        """Has an actor compute what its next item writes, once the names in it are there. Whether it could just now."""
        item = actor.next()
        if item is None or item.port is None or actor.ready[0] == actor.at or not item.needs() <= self.env.keys():
            return False
        actor.ready = actor.at, eval(item.value, self.env) if item.value else None
        return bool(item.value)

    def looks_back(self, actor, item, here):
        """Whether an item asks for the inputs of the call at whose output its actor stands."""
        known = here is not None and here.inputs is not None and actor.stood is here and self.is_now(item)
        return known and item.port in ("in", "ins", "skip") and self.place_of(item.path) == here.module

    def is_due(self, item, place):
        if not item.needs() <= self.env.keys():
            return False
        if item.act == "begin":
            return item.step <= max(self.step, 0)
        if item.act == "over":
            return self.over
        if item.port is None:
            return True
        if item.port == "result":
            return place == "result"
        if not isinstance(place, tuple) or not self.is_now(item):
            return False
        kind = "out" if item.port == "out" else "in"
        return place == (kind, self.place_of(item.path))

    def place_of(self, path):
        return self.root.get_submodule(path)

    def is_now(self, item):
        return item.step is None or item.step == self.step

    def call(self, item):
        self.busy = True
        try:
            module = eval(item.spelling, {"model": programs.Bare(self.root)})
            self.bind(item, module.forward(eval(item.value, self.env)))
        finally:
            self.busy = False

    def bind(self, item, value):
        self.env[item.name] = value
        self.env["keep"](item.name, value)

    def act(self, actor, item, here):
        if item.port in ("in", "ins", "skip") and here.inputs is not None:
            self.act_late(actor, item, *here.inputs)
            return
        if item.act == "skip":
            self.skips[self.counter] = item.ready
            return
        value = here.had(item.rows) if item.act == "write" and item.rows else here.take(item.rows)
        if item.port in ("in", "ins") and item.act in ("write", "augment") and self.counter in self.skips:
            if item.act == "augment":
                inputs_of(item, *value)
            self.fail(actor, "untaken")
            self.end(actor)
            return
        if item.port == "result":
            self.bind(item, value)
        elif item.port in ("in", "ins"):
            if item.act == "read":
                self.bind(item, value if item.port == "ins" else programs.first_of(*value))
            elif item.act == "edit":
                inputs_of(item, *value)
            else:
                here.put(item.rows, inputs_of(item, *value))
        elif item.act == "read":
            self.bind(item, programs.part_of(value, item.part))
        elif item.act == "write":
            here.put(item.rows, item.ready)
        elif item.act == "edit":
            programs.part_of(value, item.part)[:] = item.ready
        else:
            here.put(item.rows, programs.scaled(value, item.part))

    def act_late(self, actor, item, args, kwargs):
        """At a module's output its inputs are still known, and nothing but their insides can change."""
        args, kwargs = tree_map(
            lambda t: t[item.rows] if item.rows and isinstance(t, torch.Tensor) else t, (args, kwargs)
        )
        if item.act == "read":
            self.bind(item, (args, kwargs) if item.port == "ins" else programs.first_of(args, kwargs))
            return
        if item.act in ("edit", "augment"):
            inputs_of(item, args, kwargs)
        if item.act != "edit":
            self.fail(actor, "late")
            self.end(actor)

    def fail(self, actor, kind):
        """Of several that fail, the first in their order is raised, and an edit before them all."""
        self.failed.append((self.actors.index(actor) if actor in self.actors else -1, kind))
        self.raised = min(self.failed)[1]

    def end(self, actor):
        """Ends an actor before its end, and the model where no other needs it; an edit that fails ends it too."""
        actor.at, actor.stopped = len(actor.items), True
        if all(one.stopped for one in self.actors) or actor not in self.actors:
            raise programs.Stopped


# Drawing


class Drawing:
    """Draws items at the events of a module's forward pass, in the order in which it will come by.

    Args:
        rng: Where chance comes from.
        root: What paths start from.
        start: The module whose events are met.
    """

    def __init__(self, rng, root, start):
        self.rng, self.start, self.root = rng, start, root
        self.events, self.at, self.count = programs.timeline(start), -1, 0
        self.paths = {}
        for path, child in root.named_modules(remove_duplicate=False):
            self.paths.setdefault(child, []).append(path)

    def name(self):
        self.count += 1
        return f"v{self.count}"

    def move(self, stood=-1):
        """Goes to a later event, or stays; False if there is none, or an actor that stands elsewhere couldn't follow.

        `stood` is where the actor stands that is to meet it: nothing between may look like the event.
        """
        if self.at >= 0 and self.rng.random() < 0.35:
            wanted = self.at
        else:
            later = range(self.at + 1, min(len(self.events), self.at + 1 + self.rng.choice([3, 8, 30])))
            if not later:
                return False
            wanted = self.rng.choice(later)
        passed = self.events[max(stood, 0) : wanted] if stood != wanted else []
        if any(event[:2] == self.events[wanted][:2] for event in passed):
            return False
        self.at = wanted
        return True

    def draw(self, names, acts=None, rows=None):
        """An item at the event where this stands; with `acts`, one of these acts; for rows, one that rows can do."""
        kind, module, call = self.events[self.at]
        width = None if rows is None else rows.stop - rows.start
        for _ in range(50):
            step = programs.draw(self.rng, module, kind, self.paths, names, 0)
            if acts is not None and step.act not in acts:
                continue
            if step.act == "look back" or (rows is not None and (step.act == "skip" or step.port == "ins")):
                continue
            item = Item(**{**vars(step), "name": self.name()}, rows=rows)
            if width is not None:
                item.value = item.value.replace(f"({programs.ROWS}, ", f"({width}, ")
            if item.act == "skip":
                end = self.events.index(("out", module, call))
                del self.events[self.at + 1 : end]
            return item
        return None

    def call(self, names):
        """A call of a module in the block."""
        path = self.rng.choice(self.paths[self.rng.choice([m for m in self.paths if programs.simple(m)])])
        value = programs.expression(self.rng, names)
        return Item("call", name=self.name(), value=value, spelling=programs.spell(self.rng, path))


def environment(seed):
    """What a program sees: `x`, `x0` and `keep(name, value)`; and what it kept, sorted by name for the comparison."""
    env, _ = programs.environment(seed)
    kept = []
    env["keep"] = lambda name, value: kept.append((name, value, programs.copied(value)))
    return env, kept


def raised_by(prog, env, errors, late="any more"):
    """Runs a program's source in `env`; None, or which of the mistakes that a program may make ended it."""
    try:
        exec(compile(prog.source(), f"<{type(prog).__module__} {prog.seed}>", "exec"), env)
    except errors.OutOfOrderError:
        return "missed"
    except errors.WriteError as error:
        return programs.late_or_untaken(error, late)
    return None


def outcome(module, env, kept, raised, grad):
    """As `programs.outcome`, where what was kept may come in another order."""
    kept = sorted(kept, key=lambda entry: (len(entry[0]), entry[0]))
    found = programs.outcome(module, env, [entry[1:] for entry in kept], raised, grad, env["x"])
    found.kept = [[name for name, _, _ in kept], *found.kept]
    return found


def seeded(seed, salt):
    return random.Random(f"{seed} {salt}")


def indented(lines, by=1):
    return ["    " * by + line for line in lines] or ["    " * by + "pass"]
