"""What goes wrong in the existing package, by the numbers of `PEER.md`, and what happens here instead.

Its section 3.1 numbers the defects; "subtle" are those of its section 2, and more of them in `test_peer_subtleties.py`.
"""

import contextlib
import subprocess
import sys
import threading
import traceback
from types import SimpleNamespace

import pytest
import torch

import nnsight
import toys
from nnsight import LanguageModel, NNsight

PROMPT = "The Eiffel Tower is in the city of"


def python(script):
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_3_1_01_a_name_alone_is_enough_and_a_loaded_module_finds_its_tokenizer():
    lazy = LanguageModel("nnsight/demo")
    assert lazy.device == torch.device("meta")
    with lazy.trace(PROMPT):
        token = lazy.lm_head.output[0, -1].argmax()
    again = LanguageModel(lazy._module)
    assert again.tokenizer.decode(token) == " Paris"


def test_3_1_02_a_loop_whose_steps_read_nothing_ends(demo):
    with demo.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        for step in tracer.iter[:]:
            if step in (0, 2):
                demo.lm_head.output
        result = tracer.result
    assert result.shape[1] == 16


def test_3_1_03_names_of_a_block_are_the_users_own_whatever_is_saved(mlp, x):
    kept = "before"
    with mlp.trace(x):
        a = (2).save()
        b = 2
        torch.rand(3).save()
        y = torch.rand(3)
        kept = "after"
    assert (a, b, kept) == (2, 2, "after")
    assert y.shape == (3,)


def test_3_1_04_a_loss_without_axes_is_shared_by_the_rows(demo):
    ids = torch.tensor([demo.tokenizer.encode(PROMPT), demo.tokenizer.encode(PROMPT)[::-1]])
    with demo.trace(ids, labels=ids) as tracer:
        a, b = tracer.rows
        losses = a.output.loss, b.output.loss, tracer.result.loss
    assert losses[0].shape == ()
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[2])


def test_3_1_04_a_loss_without_axes_is_shared_by_the_invokes(demo):
    one, other = (
        torch.tensor([demo.tokenizer.encode(prompt)]) for prompt in (PROMPT, "The Colosseum is in the city of")
    )
    with demo.trace() as tracer:
        with tracer.invoke(one, labels=one):
            first = demo.output.loss
        with tracer.invoke(other, labels=other):
            second, logits = demo.output.loss, demo.output.logits
    assert first.shape == ()
    assert torch.equal(first, second)
    assert logits.shape[:2] == (1, 10)


def test_3_1_05_a_row_has_its_own_beams_and_no_others(demo):
    prompts = [PROMPT, "The Colosseum is in the city of"]
    with demo.generate(prompts, max_new_tokens=2, min_new_tokens=2, num_beams=3) as (a, b):
        shapes = [row.transformer.h[1].mlp.output.shape[:2] for row in (a, b)]
    assert shapes == [(3, 12), (3, 10)]


def test_3_1_05_an_invoke_has_its_own_beams_and_sequences(demo):
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "num_beams": 3, "num_return_sequences": 2}
    shapes = []
    with demo.generate(**options) as tracer:
        for prompt in (PROMPT, "The Colosseum is in the city of"):
            with tracer.invoke(prompt):
                shapes.append([demo.transformer.h[1].mlp.output.shape[:2], tracer.result.shape[0]])
    assert shapes == [[(3, 12), 2], [(3, 10), 2]]


def test_3_1_06_retain_grad_and_autograd_grad_work_in_an_invoke(demo):
    with demo.trace() as tracer:
        with tracer.invoke(PROMPT):
            hidden = demo.transformer.h[5].mlp.output
            hidden.retain_grad()
            loss = demo.lm_head.output[0, -1].max()
            loss.backward(retain_graph=True)
            kept = hidden.grad.clone()
            (by_function,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        with tracer.invoke("The Colosseum is in the city of"):
            demo.transformer.h[5].mlp.output
    assert torch.equal(kept, by_function)
    assert by_function.any()


def test_3_1_06_retain_grad_and_autograd_grad_work_on_a_row(demo):
    with demo.trace([PROMPT, "The Colosseum is in the city of"]) as (a, b):
        hidden = a.transformer.h[5].mlp.output
        hidden.retain_grad()
        other = b.transformer.h[5].mlp.output
        loss = a.lm_head.output[0, -1].max()
        loss.backward(retain_graph=True)
        kept = hidden.grad.clone()
        (by_function,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        (of_other,) = torch.autograd.grad(b.lm_head.output[0, -1].max(), other)
    assert torch.equal(kept, by_function)
    assert by_function.any()
    assert of_other.any()


def test_3_1_07_a_second_context_manager_in_the_same_with_is_in_force(mlp, x):
    with mlp.trace(x), torch.no_grad():
        assert not torch.is_grad_enabled()
        inner = mlp.layers[0].output * 2
    assert not inner.requires_grad
    assert torch.is_grad_enabled()


def test_3_1_08_generate_with_trace_false_is_a_plain_call(demo):
    plain = demo.generate(PROMPT, max_new_tokens=2, trace=False)
    assert torch.equal(plain, demo.generate(PROMPT, max_new_tokens=2))


def test_3_1_09_one_model_nested_in_itself_and_in_two_threads(mlp, x):
    with mlp.trace(x):
        outer = mlp.layers[0].output
        with mlp.trace(2 * x):
            inner = mlp.layers[1].output
        late = mlp.layers[1].output
    assert not torch.equal(inner, late)
    found = {}

    def job(scale):
        with mlp.trace(scale * x):
            found[scale] = mlp.layers[0].output

    jobs = [threading.Thread(target=job, args=(scale,)) for scale in (1, 2, 3)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    assert torch.equal(found[1], outer)
    assert len({value.sum().item() for value in found.values()}) == 3


def test_3_1_10_a_negative_end_and_a_stride_mean_what_they_mean_in_python(demo):
    for key, steps in ((slice(None, -1), [0, 1, 2]), (slice(0, 4, 2), [0, 2])):
        with demo.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
            assert list(tracer.iter[key]) == steps


@pytest.mark.filterwarnings("error")
def test_3_1_11_what_follows_a_loop_over_all_steps_runs_without_a_warning(demo):
    with demo.generate(PROMPT, max_new_tokens=3) as tracer:
        for _step in tracer.iter[:]:
            demo.lm_head.output
        after = "ran"
    assert after == "ran"


def test_3_1_12_an_error_of_the_model_s_comes_with_a_short_traceback(demo):
    with pytest.raises(RuntimeError) as caught, demo.trace(PROMPT):
        demo.transformer.h[3].output = torch.zeros(1, 12, 7)
        demo.lm_head.output
    lines = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert lines[0] == "test_3_1_12_an_error_of_the_model_s_comes_with_a_short_traceback"
    assert "_call_impl" not in lines
    assert "transformer.h.3.output" in caught.value.__notes__[0]


class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_3_1_13_past_and_never_called_are_two_errors_that_name_the_earlier_line():
    model = NNsight(toys.Ask(lambda x: x))
    with (
        pytest.raises(nnsight.errors.AlreadyPastError, match=r"read at test_peer_defects.py"),
        model.trace(torch.ones(1, 4)),
    ):
        model.before.output
        model.after.output
        model.before.output
    model = NNsight(Half())
    with pytest.raises(nnsight.errors.NeverCalledError, match="`used`"), model.trace(torch.ones(1, 4)):
        model.unused.output


def test_3_1_14_bodies_that_begin_with_try_or_stand_on_one_line_or_return(mlp, x):
    with mlp.trace(x):
        try:  # noqa: SIM105
            mlp.layers[0].output
        except ValueError:
            pass
    with mlp.trace(x): value = mlp.layers[0].output  # noqa: E701  # fmt: skip

    def returns():
        with mlp.trace(x):
            return mlp.layers[0].output

    def yields():
        with mlp.trace(x):
            yield mlp.layers[0].output

    for _ in range(2):
        with mlp.trace(x):
            broken = mlp.layers[0].output
            break
    assert all(torch.equal(value, other) for other in (returns(), next(yields()), broken))


def test_3_1_15_a_module_whose_operations_were_read_compiles_as_before(mlp, x):
    plain = mlp._module(x)
    with mlp.trace(x):
        mlp.layers[0].source.self_norm_0.output
    compiled = torch.compile(mlp._module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), plain)


def test_3_1_16_what_can_t_be_an_input_is_never_ignored(demo):
    for args, kwargs in (((PROMPT, PROMPT), {}), ((PROMPT,), {"no_such_option": 1})):
        with pytest.raises(nnsight.errors.InputError):
            demo.trace(*args, **kwargs)


def test_3_1_17_an_empty_prompt_and_an_index_beyond_the_end(demo):
    with pytest.raises(nnsight.errors.InputError, match=r"empty|no token"):
        demo.trace("")
    with pytest.raises(IndexError, match="12 children"):
        demo.transformer.h[99]


def test_3_1_18_global_is_python_s_global():
    script = """
import torch, nnsight
model = nnsight.NNsight(torch.nn.Linear(2, 2))
def block():
    global found
    with model.trace(torch.ones(1, 2)):
        found = model.output
block()
print(found.shape)
"""
    assert python(script) == "torch.Size([1, 2])\n"


def test_3_1_19_stop_in_one_block_leaves_the_other_right(mlp, x):
    with mlp.trace(x) as a:
        with mlp.trace(x) as b:
            b.layers[0].output
            b.stop()
        value = a.layers[2].output
    with mlp.trace(x):
        expected = mlp.layers[2].output
    assert torch.equal(value, expected)


def test_3_1_19_stop_in_one_invoke_leaves_the_other_right(demo):
    with demo.trace() as tracer:
        with tracer.invoke(PROMPT):
            demo.transformer.h[0].mlp.output
            tracer.stop()
        with tracer.invoke("The Colosseum is in the city of"):
            value = demo.lm_head.output[0, -1]
    with demo.trace("The Colosseum is in the city of"):
        torch.testing.assert_close(value, demo.lm_head.output[0, -1], rtol=1e-4, atol=1e-4)


def test_3_1_20_values_read_before_an_error_are_kept(mlp, x):
    with contextlib.suppress(KeyError), mlp.trace(x):
        value = mlp.layers[0].output.save()
        raise KeyError
    assert value.shape[0] == 3


def test_3_1_21_inner_values_of_a_hooked_call_are_read_in_the_same_block(mlp, x):
    mlp.extra = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    with mlp.trace(x):
        out = mlp.extra(torch.ones(1, 8), hook=True)
        inner = mlp.extra[0].output
    assert torch.equal(out, inner.relu())


def test_3_1_22_a_value_of_another_invoke_stands_on_the_right_hand_side_of_a_write(demo):
    with demo.trace() as tracer:
        with tracer.invoke(PROMPT):
            c = demo.transformer.h[2].mlp.output[:, -1]
        with tracer.invoke("The Colosseum is in the city of"):
            demo.transformer.h[3].mlp.output[:, -1] = c
            seen = demo.transformer.h[3].mlp.output[:, -1].clone()
    assert torch.equal(seen, c)


def test_3_1_23_wrapping_touches_nothing_on_the_module():
    module = toys.MLP()
    before = [dict(vars(part)) for part in module.modules()]
    model = NNsight(module)
    list(model.modules())
    assert [dict(vars(part)) for part in module.modules()] == before


def test_3_1_24_anyio_works_after_the_import_and_after_a_trace():
    script = """
import anyio, torch, nnsight
model = nnsight.NNsight(torch.nn.Linear(2, 2))
with model.trace(torch.ones(1, 2)):
    model.output
anyio.run(anyio.sleep, 0)
print(hasattr(object, "save"))
"""
    assert python(script) == "False\n"


def test_3_1_25_an_operation_taken_before_the_weights_is_good_after():
    model = LanguageModel("nnsight/demo")
    operation = model.transformer.h[0].attn.source.self_c_attn_1
    model.dispatch()
    with model.trace(PROMPT):
        value = operation.output
    assert value.shape == (1, 12, 3 * 128)


def test_3_1_26_a_user_s_own_hook_is_seen_in_output(mlp, x):
    handle = mlp._module.layers[0].register_forward_hook(lambda _module, _args, output: output + 100)
    with mlp.trace(x):
        value = mlp.layers[0].output
    handle.remove()
    with mlp.trace(x):
        assert torch.equal(mlp.layers[0].output + 100, value)


def test_subtle_2_4_two_items_of_one_with_and_a_helper_that_yields_inside_a_trace(mlp, x):
    @contextlib.contextmanager
    def traced():
        with mlp.trace(x) as tracer:
            yield tracer

    with traced() as tracer:
        value = tracer.layers[0].output
    place = SimpleNamespace()
    with mlp.trace(x):
        place.value = mlp.layers[0].output
        del tracer
    assert torch.equal(value, place.value)


def test_subtle_2_10_an_error_leaves_the_model_usable_and_the_other_run_alone(mlp, x):
    with mlp.trace(x) as a:
        with contextlib.suppress(RuntimeError), mlp.trace(x) as b:
            b.layers[0].output = torch.zeros(2, 99)
            b.layers[1].output
        assert a.layers[1].output.shape[0] == 3


def test_subtle_2_12_what_is_saved_is_the_value_itself(mlp, x):
    with mlp.trace(x):
        saved = mlp.layers[0].output.save()
        saved[:] = 0
    assert not saved.any()


def test_subtle_2_14_a_deleted_model_is_freed_at_once(x):
    import gc
    import weakref

    gc.disable()
    try:
        model = NNsight(toys.MLP())
        with model.trace(x):
            model.layers[0].output
        watched = weakref.ref(model._module)
        del model
        assert watched() is None
    finally:
        gc.enable()


def test_what_this_package_doesn_t_have_is_answered_with_one_line(demo):
    for name in ("deprecated", "VLLM", "list", "apply"):
        with pytest.raises(AttributeError, match=rf"has no attribute '{name}'\. [A-Z]"):
            getattr(nnsight, name)
    with pytest.raises(AttributeError, match="pipeline is not a trace"):
        demo.pipe(PROMPT)
    with pytest.raises(AttributeError, match="no backend to choose"), demo.trace(PROMPT) as tracer:
        tracer.backend
    with pytest.raises(nnsight.errors.InputError, match="no backend to choose"):
        demo.edit(backend=print)
    with pytest.raises(nnsight.errors.InputError, match="There is no such option"):
        demo.edit(inplce=True)
    for home, name in (
        ("nnsight", "deprecated"),
        ("nnsight.modeling.vllm", "VLLM"),
        ("nnsight.intervention.envoy", "traceable"),
    ):
        with pytest.raises(ImportError, match=rf"has no attribute '{name}'\. [A-Z]"):
            exec(f"from {home} import {name}")
    assert not hasattr(nnsight, "VLLM")
    for name in ("login", "status"):
        with pytest.raises(nnsight.errors.InputError, match=f"`{name}` has no meaning here"):
            getattr(nnsight.ndif, name)("anything")
        assert getattr(nnsight, name) is getattr(nnsight.ndif, name)
    with pytest.raises(AttributeError, match="written nowhere"):
        nnsight.CONFIG.save()
    for options in ({"remote": True}, {"backend": print}, {"tracer_cls": object}):
        with pytest.raises(nnsight.errors.InputError, match="has no meaning here"):
            demo.trace(PROMPT, **options)
        with pytest.raises(nnsight.errors.InputError, match="has no meaning here"):
            NNsight(torch.nn.Linear(2, 2)).trace(torch.ones(1, 2), **options)


def test_a_program_finds_names_where_the_existing_package_has_them():
    program = """
from nnsight import Object
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.tracing.globals import Object
from nnsight.modeling.language import LanguageModel
from nnsight.ndif import register
from nnsight.intervention import tracing
import nnsight.modeling.language
"""
    names = {}
    exec(program, names)
    assert names["Envoy"] is nnsight.Envoy
    assert names["eproperty"] is nnsight.eproperty
    assert names["LanguageModel"] is names["nnsight"].modeling.language.LanguageModel is nnsight.LanguageModel
    assert names["Object"] is torch.Tensor
    assert NNsight(toys.MLP())._model is not None


def test_an_option_of_the_existing_package_that_is_switched_off_asks_for_nothing(demo):
    with demo.trace(PROMPT, remote=False, backend=None, scan=False, validate=False, invoker_args={}):
        value = demo.lm_head.output
    demo.edit(backend=None)
    with demo.session(remote=False, backend=None):
        pass
    with pytest.raises(nnsight.errors.BlockError, match="bogus="), demo.session(bogus=False):
        pass
    assert value.shape[1] == 12


def test_such_a_name_is_the_model_s_where_its_forward_takes_it():
    class Takes(torch.nn.Module):
        def forward(self, x, backend=None):
            return x if backend is None else x + backend

    with NNsight(Takes()).trace(torch.zeros(1), backend=2) as tracer:
        assert tracer.result == 2


def test_a_setting_that_is_misspelt_is_never_set():
    for name, value in (("swich", "thread"), ("switch", "threads")):
        with pytest.raises((AttributeError, ValueError), match="switch"):
            setattr(nnsight.CONFIG, name, value)


def test_a_value_assigned_through_the_tracer_reaches_the_model(mlp, x):
    with mlp.trace(x) as tracer:
        tracer.output = torch.zeros(3, 2)
        assert not tracer.result.any()
    with pytest.raises(nnsight.errors.UnknownNameError), mlp.trace(x) as tracer:
        tracer.ouput = torch.zeros(3, 2)


def test_inputs_of_the_whole_model_in_each_step_of_a_generation(demo):
    with demo.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        widths = [demo.inputs[1]["input_ids"].shape[1] for _step in tracer.iter[:]]
        result = tracer.result
    assert widths == [12, 1, 1]
    assert torch.equal(result, demo.generate(PROMPT, max_new_tokens=3, min_new_tokens=3))
