"""Random programs of nested backward blocks, with errors in the engine, in the block and at depth. Prints "ok"."""

import contextlib
import random
import sys
import warnings

import torch

import nnsight
import toys


class Fails(torch.autograd.Function):
    """Its backward is an operation that fails, which makes torch walk the C stack."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(3, 4) @ torch.ones(3, 4)


class Program:
    def __init__(self, seed):
        self.random = random.Random(seed)
        nnsight.CONFIG.switch = self.random.choice(["greenlet", "greenlet", "greenlet", "thread"])
        self.model = nnsight.NNsight(toys.MLP(depth=self.random.choice([2, 5])))
        self.fails = self.random.random() < 0.4

    def run(self):
        with self.model.trace(torch.randn(3, 4)):
            self.hidden = [layer.output for layer in self.model.layers]
            if self.fails:
                self.model.layers[-1].output = Fails.apply(self.hidden[-1])
            self.loss = self.model.output.square().sum()
            self.expected = None if self.fails else torch.autograd.grad(self.loss, self.hidden, retain_graph=True)
            self.block(self.random.randint(0, 4))

    def block(self, depth):
        chance = self.random.random
        with nnsight.backward(self.loss, retain_graph=True):
            for value, index in zip(reversed(self.hidden), reversed(range(len(self.hidden)))):
                if chance() < 0.6:
                    gradient = value.grad
                    assert torch.equal(gradient, self.expected[index])
                if depth and chance() < 0.3:
                    if chance() < 0.3:
                        with contextlib.suppress(ZeroDivisionError):
                            self.block(depth - 1)
                            1 / 0
                    else:
                        self.block(depth - 1)
                if chance() < 0.05:
                    1 / 0
                if chance() < 0.05:
                    value @ value


def deep(frames, function):
    return deep(frames - 1, function) if frames else function()


def main(first, last):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in range(first, last):
        program = Program(seed)
        for frames in (0, 3, 30):
            with contextlib.suppress(RuntimeError, ZeroDivisionError):
                deep(frames, program.run)
            assert torch._C._current_graph_task_id() == -1, seed
            assert torch._C._len_torch_function_stack() == 0, seed
    print("ok")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
