"""Law 5: any Python that is allowed in a block works in it."""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import pickle
import sys
import textwrap

import pytest
import torch

import nnsight
import toys

GLOBAL = "before"


@pytest.fixture
def outs(mlp, x):
    """What the layers give when nobody looks."""
    seen = []
    handles = [layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in mlp._module.layers]
    mlp._module(x)
    for handle in handles:
        handle.remove()
    return seen


def test_return(mlp, x, outs, switch):
    def layer(i):
        with mlp.trace(x):
            return mlp.layers[i].output
        raise AssertionError

    assert torch.equal(layer(1), outs[1])


def test_break_and_continue_and_else(mlp, x, outs):
    seen = []
    with mlp.trace(x):
        for i, layer in enumerate(mlp.layers):
            if i == 0:
                continue
            seen.append(layer.output)
            if i == 1:
                break
        else:
            raise AssertionError
    for i in range(3):
        with mlp.trace(x):
            if i == 1:
                continue
            seen.append(mlp.layers[i].output)
            if i == 2:
                break
    assert [any(torch.equal(a, b) for b in outs) for a in seen] == [True] * 3
    assert torch.equal(seen[0], outs[1])


def test_while(mlp, x, outs):
    with mlp.trace(x):
        i = 0
        while i < 3:
            seen = mlp.layers[i].output
            i += 1
    assert torch.equal(seen, outs[2])


def test_try_except_else_finally_as_the_first_statement(mlp, x, outs, switch):
    order = []
    with mlp.trace(x):
        try:
            first = mlp.layers[0].output
            raise KeyError("mine")
        except KeyError:
            order.append("except")
            second = mlp.layers[1].output
        else:
            order.append("else")
        finally:
            order.append("finally")
            third = mlp.layers[2].output
    assert order == ["except", "finally"]
    assert all(map(torch.equal, (first, second, third), outs))


def test_yield(mlp, x, outs, switch):
    def layers():
        with mlp.trace(x):
            for layer in mlp.layers:
                yield layer.output

    assert all(map(torch.equal, layers(), outs))


def test_yield_from_and_send(mlp, x, outs):
    def inner():
        sent = yield mlp.layers[0].output
        return sent

    def outer():
        with mlp.trace(x):
            sent = yield from inner()
            yield sent, mlp.layers[1].output

    generator = outer()
    assert torch.equal(next(generator), outs[0])
    sent, second = generator.send("sent")
    assert sent == "sent"
    assert torch.equal(second, outs[1])
    generator.close()


def test_one_line(mlp, x, outs):
    with mlp.trace(x): seen = mlp.layers[0].output; more = mlp.layers[1].output  # fmt: skip  # noqa: E701, E702
    assert torch.equal(seen, outs[0])
    assert torch.equal(more, outs[1])


def test_comprehensions(mlp, x, outs, switch):
    with mlp.trace(x):
        listed = [layer.output for layer in mlp.layers]
    with mlp.trace(x):
        named = {i: layer.output for i, layer in enumerate(mlp.layers)}
    with mlp.trace(x):
        lazy = list(layer.output for layer in mlp.layers)  # noqa: C400
    with mlp.trace(x):
        mapped = list(map(lambda layer: layer.output, mlp.layers))  # noqa: C417
    for seen in (listed, list(named.values()), lazy, mapped):
        assert all(map(torch.equal, seen, outs))


def test_lambda_nested_function_and_class_body(mlp, x, outs):
    with mlp.trace(x):
        first = (lambda: mlp.layers[0].output)()

        def second():
            return mlp.layers[1].output

        class Third:
            value = second()
            last = mlp.layers[2].output

    assert all(map(torch.equal, (first, Third.value, Third.last), outs))


def test_decorators_partial_and_recursion(mlp, x, outs):
    with mlp.trace(x):

        @functools.lru_cache
        def layer(i):
            return ([*layer(i - 1)] if i else []) + [mlp.layers[i].output]

        seen = functools.partial(layer, 2)()
    assert all(map(torch.equal, seen, outs))


def test_async_function(mlp, x, outs, switch):
    async def layers():
        seen = []
        with mlp.trace(x):
            for layer in mlp.layers:
                seen.append(layer.output)
                await asyncio.sleep(0)
        return seen

    assert all(map(torch.equal, asyncio.run(layers()), outs))


def test_async_generator_and_async_with(mlp, x, outs):
    @contextlib.asynccontextmanager
    async def traced():
        with mlp.trace(x) as tracer:
            yield tracer

    async def layers():
        async with traced() as tracer:
            for layer in tracer.model.layers:
                yield layer.output

    async def collect():
        return [out async for out in layers()]

    assert all(map(torch.equal, asyncio.run(collect()), outs))


def test_walrus_del_star_and_augmented_assignment(mlp, x, outs):
    with mlp.trace(x):
        if (first := mlp.layers[0].output).shape == (3, 4):
            total = first.clone()
        gone = 1
        del gone
        total += mlp.layers[1].output
        head, *rest = mlp.layers[2].output
    assert "gone" not in locals()
    assert torch.equal(total, outs[0] + outs[1])
    assert torch.equal(torch.stack([head, *rest]), outs[2])


def test_augmented_assignment_to_a_port(mlp, x, outs):
    with mlp.trace(x):
        mlp.layers[0].output += 1
        seen = mlp.layers[1].input
    assert torch.equal(seen, outs[0] + 1)


def test_global_and_nonlocal(mlp, x, outs):
    kept = None

    def inner():
        global GLOBAL
        nonlocal kept
        with mlp.trace(x):
            GLOBAL = mlp.layers[0].output
            kept = mlp.layers[1].output

    inner()
    assert torch.equal(GLOBAL, outs[0])
    assert torch.equal(kept, outs[1])


def test_names_bound_before_changed_inside_and_new(mlp, x, outs):
    before, changed, untouched = "before", "changed", "untouched"
    with mlp.trace(x):
        changed = mlp.layers[0].output
        new = before
    assert (before, untouched, new) == ("before", "untouched", "before")
    assert torch.equal(changed, outs[0])


def test_match(mlp, x, outs):
    with mlp.trace(x):
        match mlp.layers[0].output:
            case torch.Tensor(shape=(3, 4)) as seen:
                pass
            case _:
                raise AssertionError
    assert torch.equal(seen, outs[0])


def test_import_exec_and_eval(mlp, x, outs):
    with mlp.trace(x):
        import math

        space = {"mlp": mlp}
        exec("seen = mlp.layers[0].output", space)
        second = eval("mlp.layers[1].output")
    assert math.pi > 3
    assert torch.equal(space["seen"], outs[0])
    assert torch.equal(second, outs[1])


def test_assert_raise_from_and_format(mlp, x):
    with pytest.raises(ValueError, match="shape") as caught, mlp.trace(x):
        try:
            assert mlp.layers[0].output.shape == (1, 1), f"{mlp.layers[0].output.shape}"
        except AssertionError as error:
            raise ValueError("shape") from error
    assert "[3, 4]" in str(caught.value.__cause__)


def test_other_managers_before_inside_and_after(mlp, x, outs, switch):
    with torch.no_grad(), mlp.trace(x), contextlib.nullcontext(3) as three:
        first = mlp.layers[0].output
        with contextlib.suppress(KeyError):
            raise KeyError
        with torch.enable_grad():
            assert torch.is_grad_enabled()
        second = mlp.layers[1].output
    assert three == 3
    assert not first.requires_grad
    assert torch.equal(second, outs[1])


def test_an_exit_stack_and_entering_by_hand(mlp, x, outs):
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(mlp.trace(x))
        first = tracer.model.layers[0].output
    tracer = mlp.trace(x)
    tracer.__enter__()
    second = tracer.model.layers[1].output
    tracer.__exit__(None, None, None)
    assert torch.equal(first, outs[0])
    assert torch.equal(second, outs[1])


def test_a_manager_that_holds_a_trace(mlp, x, outs):
    @contextlib.contextmanager
    def steered(value):
        with mlp.trace(x) as tracer:
            mlp.layers[0].output = value
            yield tracer

    class Traced:
        def __enter__(self):
            self.tracer = mlp.trace(x)
            return self.tracer.__enter__()

        def __exit__(self, *error):
            return self.tracer.__exit__(*error)

    with steered(torch.zeros(3, 4)):
        assert torch.equal(mlp.layers[1].input, torch.zeros(3, 4))
    with Traced():
        seen = mlp.layers[1].output
    assert torch.equal(seen, outs[1])


def test_helpers_that_read_for_the_block(mlp, x, outs):
    def helper(i):
        return mlp.layers[i].output

    with mlp.trace(x):
        seen = [helper(i) for i in range(3)]
    assert all(map(torch.equal, seen, outs))


def test_variables_are_objects_of_their_own_and_save_returns_its_object(mlp, x):
    with mlp.trace(x):
        value = mlp.layers[0].output
        assert value.save() is value
        assert nnsight.save(value) is value
        kept = list().save()  # noqa: C408
        kept.append(value)
        several = ({}.save(), (1,).save(), {1}.save(), (2).save(), (0.5).save(), True.save(), "s".save())  # type: ignore[attr-defined]
        nothing = nnsight.save(None)
    assert kept[0] is value
    assert several == ({}, (1,), {1}, 2, 0.5, True, "s")
    assert nothing is None
    assert type(value) is torch.Tensor


def test_values_that_were_not_saved_are_still_there(mlp, x, outs):
    with mlp.trace(x):
        seen = mlp.layers[0].output
        number = seen.sum().item()
    assert torch.equal(seen, outs[0])
    assert number == outs[0].sum().item()


def test_deepcopy_and_pickle_in_a_block(mlp, x, outs, switch):
    with mlp.trace(x):
        mlp.layers[0].output
        twin = copy.deepcopy(mlp._module)
        again = pickle.loads(pickle.dumps(mlp._module))
        second = mlp.layers[1].output
    assert torch.equal(second, outs[1])
    assert torch.equal(twin(x), mlp._module(x))
    assert torch.equal(again(x), mlp._module(x))


def test_dataclass_property_and_dict_of_the_users(mlp, x, outs):
    @dataclasses.dataclass
    class Reader:
        kept: dict = dataclasses.field(default_factory=dict)

        @property
        def first(self):
            return self.kept.setdefault("first", mlp.layers[0].output)

    with mlp.trace(x):
        reader = Reader()
        seen = reader.first
        assert reader.first is seen
    assert torch.equal(seen, outs[0])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="except* is from 3.11 on")
def test_exception_groups(mlp, x, outs):
    space = {"mlp": mlp, "x": x}
    exec(
        textwrap.dedent(
            """
            with mlp.trace(x):
                try:
                    raise ExceptionGroup("two", [KeyError(1), ValueError(2)])
                except* KeyError:
                    first = mlp.layers[0].output
                except* ValueError:
                    second = mlp.layers[1].output
            """
        ),
        space,
    )
    assert torch.equal(space["first"], outs[0])
    assert torch.equal(space["second"], outs[1])


def test_source_that_no_file_has(mlp, x, outs):
    space = {"mlp": mlp, "x": x}
    exec(compile("with mlp.trace(x):\n    seen = mlp.layers[0].output\n", "<nowhere>", "exec"), space)
    exec("def f():\n  with mlp.trace(x): return mlp.layers[1].output", space)
    assert torch.equal(space["seen"], outs[0])
    assert torch.equal(space["f"](), outs[1])


def test_print_and_input_as_usual(mlp, x, capsys):
    with mlp.trace(x):
        print("before", end=" ")
        mlp.layers[0].output
        print("after")
    assert capsys.readouterr().out == "before after\n"


def test_a_block_that_asks_for_nothing_runs_the_model_once(x):
    model = nnsight.NNsight(toys.Finally())
    with model.trace(x):
        pass
    assert model._module.log == ["entered", "left"]


def test_nothing_runs_before_the_first_question(x):
    model = nnsight.NNsight(toys.Finally())
    with model.trace(x):
        assert model._module.log == []
        model.first.output
        assert model._module.log == ["entered"]
    assert model._module.log == ["entered", "left"]


def test_a_plain_call_is_told_apart_from_a_with(mlp, x):
    assert torch.equal(mlp.trace(x, trace=False), mlp._module(x))
    assert torch.equal(mlp(x), mlp._module(x))
    tracer = mlp.trace(x, trace=True)
    with tracer:
        seen = mlp.head.output
    assert torch.equal(seen, mlp._module(x))


def test_one_block_after_another_and_the_same_line_again(mlp, x, outs):
    for _ in range(3):
        with mlp.trace(x) as tracer:
            seen = mlp.layers[1].output
        assert torch.equal(seen, outs[1])
    assert tracer is not None
