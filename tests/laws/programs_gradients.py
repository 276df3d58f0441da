"""Random programs that read, write and skip values, and then ask for gradients of what they read, and change them.

The reference uses autograd's own tensor hooks and `torch.autograd.grad`.
"""

import dataclasses

import actors
import programs
import programs_edits
import torch
from actors import Actor


def module_of(seed):
    return programs.module_of(seed)


@dataclasses.dataclass
class Program:
    """`form` is how the backward pass is written; `asked` what is done with gradients, once the values are known."""

    seed: int
    items: list
    form: str
    function_first: bool
    asked: list = dataclasses.field(default_factory=list)
    terms: list = dataclasses.field(default_factory=list)

    def source(self):
        lines = [item.source() for item in self.items] + ["result = tracer.result", f"loss = {self.loss()}"]
        if self.function_first:
            shuffled = self.shuffled()
            lines.append(f"for g in nnsight.grad(loss, [{', '.join(shuffled)}], retain_graph=True): keep('g', g)")
        backward = ["loss.backward()"]
        if self.form != "plain":
            call = "loss.backward()" if self.form == "method" else "nnsight.backward(loss)"
            backward = [f"with {call}:", *actors.indented(self.line(act, name) for act, name in self.asked)]
        if self.form == "after":
            return "\n".join(["with model.trace(x) as tracer:", *actors.indented(lines), *backward]) + "\n"
        return "\n".join(["with model.trace(x) as tracer:", *actors.indented([*lines, *backward])]) + "\n"

    def loss(self):
        return " + ".join(
            ["(x * x).sum()", *(f"({name} * {name}).sum() * {0.5 + i}" for i, name in enumerate(self.terms))]
        )

    def shuffled(self):
        names = [name for _, name in self.asked] or ["x"]
        actors.seeded(self.seed, "order").shuffle(names)
        return names

    @staticmethod
    def line(act, name):
        if act == "read":
            return f"keep('g {name}', {name}.grad)"
        if act == "scale":
            return f"{name}.grad = {name}.grad * -0.5"
        return f"{name}.grad = torch.ones_like({name})"


def program(seed):
    rng = actors.seeded(seed, "gradients")
    items = programs_edits.drawn(rng, module_of(seed), rng.randint(1, 8), 0)
    items, drawn = [], items
    for item in drawn:
        known = {one.name for one in items if one.act in ("read", "call")}
        if item.act in ("read", "write", "skip", "call") and item.port != "ins" and item.needs() <= known:
            items.append(item)
    form = rng.choice(["method", "method", "function", "after", "plain"])
    return Program(seed, items, form, rng.random() < 0.5)


def with_hooks(module, prog):
    """Runs the program, and chooses in passing whose gradients it asks for: in the order of the backward pass."""
    env, kept = actors.environment(prog.seed)
    env["x"].requires_grad_()
    env["keep"] = lambda name, value: None
    stage = actors.Stage(module, module, [Actor(prog.items)], env)
    torch.manual_seed(prog.seed)
    stage.run(module, env["x"])
    env["keep"] = actors.environment(prog.seed)[0]["keep"]
    kept = []
    if stage.raised is None:
        env.update(result=stage.result, leaves=list(module.parameters()))
        prog.asked = choose(prog, env)
        differentiate(prog, env, kept)
    return result(module, env, kept, stage.raised)


def choose(prog, env):
    """What is asked, of distinct tensors in the order in which a first backward pass comes to them."""
    rng = actors.seeded(prog.seed, "asked")
    names = [item.name for item in prog.items if item.act == "read"] + ["result"]
    tensors = {name: env[name] for name in names if isinstance(env.get(name), torch.Tensor) and env[name].requires_grad}
    distinct = {}
    for name, tensor in [*tensors.items(), ("x", env["x"])]:
        distinct.setdefault((tensor.grad_fn or id(tensor), tensor.output_nr), name)
    distinct = {name: env[name] for name in distinct.values()}
    order = []
    handles = [tensor.register_hook(lambda _, name=name: order.append(name)) for name, tensor in distinct.items()]
    prog.terms = list(tensors)
    torch.autograd.backward(eval(prog.loss(), env), retain_graph=True)
    for leaf in [*env["leaves"], env["x"]]:
        leaf.grad = None
    for handle in handles:
        handle.remove()
    acts = [(rng.choice(["read", "read", "scale", "ones"]), name) for name in order if rng.random() < 0.8]
    return acts


def differentiate(prog, env, kept):
    loss = eval(prog.loss(), env)

    def keep(name, value):
        kept.append((name, value, programs.copied(value)))

    if prog.function_first:
        for gradient in torch.autograd.grad(loss, [env[name] for name in prog.shuffled()], retain_graph=True):
            keep("g", gradient)
    hooks = {
        "read": lambda name: lambda g: keep(f"g {name}", g),
        "scale": lambda name: lambda g: g * -0.5,
        "ones": lambda name: torch.ones_like,
    }
    handles = [env[name].register_hook(hooks[act](name)) for act, name in prog.asked if prog.form != "plain"]
    loss.backward()
    for handle in handles:
        handle.remove()


def result(module, env, kept, raised):
    found = actors.outcome(module, env, kept, raised, grad=False)
    found.grads = {name: programs.copied(p.grad) for name, p in [*module.named_parameters(), ("x", env["x"])]}
    return found


def with_trace(model, module, prog, errors):
    import nnsight

    env, kept = actors.environment(prog.seed)
    env["x"].requires_grad_()
    keep, env["keep"] = env["keep"], lambda name, value: keep(name, value) if name[0] == "g" else None
    env.update(model=model, nnsight=nnsight)
    torch.manual_seed(prog.seed)
    raised = actors.raised_by(prog, env, errors)
    return result(module, env, kept, raised)
