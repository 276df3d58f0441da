"""Small modules that between them call their children in every way that a model can.

All of them map [batch, width] to [batch, width] unless their docstring says otherwise.
"""

import torch
from torch import nn

WIDTH = 4


def seeded(module, seed=0):
    """Gives `module` parameters that depend on `seed` alone, and returns it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


class Layer(nn.Module):
    """A residual layer: x + down(act(up(norm(x))))."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.act = nn.Tanh()
        self.down = nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class MLP(nn.Module):
    def __init__(self, depth=3, width=WIDTH, seed=0):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, width)
        seeded(self, seed)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Pair(nn.Module):
    """Two children, one after the other."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH) if first is None else first
        self.second = nn.Linear(WIDTH, WIDTH) if second is None else second

    def forward(self, x):
        return self.second(self.first(x))


class Shared(nn.Module):
    """One module under two names, called under both."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.between = nn.Tanh()
        self.second = self.first
        seeded(self)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Cell(nn.Module):
    """One step of a recurrent network, on two positional arguments."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.act = nn.Tanh()

    def forward(self, x, state):
        return self.act(self.mix(x) + state)


class RNN(nn.Module):
    """The same cell, `steps` times."""

    def __init__(self, steps=3):
        super().__init__()
        self.cell = Cell()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.steps = steps
        seeded(self)

    def forward(self, x):
        state = torch.zeros_like(x)
        for _ in range(self.steps):
            state = self.cell(x, state)
        return self.head(state)


class TupleCore(nn.Module):
    """Returns a tuple: (hidden, (hidden again, a number))."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        hidden = self.inner(x)
        return hidden, (hidden * 2, 3)


class DictCore(nn.Module):
    """Takes keywords only, and returns a dict: {"hidden": ..., "extra": [...]}."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, x, scale=1.0):
        hidden = self.inner(x) * scale
        return {"hidden": hidden, "extra": [hidden + 1]}


class Structured(nn.Module):
    """Children whose outputs are a tuple and a dict, called with positions and with keywords."""

    def __init__(self):
        super().__init__()
        self.tuple = TupleCore()
        self.dict = DictCore()
        seeded(self)

    def forward(self, x):
        hidden, (twice, number) = self.tuple(x)
        inner = self.dict(x=hidden + twice * number, scale=0.5)
        return inner["hidden"] + inner["extra"][0]


class Hidden(nn.Module):
    """Keeps children in a plain list, where torch does not see them; `seen` is one of them, and registered as well.

    `outer` is registered, and calls `seen` through the list: its caller is no ancestor of it in the tree.
    """

    def __init__(self):
        super().__init__()
        self.seen = nn.Linear(WIDTH, WIDTH)
        self.outer = Calls([self.seen, nn.Tanh()])
        self.plain = [nn.Linear(WIDTH, WIDTH), self.outer]
        seeded(self)
        seeded(self.plain[0], 1)

    def _apply(self, *args, **kwargs):
        self.plain[0]._apply(*args, **kwargs)  # goes where the registered ones go
        return super()._apply(*args, **kwargs)

    def forward(self, x):
        for module in self.plain:
            x = module(x)
        return x


class Calls(nn.Module):
    """Calls modules that it does not own."""

    def __init__(self, others):
        super().__init__()
        self.others = others

    def forward(self, x):
        for module in self.others:
            x = module(x)
        return x * 1.5


class Fails(nn.Module):
    """Raises between its two children."""

    def __init__(self, error=None):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.error = error
        seeded(self)

    def forward(self, x):
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(x)


class Catches(nn.Module):
    """Catches what its child raises, and goes on with something else.

    `kind` is the class that it catches; `log` tells what it caught.
    """

    def __init__(self, child=None, kind=RuntimeError):
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH) if child is None else child
        self.after = nn.Linear(WIDTH, WIDTH)
        self.kind, self.log = kind, []
        seeded(self)

    def forward(self, x):
        try:
            x = self.child(x)
        except self.kind as error:
            self.log.append(type(error).__name__)
        return self.after(x)


class Finally(nn.Module):
    """Has something to clean up, and tells in `log` when it did."""

    def __init__(self, clean=None):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.log, self.clean = [], clean
        seeded(self)

    def forward(self, x):
        self.log.append("entered")
        try:
            return self.second(self.first(x))
        finally:
            self.log.append("left")
            if self.clean is not None:
                self.clean()


class Under(nn.Module):
    """Runs its child under what `manager()` returns; `log` gets `probe()` before, inside (twice) and after."""

    def __init__(self, manager, probe=lambda: None):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.child = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)
        self.manager, self.probe, self.log = manager, probe, []
        seeded(self)

    def forward(self, x):
        x = self.before(x)
        self.log.append(self.probe())
        with self.manager():
            self.log.append(self.probe())
            x = self.child(x)
            self.log.append(self.probe())
        self.log.append(self.probe())
        return self.after(x.to(torch.float32).clone())


class Recursive(nn.Module):
    """Calls itself `depth` times, and its child each time."""

    def __init__(self, depth=3):
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)
        self.depth = depth
        seeded(self)

    def forward(self, x, depth=None):
        depth = self.depth if depth is None else depth
        return self.child(x) if depth == 0 else self(x + 1, depth - 1) * 0.5


class SAE(nn.Module):
    """Something like a sparse autoencoder, which keeps the width."""

    def __init__(self, width=WIDTH, features=6):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, features), nn.Linear(features, width)

    def forward(self, x):
        return self.decoder(torch.relu(self.encoder(x)))


def spliced_by_hand(mlp, x, change=lambda features: features):
    """The encoder's output, the autoencoder's and the model's, in plain torch."""
    module = mlp._module
    sae = module.layers[0].sae
    encoded = change(sae.encoder(module.layers[0](module.embed(x))))
    decoded = sae.decoder(torch.relu(encoded))
    return encoded, decoded, module.head(module.layers[2](module.layers[1](decoded)))


class Ask(nn.Module):
    """Calls `question(x)` in its forward, whose answer goes on."""

    def __init__(self, question):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)
        self.question = question
        seeded(self)

    def forward(self, x):
        return self.after(self.question(self.before(x)))


class Wide(nn.Module):
    """Has `n` children, and calls three of them."""

    def __init__(self, n):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n))
        seeded(self)

    def forward(self, x):
        for i in range(3):
            x = self.layers[i](x)
        return x


def everything():
    """One of each shape of module tree that runs without error, by name."""
    return {
        "mlp": MLP(),
        "shared": Shared(),
        "rnn": RNN(),
        "structured": Structured(),
        "hidden": Hidden(),
        "recursive": Recursive(),
        "catches": Catches(),
        "finally": Finally(),
        "nested": seeded(nn.Sequential(Pair(), nn.Sequential(Layer(), nn.Sequential(Pair())), nn.ReLU())),
    }
