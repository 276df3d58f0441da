"""The laws on an accelerator, and on the CPU as well.

`pytest -k accelerator` runs what needs one, in this file and in others; where there is none, that is skipped.
"""

import contextlib
import gc
import linecache
import threading

import programs
import programs_edits
import programs_gradients
import programs_rows
import programs_source
import programs_steps
import pytest
import snapshots
import torch

import nnsight
import toys

KINDS = {
    "one block": programs,
    "steps": programs_steps,
    "rows": programs_rows,
    "edits": programs_edits,
    "gradients": programs_gradients,
    "source": programs_source,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_equal_plain_torch_hooks(kind, device, switch, monkeypatch):
    """Bit for bit, but for gradients that are added up in another order: those of rows, and those on a thread."""
    monkeypatch.setattr(programs, "DEVICE", device)
    of = KINDS[kind]
    grads = programs.equal if switch == "greenlet" and kind != "rows" else programs.close
    if (kind, switch) == ("gradients", "thread"):
        pytest.skip("even which of them come first is counted per thread")
    for seed in range(20_000, 20_060):
        program = of.program(seed)
        name, source = f"<{of.__name__} {seed}>", program.source()
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # where `with` blocks are found
        expected = of.with_hooks(of.module_of(seed).to(device), program)
        module = of.module_of(seed).to(device)
        got = of.with_trace(nnsight.NNsight(module), module, program, nnsight.errors)
        wrong = programs.difference(expected, got, grads)
        assert not wrong, f"seed {seed}, hooks / trace: {wrong}\n\non {module}\n\n{source}"
        assert expected.given.device == device


@pytest.mark.parametrize("name", sorted(toys.everything()))
def test_writing_back_what_was_read_changes_nothing(name, device, x, switch):
    module, x = toys.everything()[name].to(device), x.to(device)
    called, plain = [], module(x)
    handles = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in module.modules()]
    module(x)
    for handle in handles:
        handle.remove()
    model = nnsight.NNsight(module)
    paths = {part: path for path, part in module.named_modules() if path}
    for path in [paths[part] for part in dict.fromkeys(called) if part in paths]:
        with model.trace(x) as tracer:
            model[path].inputs = model[path].inputs
            model[path].output = model[path].output
            out = tracer.result
        assert torch.equal(out, plain)


# What a run leaves behind.


def reads(model, x):
    with model.trace(x) as tracer:
        tracer.cache(device=None)
        model.layers[0].output
        model.layers[1].act.input


def writes(model, x):
    with model.trace(x):
        model.layers[0].input = x
        model.layers[1].skip(model.layers[1].input * 2)
        model.layers[2].output[:] = 0


def differentiates(model, x):
    with model.trace(x):
        hidden = model.layers[1].output
        loss = model.output.square().sum()
        nnsight.grad(loss, [hidden], retain_graph=True)
        with loss.backward():
            hidden.grad
    model._module.zero_grad()


def fails(model, x):
    with contextlib.suppress(RuntimeError), model.trace(x):
        model.layers[1].output = x[:, :1]
        model.output


def stops(model, x):
    with model.trace(x) as tracer:
        model.layers[0].output
        tracer.stop()


def is_dropped(model, x):
    def block():
        with model.trace(x):
            yield model.layers[1].output

    next(block())


WAYS = [reads, writes, differentiates, fails, stops, is_dropped]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_run_changes_neither_the_model_nor_what_is_current(way, device, x, switch):
    model, x = nnsight.NNsight(toys.MLP().to(device)), x.to(device)
    way(model, x)
    tree, process = snapshots.of_model(model._module), snapshots.of_process()
    way(model, x)
    assert snapshots.differences(tree, snapshots.of_model(model._module)) == []
    assert snapshots.differences(process, snapshots.of_process()) == []


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_memory_of_the_accelerator_is_flat(way, accelerator):
    model, x = nnsight.NNsight(toys.MLP(width=256).to(accelerator)), torch.randn(64, 256).to(accelerator)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            way(model, x)
        before = torch.accelerator.memory_allocated()
        for _ in range(200):
            way(model, x)
        assert torch.accelerator.memory_allocated() == before > 0
    finally:
        gc.enable()


# Values.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_equal_plain_torch_hooks(dtype, device, x, switch):
    module, x, seen = toys.MLP().to(device, dtype), x.to(device, dtype), []
    handle = module.layers[1].register_forward_hook(lambda _, args, out: seen.append((args[0], out)) or out * 3)
    expected = module(x)
    handle.remove()
    model = nnsight.NNsight(module)
    with model.trace(x) as tracer:
        into, out = model.layers[1].input, model.layers[1].output
        model.layers[1].output = out * 3
        assert torch.equal(tracer.result, expected)
    assert torch.equal(into, seen[0][0])
    assert torch.equal(out, seen[0][1])
    assert (out.device, out.dtype) == (device, dtype)


def test_autocast_is_of_one_side_and_so_is_what_it_has_cast(device, x, switch):
    """Autocast keeps weights that it has cast, whatever to; the block casts those that the model needs in its dtype."""
    module, x = toys.Under(lambda: torch.autocast(device.type, dtype=torch.bfloat16)).to(device), x.to(device)
    model, expected = nnsight.NNsight(module), module(x)
    with model.trace(x):
        assert model.child.output.dtype == torch.bfloat16
        assert model.before(x).dtype == torch.float32
    with model.trace(x) as tracer, torch.autocast(device.type, dtype=torch.float16):
        assert model.before.output.dtype == torch.float32
        assert model.child(x).dtype == torch.float16
        assert model.child.output.dtype == torch.bfloat16
        assert model.child(x).dtype == torch.float16
        assert torch.equal(tracer.result, expected)


def test_so_it_is_for_blocks_that_are_carried(device, x):
    module, x = toys.Under(lambda: torch.autocast(device.type, dtype=torch.bfloat16)).to(device), x.to(device)
    model, expected = nnsight.NNsight(module), module(x)

    def casts(model, into):
        with torch.autocast(device.type, dtype=torch.float16):
            assert model.child(into).dtype == torch.float16
            assert model.child.output.dtype == torch.bfloat16
            assert model.child(into).dtype == torch.float16

    with model.trace() as tracer:
        for part in (x[:1], x[1:]):
            with tracer.invoke(part):
                casts(model, model.before.output)
        with tracer.invoke():
            out = model.output
    assert torch.equal(out, expected)
    assert torch.equal(model.edit(lambda edited: casts(edited, edited.before.output))(x), expected)


def test_what_the_model_has_cast_stays_where_the_block_casts_nothing(device, x):
    """The gradient of a weight that is used again is added up in the dtype that it was cast to, as without a trace."""

    class Again(toys.Under):
        def forward(self, x):
            with self.manager():
                return self.child(self.child(self.child(x))).float()

    def gradient(module, run):
        module.zero_grad()
        run().square().sum().backward()
        return module.child.weight.grad.clone()

    module, x = Again(lambda: torch.autocast(device.type, dtype=torch.bfloat16)).to(device), x.to(device)
    model = nnsight.NNsight(module)

    def traced(model=model):
        with model.trace(x) as tracer:
            model.child.input
            model.child.next().output
            return tracer.result

    expected = gradient(module, lambda: module(x))
    edited = model.edit(lambda edited: [edited.child.input, edited.child.output])
    for run in (traced, lambda: traced(edited), lambda: edited(x)):
        assert torch.equal(gradient(module, run), expected)


def test_gradients_equal_those_by_hand(device, x, switch):
    module, x = toys.MLP().to(device), x.to(device)
    kept = []
    handles = [layer.register_forward_hook(lambda _, __, out: kept.append(out)) for layer in module.layers]
    expected = torch.autograd.grad(module(x).square().sum(), kept)
    for handle in handles:
        handle.remove()
    model = nnsight.NNsight(module)
    with model.trace(x):
        hidden = [layer.output for layer in model.layers]
        loss = model.output.square().sum()
        asked = nnsight.grad(loss, hidden, retain_graph=True)
        with loss.backward():
            in_order = [each.grad for each in reversed(hidden)]
    for one, other, third in zip(expected, asked, reversed(in_order), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_caches_keep_values_where_they_are_asked_to(device, switch):
    model, x = nnsight.NNsight(toys.MLP(width=256).to(device)), torch.randn(2048, 256).to(device)
    with torch.no_grad(), model.trace(x) as tracer:
        here, half_here = tracer.cache(device=None), tracer.cache(device=None, dtype=torch.float16)
        away, late = tracer.cache(), tracer.cache(non_blocking=True)
        half_late = tracer.cache(non_blocking=True, dtype=torch.float16)
        back = tracer.cache(device=device, non_blocking=True)
    for path in here:
        assert here[path].output.device == back[path].output.device == device
        assert {cache[path].output.device.type for cache in (away, late, half_late)} == {"cpu"}
        assert torch.equal(half_late[path].output, half_here[path].output.cpu())
        for cache in (away, late, back):
            assert torch.equal(cache[path].output.cpu(), here[path].output.cpu())


def test_a_copy_that_is_not_waited_for_needs_no_accelerator(mlp, x):
    with mlp.trace(x) as tracer:
        cache = tracer.cache("head", device="meta", non_blocking=True)
    assert cache.head.output.is_meta


def test_a_write_on_another_device_is_torchs_error_and_names_the_line_and_both_devices(device, x, switch):
    model, x = nnsight.NNsight(toys.MLP().to(device)), x.to(device)
    other = torch.device("meta" if device.type == "cpu" else "cpu")
    with pytest.raises(RuntimeError, match="device") as caught, model.trace(x):
        model.layers[0].output = torch.zeros(3, 4, device=other)  # the line
        model.output
    note = "\n".join(caught.value.__notes__)
    assert "device=other)  # the line" in note
    assert f"with [3, 4] float32 {other}, where the model had [3, 4] float32 {device}" in note
    with model.trace(x) as tracer:
        assert torch.equal(tracer.result, model._module(x))


def test_threads_trace_side_by_side(device, switch):
    module, failed = toys.MLP(width=64).to(device), []
    model = nnsight.NNsight(module)

    def work(number):
        try:
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(number)).to(device)
            expected = module.head(module.layers[2](module.layers[1](module.layers[0](module.embed(x)) * number)))
            for _ in range(20):
                with model.trace(x) as tracer:
                    model.layers[0].output = model.layers[0].output * number
                    assert torch.equal(tracer.result, expected)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
