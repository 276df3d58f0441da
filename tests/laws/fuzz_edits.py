"""Edits that fail, at any depth of the stack and in any order of open runs: run in a process that must not die.

`python fuzz_edits.py SEED [thread]` prints how many runs failed as they should.
"""

import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

import nnsight
import toys


def deep(depth, function):
    """Calls `function` beneath that many more C frames."""
    return function() if depth == 0 else list(map(lambda _: deep(depth - 1, function), [0]))[0]  # noqa: C417, RUF015


def some_edit(rng):
    kind, first, second, depth = rng.randrange(6), rng.randrange(3), rng.randrange(3), rng.randrange(20)

    def edit(model):
        layer = model.layers[first]
        if kind == 0:
            layer.output = torch.zeros(3, 9)
        elif kind == 1:
            layer.output @ torch.zeros(9, 9)
        elif kind == 2:
            layer.output = layer.output * 2
        elif kind == 3:
            layer.input = layer.input + 1
            model.layers[second].output = model.layers[second].output * 1
        elif kind == 4:
            model.layers[second](torch.randn(3, rng.choice([4, 9])), hook=True)
        else:
            layer.output
            deep(depth, lambda: torch.zeros(2) @ torch.zeros(5))

    return edit


def steps(edited, x):
    with edited.trace(x):
        for layer in edited.layers:
            yield layer.output.sum()
        yield edited.output


def main(seed):
    rng, x, failed = random.Random(seed), torch.randn(3, 4), 0
    modules = [toys.MLP() for _ in range(3)]
    paused = []
    for _ in range(100):
        edited = nnsight.NNsight(rng.choice(modules))
        for _ in range(rng.randrange(1, 3)):
            edited = edited.edit(some_edit(rng))
        try:
            act = rng.randrange(4)
            if act == 0:
                deep(rng.randrange(30), lambda: edited(x))  # noqa: B023
            elif act == 1:
                paused.append(steps(edited, x))
                deep(rng.randrange(20), lambda: next(paused[-1]))
            elif act == 2 and paused:
                one = rng.randrange(len(paused))
                deep(rng.randrange(30), lambda: next(paused[one], None))  # noqa: B023
            elif paused:
                paused.pop(rng.randrange(len(paused)))
            with edited.trace(x):
                deep(rng.randrange(20), lambda: edited.layers[rng.randrange(3)].output)  # noqa: B023
        except (nnsight.Error, RuntimeError):
            failed += 1
    paused.clear()
    for module in (part for one in modules for part in one.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    print(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    nnsight.CONFIG.switch = sys.argv[2]
    main(int(sys.argv[1]))
