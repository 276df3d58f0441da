"""Law 7: threads, tasks, nested and parallel runs do not see each other."""

import asyncio
import contextvars
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import greenlet
import programs
import pytest
import torch

import nnsight
import toys
from nnsight import errors
from nnsight.core import operations


def layers_of(module, x):
    """What the layers of an MLP give when nobody looks."""
    seen = []
    handles = [layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in module.layers]
    module(x)
    for handle in handles:
        handle.remove()
    return seen


def same(seen, expected):
    return len(seen) == len(expected) and all(map(torch.equal, seen, expected))


@pytest.fixture
def xs():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, 4, generator=generator) for _ in range(8)]


# Threads


def run_all(*jobs):
    """Runs each job in a thread of its own, all at once; raises what one raised."""
    errors_, barrier = [], threading.Barrier(len(jobs))

    def guarded(job):
        barrier.wait()
        try:
            job()
        except BaseException as error:  # noqa: BLE001  raised again by the main thread
            errors_.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors_:
        raise errors_[0]


def stateless(seed):
    """A module whose forward keeps nothing in its modules and draws no random numbers, so that threads may share it."""
    module = programs.module_of(seed)
    kinds = (programs.Counts, torch.nn.Dropout)
    return None if any(isinstance(child, kinds) for child in module.modules()) else module


@pytest.mark.slow
@pytest.mark.parametrize("seed", [s for s in range(100, 160) if stateless(s) is not None][:4])
def test_eight_threads_on_one_model_do_what_each_does_alone(seed, switch):
    """Random blocks of law 3 on one shared module; gradients are left out, since they add up in shared parameters."""
    drawn = [programs.program(n, stateless(seed)) for n in range(64)]
    for program in drawn:
        program.grad = False
    expected = [programs.with_hooks(stateless(seed), program) for program in drawn]
    module = stateless(seed)
    model = nnsight.NNsight(module)

    def job(part):
        def run():
            for program, alone in zip(drawn[part::8], expected[part::8], strict=True):
                got = programs.with_trace(model, module, program, errors, seeded=False)
                wrong = programs.difference(alone, got)
                assert not wrong, f"{wrong}\n{module}\n{program.source()}"

        return run

    run_all(*[job(i) for i in range(8)])
    for child in module.modules():
        assert "forward" not in vars(child)
        assert not child._forward_hooks
        assert not child._forward_pre_hooks


def test_threads_that_write_skip_and_stop_on_one_module_see_their_own(mlp, xs, switch):
    plain = [mlp._module(x) for x in xs]

    def writes(x, value):
        def run():
            for _ in range(15):
                with mlp.trace(x):
                    mlp.layers[1].output = torch.full((3, 4), value)
                    into = mlp.layers[2].input
                assert torch.equal(into, torch.full((3, 4), value))

        return run

    def skips(x, value):
        def run():
            for _ in range(15):
                with mlp.trace(x):
                    mlp.layers[1].skip(torch.full((3, 4), value))
                    out = mlp.layers[1].output
                assert torch.equal(out, torch.full((3, 4), value))

        return run

    def stops(x):
        def run():
            for _ in range(15):
                with mlp.trace(x) as tracer:
                    mlp.layers[1].input
                    tracer.stop()

        return run

    def calls(x, out):
        def run():
            for _ in range(30):
                assert torch.equal(mlp._module(x), out)

        return run

    run_all(
        writes(xs[0], 1.0), writes(xs[1], 2.0), skips(xs[2], 3.0), skips(xs[3], 4.0),
        stops(xs[4]), stops(xs[5]), calls(xs[6], plain[6]), calls(xs[7], plain[7]),
    )  # fmt: skip
    assert all(torch.equal(mlp._module(x), out) for x, out in zip(xs, plain, strict=True))
    assert all("forward" not in vars(child) for child in mlp._module.modules())


def test_a_thread_within_a_block_has_no_run_of_its_own(mlp, x, switch):
    """A plain read in another thread is outside any trace, or another thread's: never a value of this run."""
    found = []

    def read():
        try:
            found.append(mlp.layers[1].output)
        except errors.BlockError as error:
            found.append(type(error))

    with mlp.trace(x):
        mlp.layers[0].output
        for target in (read, functools.partial(contextvars.copy_context().run, read)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        mlp.layers[1].output
    assert found == [errors.OutsideTraceError, errors.OtherThreadError]


def test_a_value_asked_for_in_a_worker_of_a_block_says_whose_the_trace_is(mlp, x):
    text = r"because +this is thread 'worker_0', and a trace is open in the thread that opened it alone"
    with ThreadPoolExecutor(1, thread_name_prefix="worker") as pool, mlp.trace(x):
        with pytest.raises(errors.OutsideTraceError, match=text):
            pool.submit(lambda: mlp.layers[0].output).result()
    with pytest.raises(errors.OutsideTraceError) as raised:
        mlp.layers[0].output
    assert "because" not in str(raised.value)


def test_a_pool_of_threads_opens_traces_within_a_trace(mlp, xs, switch):
    expected = [layers_of(mlp._module, x)[1] for x in xs]

    def one(x):
        with mlp.trace(x):
            return mlp.layers[1].output

    with mlp.trace(xs[0]), ThreadPoolExecutor(4) as pool:
        first = mlp.layers[0].output
        seen = list(pool.map(one, xs))
        second = mlp.layers[1].output
    assert same(seen, expected)
    assert torch.equal(second, expected[0])
    assert first.shape == (3, 4)


# Tasks


def test_tasks_interleave_on_one_model(mlp, xs, switch):
    async def one(x):
        seen = []
        with mlp.trace(x):
            for layer in mlp.layers:
                await asyncio.sleep(0)
                seen.append(layer.output)
            await asyncio.sleep(0)
        return seen

    async def all_of_them():
        return await asyncio.gather(*map(one, xs))

    for x, seen in zip(xs, asyncio.run(all_of_them()), strict=True):
        assert same(seen, layers_of(mlp._module, x))


def test_tasks_that_end_in_any_order_and_are_cancelled(mlp, xs, switch):
    async def one(x, turns):
        with mlp.trace(x):
            mlp.layers[0].output
            for _ in range(turns):
                await asyncio.sleep(0)
            mlp.layers[1].output = x
            for _ in range(turns):
                await asyncio.sleep(0)
            return mlp.layers[2].input

    async def all_of_them():
        lost = asyncio.create_task(one(xs[6], 100))
        kept = [asyncio.create_task(one(x, turns)) for x, turns in zip(xs, [3, 1, 5, 0, 2, 4], strict=False)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        lost.cancel()
        return await asyncio.gather(*kept)

    assert same(asyncio.run(all_of_them()), xs[:6])


def test_a_task_started_in_a_block_inherits_it_and_its_own_trace_is_its_own(mlp, xs, switch):
    async def child():
        with mlp.trace(xs[1]):
            await asyncio.sleep(0)
            return mlp.layers[1].output

    async def parent():
        with mlp.trace(xs[0]):
            first = mlp.layers[0].output
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
            second = mlp.layers[1].output
            return first, second, await task

    first, second, childs = asyncio.run(parent())
    assert same([first, second], layers_of(mlp._module, xs[0])[:2])
    assert torch.equal(childs, layers_of(mlp._module, xs[1])[1])


# Nested and lockstep


def test_nested_traces_of_one_model(mlp, xs, switch):
    one, two, three = (layers_of(mlp._module, x) for x in xs[:3])
    with mlp.trace(xs[0]):
        a0 = mlp.layers[0].output
        with mlp.trace(xs[1]):
            b0 = mlp.layers[0].output
            with mlp.trace(xs[2]):
                c = [layer.output for layer in mlp.layers]
            b1 = mlp.layers[1].output
        a1 = mlp.layers[1].output
        with mlp.trace(xs[1]):
            b2 = mlp.layers[2].output
        a2 = mlp.layers[2].output
    assert same([a0, a1, a2], one)
    assert same([b0, b1, b2], two)
    assert same(c, three)


def test_what_an_inner_trace_writes_stays_there(mlp, xs, switch):
    plain = mlp._module(xs[0])
    with mlp.trace(xs[0]) as tracer:
        mlp.layers[0].output
        with mlp.trace(xs[1]):
            mlp.layers[1].output = torch.zeros(3, 4)
            mlp.layers[2].skip(torch.ones(3, 4))
        out = tracer.result
    assert torch.equal(out, plain)


def test_a_value_of_one_run_written_into_another(mlp, xs, switch):
    clean = layers_of(mlp._module, xs[0])
    with mlp.trace(xs[0]) as a, mlp.trace(xs[1]) as b:
        b.layers[1].output = a.layers[1].output
        into = b.layers[2].input
        out, expected = b.result, a.result
    assert torch.equal(into, clean[1])
    assert torch.equal(out, expected)


def test_lockstep_by_scopes(mlp, xs, switch):
    one, two = layers_of(mlp._module, xs[0]), layers_of(mlp._module, xs[1])
    with mlp.trace(xs[0]) as a, mlp.trace(xs[1]) as b:
        pairs = [(x.output, y.output) for x, y in zip(a.model.layers, b.model.layers, strict=True)]
    assert same([x for x, _ in pairs], one)
    assert same([y for _, y in pairs], two)


def test_a_plain_name_means_the_run_that_was_entered_last(mlp, xs):
    one, two = layers_of(mlp._module, xs[0]), layers_of(mlp._module, xs[1])
    with mlp.trace(xs[0]) as a:
        with mlp.trace(xs[1]) as b:
            assert torch.equal(mlp.layers[0].output, two[0])
            assert torch.equal(a.layers[0].output, one[0])
            assert torch.equal(b.layers[0].output, two[0])
        assert torch.equal(mlp.layers[1].output, one[1])


def test_two_models_in_lockstep(xs, switch):
    first, second = nnsight.NNsight(toys.MLP(seed=1)), nnsight.NNsight(toys.MLP(seed=2))
    with first.trace(xs[0]), second.trace(xs[0]):
        for one, other in zip(first.layers, second.layers, strict=True):
            other.output = one.output
        out = second.head.input
    assert torch.equal(out, layers_of(first._module, xs[0])[2])


def test_two_wrappers_of_one_module(xs):
    module = toys.MLP()
    first, second = nnsight.NNsight(module), nnsight.NNsight(module)
    with first.trace(xs[0]), second.trace(xs[1]):
        second.layers[0].output = first.layers[0].output
        into = second.layers[1].input
        first.layers[1].skip(xs[2])
        assert torch.equal(first.layers[1].output, xs[2])
    assert torch.equal(into, layers_of(module, xs[0])[0])


def test_generators_that_end_out_of_order(mlp, xs, switch):
    def layers(x):
        with mlp.trace(x) as tracer:
            for layer in tracer.model.layers:
                yield layer.output

    a, b, c = (layers(x) for x in xs[:3])
    firsts = [next(a), next(b), next(c)]
    a.close()
    seconds = [next(b), next(c)]
    b.close()
    thirds = [next(c)]
    expected = [layers_of(mlp._module, x) for x in xs[:3]]
    assert same(firsts, [out[0] for out in expected])
    assert same(seconds, [expected[1][1], expected[2][1]])
    assert same(thirds, [expected[2][2]])
    assert list(c) == []
    with pytest.raises(errors.OutsideTraceError):
        mlp.layers[0].output


def test_a_hundred_runs_of_one_model_at_once(mlp, xs, switch):
    def layers(x):
        with mlp.trace(x) as tracer:
            for layer in tracer.model.layers:
                yield layer.output

    inputs = [xs[i % 8] + i for i in range(100)]
    open_ones = [layers(x) for x in inputs]
    firsts = [next(one) for one in open_ones]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    for i in order:
        rest = list(open_ones[i])
        assert same([firsts[i], *rest], layers_of(mlp._module, inputs[i]))


def test_calling_the_model_in_a_block_is_no_part_of_the_run(mlp, xs, switch):
    one, plain = layers_of(mlp._module, xs[0]), mlp._module(xs[1])
    with mlp.trace(xs[0]):
        mlp.layers[0].output
        assert torch.equal(mlp._module(xs[1]), plain)
        assert torch.equal(mlp(xs[1]), plain)
        assert torch.equal(mlp.layers[1].output, one[1])


# A trace within another model's run


def test_a_trace_in_the_forward_of_another_model(mlp, xs, switch):
    seen = []

    def question(x):
        with mlp.trace(x):
            seen.append(mlp.layers[1].output)
            return mlp.layers[2].output

    outer = nnsight.NNsight(toys.Ask(question))
    plain = outer._module(xs[0])
    with outer.trace(xs[0]) as tracer:
        before = outer.before.output
        after = outer.after.input
        assert torch.equal(tracer.result, plain)
    inner = layers_of(mlp._module, before)
    assert torch.equal(after, inner[2])
    assert torch.equal(seen[-1], inner[1])


def test_a_trace_in_the_forward_of_another_model_stays_open(mlp, xs, switch):
    """The inner run is paused while the outer one is: each goes on with its own."""

    def question(x):
        with mlp.trace(x):
            first = mlp.layers[0].output
            between.inner(first)
            return mlp.layers[1].output

    between = toys.Pair()
    between.inner = toys.seeded(torch.nn.Linear(4, 4), 3)
    module = toys.Ask(question)
    module.between = between
    outer = nnsight.NNsight(module)
    with outer.trace(xs[0]):
        before = outer.before.output
        inner = outer.between.inner.input
        after = outer.after.input
    expected = layers_of(mlp._module, before)
    assert same([inner, after], expected[:2])


def test_a_trace_of_the_model_itself_in_its_forward(xs, switch):
    def question(x):
        if x.shape[0] == 3:
            with model.trace(torch.ones(1, 4)):
                return x + model.before.output
        return x

    model = nnsight.NNsight(toys.Ask(question))
    with model.trace(xs[0]):
        before = model.before.output
        after = model.after.input
    assert torch.equal(after, before + model._module.before(torch.ones(1, 4)))


def test_a_trace_in_a_hook(mlp, xs, switch):
    outer = nnsight.NNsight(toys.Pair())
    expected = layers_of(mlp._module, xs[1])[1]

    def hook(module, args, out):
        with mlp.trace(xs[1]):
            return out + mlp.layers[1].output

    handle = outer._module.first.register_forward_hook(hook)
    with outer.trace(xs[0]):
        second = outer.second.input
    handle.remove()
    assert torch.equal(second, outer._module.first(xs[0]) + expected)


def test_the_models_side_has_no_run_of_its_own(xs, switch):
    """Code of the model that asks for a value of the run that it is part of gets an error, and no deadlock."""

    def question(x):
        with pytest.raises(errors.BlockError):
            model.after.output
        return x

    model = nnsight.NNsight(toys.Ask(question))
    plain = model._module.after(model._module.before(xs[0]))
    with model.trace(xs[0]) as tracer:
        assert torch.equal(tracer.result, plain)


# Context variables


def test_context_variables_are_seen_on_both_sides(xs, switch):
    variable, seen = contextvars.ContextVar("variable", default="nothing"), []

    def question(x):
        seen.append(variable.get())
        variable.set("the model's")
        return x

    model = nnsight.NNsight(toys.Ask(question))
    token = variable.set("the opener's")
    with model.trace(xs[0]):
        variable.set("the block's")
        model.after.input
        assert variable.get() == "the block's"
        variable.set("the block's again")
        model.after.output
    assert variable.get() == "the block's again"
    assert seen == ["the opener's"]
    variable.reset(token)


# Greenlets of the user's (hard case 2: whoever resumes is the one to come back to)


def test_greenlets_of_the_users_interleave_on_one_model(mlp, xs):
    expected = [layers_of(mlp._module, x) for x in xs[:3]]
    seen = [[], [], []]

    def one(i):
        with mlp.trace(xs[i]) as tracer:
            for layer in tracer.model.layers:
                seen[i].append(layer.output)
                main.switch()

    main = greenlet.getcurrent()
    ones = [greenlet.greenlet(one) for _ in range(3)]
    for i, each in enumerate(ones):
        each.switch(i)
    while any(ones):
        for each in ones[::-1]:
            if each:
                each.switch()
    assert all(map(same, seen, expected))


def test_a_run_opened_in_one_greenlet_goes_on_in_another(mlp, xs, switch):
    expected = layers_of(mlp._module, xs[0])
    tracer = mlp.trace(xs[0], trace=True)
    seen, main = [], greenlet.getcurrent()

    def opens():
        tracer.__enter__()
        seen.append(tracer.model.layers[0].output)
        main.switch()
        seen.append(tracer.model.layers[2].output)
        tracer.__exit__(None, None, None)

    first = greenlet.greenlet(opens)
    first.switch()
    greenlet.greenlet(lambda: seen.append(tracer.model.layers[1].output)).switch()
    first.switch()
    assert same(seen, expected)


def test_an_error_of_the_models_comes_to_the_greenlet_that_waits(xs, switch):
    model = nnsight.NNsight(toys.Fails(error=ValueError("the model's own")))
    tracer = model.trace(xs[0], trace=True)
    found = []

    def waits():
        try:
            tracer.model.second.output
        except ValueError as error:
            found.append(str(error))

    tracer.__enter__()
    tracer.model.first.output
    greenlet.greenlet(waits).switch()
    with pytest.raises(errors.BlockError):
        tracer.model.second.output
    tracer.__exit__(None, None, None)
    assert found == ["the model's own"]


class Waits(toys.Pair):
    """Waits for a loop of greenlets, as with eventlet, which becomes the parent of who waits."""

    def __init__(self, loop, ready):
        super().__init__()
        self.ready = ready
        self.wait = loop.switch
        self.loop = loop

    def forward(self, x):
        x = self.first(x)
        here = greenlet.getcurrent()
        here.parent = self.loop
        self.ready.append(here)
        self.wait()
        return self.second(x)


def test_a_model_whose_stack_gets_another_parent_comes_back_to_its_block(xs):
    ready, results = [], []

    def loop():
        while ready:
            ready.pop(0).switch()

    loop = greenlet.greenlet(loop)
    module = Waits(loop, ready)

    def block(x):
        with nnsight.NNsight(module).trace(x) as tracer:
            hidden = tracer.model.first.output
        results.append((hidden, tracer.result))

    ready += [greenlet.greenlet(functools.partial(block, x), loop) for x in xs]
    loop.switch()
    assert len(results) == len(xs)
    for x, (hidden, result) in zip(xs, results, strict=True):
        assert torch.equal(hidden, module.first(x))
        assert torch.equal(result, module.second(hidden))


class GreenThread:
    """What gevent and eventlet put in the place of a thread."""

    ident, is_alive = None, lambda _: True

    def __init__(self, target, **_):
        self.runs = greenlet.greenlet(target)

    def start(self):
        self.ident = id(self)
        self.runs.switch()

    def join(self, timeout):
        pass


class GreenLock:
    """And in that of a lock: who waits for it lets the other side go on."""

    others: greenlet.greenlet | None = None

    def __init__(self):
        self.is_held = False

    def acquire(self):
        while self.is_held:
            GreenLock.others, other = greenlet.getcurrent(), GreenLock.others or greenlet.getcurrent().parent
            other.switch()
        self.is_held = True

    def release(self):
        self.is_held = False


def test_where_greenlets_are_in_the_place_of_threads_a_thread_is_refused(mlp, xs, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG, "switch", "thread")
    monkeypatch.setattr(threading, "Thread", GreenThread)
    monkeypatch.setattr(threading, "Lock", GreenLock)
    with pytest.raises(errors.OtherThreadError, match="put greenlets in their place"), mlp.trace(xs[0]):
        mlp.layers[0].output
    monkeypatch.setattr(nnsight.CONFIG, "switch", "greenlet")
    with mlp.trace(xs[0]):
        assert same([layer.output for layer in mlp.layers], layers_of(mlp._module, xs[0]))


def test_threads_that_ask_for_operations_of_one_module_at_the_same_moment_share_its_rewritten_forward(
    mlp, xs, monkeypatch
):
    made = operations.Rewritten.__init__

    def made_slowly(self, module):
        made(self, module)
        time.sleep(0.02)

    monkeypatch.setattr(operations.Rewritten, "__init__", made_slowly)
    up, seen = mlp._module.layers[1].up, {}
    expected = [up(mlp._module.layers[1].norm(layers_of(mlp._module, x)[0])) for x in xs]

    def job(at):
        with mlp.trace(xs[at]):
            seen[at] = mlp.layers[1].source.self_up_0.output
            time.sleep(0.005 * at)

    run_all(*(functools.partial(job, at) for at in range(len(xs))))
    assert same([seen[at] for at in range(len(xs))], expected)
    assert "forward" not in vars(mlp._module.layers[1])
