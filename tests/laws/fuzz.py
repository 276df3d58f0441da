"""The fuzz of law 11, a script of its own, so that a crash is a failed test.

`python fuzz.py BLOCKS SEED [THREADS] [SWITCH] [DEVICE]`; the threads share one model.

Each block starts the model at a random depth of C frames, does other work at other depths between its reads, and often
writes a value of a wrong shape, so that torch raises on the model's side, or on the block's.
"""

import contextlib
import functools
import gc
import random
import re
import sys
import threading

import torch

import nnsight
import toys


def through_map(call, depth):
    climb = map(lambda _: call(), (None,))  # noqa: C417  the frames of C that a generator would not have
    for _ in range(depth):
        climb = map(next, (climb,))
    return next(climb)


def through_sorted(call, depth):
    box = []

    def key(_):
        box.append(call() if depth <= 1 else through_sorted(call, depth - 1))
        return 0

    sorted([0], key=key)
    return box[0]


def through_reduce(call, depth):
    return functools.reduce(lambda a, _: call() if depth <= 1 else through_reduce(call, depth - 1), (0, 0))


def through_sub(call, depth):
    box = []

    def replaced(_):
        box.append(call() if depth <= 1 else through_sub(call, depth - 1))
        return "b"

    re.sub("a", replaced, "a")
    return box[0]


def through_max(call, depth):
    box = []
    max([0], key=lambda _: box.append(call() if depth <= 1 else through_max(call, depth - 1)) or 0)
    return box[0]


def through_special_methods(call, depth):
    """C calls Python's special methods: a comparison within a list's, within a sort."""

    class Odd:
        def __eq__(self, other):
            box.append(call() if depth <= 1 else through_special_methods(call, depth - 1))
            return True

        __hash__ = None

    box = []
    [Odd()].index(3)
    return box[0]


def through_torch(call, depth):
    """Beneath an autograd function's forward, which C++ calls."""
    box = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            box.append(call() if depth <= 1 else through_torch(call, depth - 1))
            return x * 2

    Function.apply(torch.ones(1))
    return box[0]


WAYS = [through_map, through_sorted, through_reduce, through_sub, through_max, through_special_methods]


def deep(rng, call, most=40):
    """Calls `call` at the top of a random number of C frames."""
    ways = [*WAYS, through_torch] if rng.random() < 0.05 else WAYS
    for _ in range(rng.choice([0, 1, 1, 2])):
        call = functools.partial(rng.choice(ways), call, rng.randint(1, most))
    return call()


def fails(rng, device):
    """A torch operation that fails on the block's side."""
    ones = functools.partial(torch.ones, device=device)
    with contextlib.suppress(RuntimeError, IndexError):
        rng.choice(
            [
                lambda: ones(2, 3) @ ones(2, 3),
                lambda: ones(3).view(2, 2),
                lambda: ones(2)[5],
                lambda: torch.cat([ones(2), ones(2, 2)]),
            ]
        )()


def works(rng):
    """Other C work, which writes over what a stale walk would read."""
    rng.choice(
        [
            lambda: sorted(str(i) for i in range(50)),
            lambda: torch.randn(8, 8).svd(),
            lambda: re.findall("a+b", "aab" * 50),
            lambda: eval("[i for i in range(30)]"),
        ]
    )()


class Count:
    def __init__(self):
        self.blocks = self.torch_errors = self.our_errors = self.fine = 0
        self.generators = []


def a_block(rng, model, count, x):
    names = ["embed", *(f"layers.{i}.{part}" for i in range(3) for part in ("norm", "up", "act", "down")), "head"]
    start = rng.randrange(len(names))

    def value():
        if rng.random() < 0.6:
            return torch.zeros(rng.choice([(3, 9), (5, 4), (2, 3, 4), (4,), (0,)]), device=x.device)
        return torch.ones(3, 4, device=x.device)

    def act(tracer, name):
        envoy = tracer.model.get(name)
        dice = rng.random()
        if dice < 0.3:
            envoy.output = value()
        elif dice < 0.4:
            envoy.input = value()
        elif dice < 0.5:
            envoy.skip(value())
        elif dice < 0.55:
            envoy.inputs = ((value(), value()), {})
        elif dice < 0.6:
            fails(rng, x.device)
        elif dice < 0.63:
            tracer.stop()
        elif dice < 0.66:
            raise KeyError
        elif dice < 0.7:
            envoy.output[:] = value()
        else:
            envoy.output

    asked = rng.sample(names[start:], k=min(len(names) - start, rng.randint(0, 3)))
    if rng.random() > 0.002:
        asked.sort(key=names.index)  # out of order, the error runs a twin of the model, which takes its time

    def body():
        with model.trace(x) as tracer:
            for name in asked:
                if rng.random() < 0.3:
                    deep(rng, functools.partial(works, rng))
                if rng.random() < 0.1:
                    deep(rng, functools.partial(fails, rng, x.device))
                deep(rng, functools.partial(act, tracer, name))
                if rng.random() < 0.02:
                    deep(rng, functools.partial(a_block, rng, model, count, x))
                if rng.random() < 0.1:
                    return

    def generator():
        with model.trace(x) as tracer:
            for layer in tracer.model.layers:
                if rng.random() < 0.3:
                    layer.output = value()
                yield layer.output

    count.blocks += 1
    try:
        if rng.random() < 0.1:
            if len(count.generators) < 8:
                count.generators.append(generator())
            if rng.random() < 0.3:
                cycle = [generator()]  # only the collector can end this run, wherever it happens to run
                cycle.append(cycle)
                next(cycle[0])
            rng.shuffle(count.generators)
            if rng.random() < 0.2:
                deep(rng, count.generators.pop)
            elif count.generators and deep(rng, functools.partial(next, count.generators[-1], None)) is None:
                count.generators.pop()
        else:
            deep(rng, body)
        count.fine += 1
    except nnsight.Error:
        count.our_errors += 1
    except RecursionError:
        raise
    except (RuntimeError, TypeError, IndexError):
        count.torch_errors += 1
    except KeyError:
        count.fine += 1


def fuzz(model, blocks, seed, counts):
    rng, count = random.Random(seed), Count()
    device = next(model._module.parameters()).device
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(device)
    plain = model._module(x)
    for i in range(blocks):
        a_block(rng, model, count, x)
        if i % 500 == 0 and not torch.equal(model._module(x), plain):
            raise AssertionError(f"other numbers after block {i}")
    count.generators.clear()
    assert torch.equal(model._module(x), plain)
    counts.append(count)


def main(blocks, seed, threads=1, switch="auto", device="cpu"):
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the collector is to come often, and for what the blocks make
    gc.set_threshold(200, 5, 5)
    nnsight.CONFIG.switch = switch
    counts, model = [], nnsight.NNsight(toys.MLP().to(device))
    if threads == 1:
        fuzz(model, blocks, seed, counts)
    else:
        jobs = [
            threading.Thread(target=fuzz, args=(model, blocks // threads, seed + i, counts)) for i in range(threads)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    assert len(counts) == threads
    gc.collect()  # runs that hang in a cycle
    with model.trace(torch.ones(3, 4, device=device)):
        pass  # their thread passes again
    for module in model._module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    total = {
        name: sum(getattr(count, name) for count in counts) for name in ("blocks", "fine", "torch_errors", "our_errors")
    }
    print("survived", total)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:6])
