"""What programs do that others wrote for the existing package: where they look for names, what they set, and so on."""

import importlib
import warnings

import pytest
import torch

import nnsight
from nnsight import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
ROME = "The Colosseum is in the city of"


def imported(line):
    names = {}
    exec(line, names)
    return names[line.rpartition(" ")[2]]


# Where they look for names.


def test_a_name_is_found_where_any_version_of_the_existing_package_has_it():
    from nnsight.block.barrier import Barrier
    from nnsight.block.cache import Cache
    from nnsight.block.tracer import Tracer

    for line, wanted in {
        "from nnsight import NNsightDeprecationWarning": FutureWarning,
        "from nnsight.intervention.tracing.tracer import Barrier": Barrier,
        "from nnsight.intervention.barrier import Barrier": Barrier,
        "from nnsight.intervention.interleaver import OutOfOrderError": nnsight.OutOfOrderError,
        "from nnsight.intervention.source import SourceNotAvailable": nnsight.errors.NoSourceError,
        "from nnsight.intervention.cache import CacheView": Cache,
        "from nnsight.intervention import Envoy": nnsight.Envoy,
        "from nnsight.envoy import Envoy": nnsight.Envoy,
        "from nnsight.contexts.Tracer import Tracer": Tracer,
        "from nnsight.tracing.tracer import Tracer": Tracer,
        "from nnsight.tracing.Proxy import Proxy": torch.Tensor,
        "from nnsight.tracing.graph.proxy import Proxy": torch.Tensor,
        "from nnsight.intervention.graph.proxy import InterventionProxy": torch.Tensor,
        "from nnsight.models.LanguageModel import LanguageModelProxy": torch.Tensor,
        "from nnsight.models.LanguageModel import LanguageModel": LanguageModel,
        "from nnsight.models.NNsightModel import NNsight": nnsight.NNsight,
        "from nnsight.modeling.transformers import TransformersModel": nnsight.TransformersModel,
        "from nnsight.schema.config import CONFIG": nnsight.CONFIG,
        "from nnsight.util import WrapperModule": torch.nn.Identity,
    }.items():
        assert imported(line) is wanted, line


def test_a_name_that_is_nowhere_says_what_to_write():
    for line, says in {
        "from nnsight.util import fetch_attr": r"model\.get\(",
        "from nnsight.util import NNsightError": "nnsight.Error",
        "from nnsight.models.UnifiedTransformer import UnifiedTransformer": r"NNsight\(model\)",
        "from nnsight.models import Mamba": r"NNsight\(model\)",
        "from nnsight.models.mixins import RemoteableMixin": "no remote execution",
        "from nnsight.intervention.backends.remote import RemoteBackend": "no remote execution",
        "from nnsight.intervention.interleaver import Interleaver": "has inside isn't here",
    }.items():
        with pytest.raises(ImportError, match=says):
            exec(line)
    util = importlib.import_module("nnsight.util")
    with pytest.raises(AttributeError, match=r"model\.get\("):
        util.fetch_attr
    assert not hasattr(util, "fetch_attr")
    assert importlib.import_module("nnsight.models.tasks").CLASSES


def test_their_modules_are_there_without_an_import_of_their_own():
    assert nnsight.intervention.envoy.Envoy is nnsight.Envoy
    assert nnsight.modeling.language.LanguageModel is LanguageModel
    with pytest.raises(AttributeError, match=r"model\.get\("):
        nnsight.util.fetch_attr


# What they set.


def test_settings_that_mean_nothing_here_let_a_program_go_on():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("REMOTE_LOGGING", "DEBUG", "PYMOUNT", "CROSS_INVOKER"):
            setattr(nnsight.CONFIG.APP, name, False)
        nnsight.CONFIG.API.APIKEY = None
    for set_ in (
        lambda: nnsight.CONFIG.set_default_api_key("key"),
        lambda: setattr(nnsight.CONFIG.API, "APIKEY", "key"),
        lambda: setattr(nnsight.CONFIG.API, "HOST", "https://..."),
        lambda: nnsight.register("my_package"),
        lambda: nnsight.ndif.register("my_package"),
    ):
        with pytest.warns(UserWarning, match="no remote execution here") as told:
            set_()
        assert [one.filename for one in told] == [__file__]
    with pytest.warns(UserWarning, match="DEBUG` means nothing here"):
        nnsight.CONFIG.APP.DEBUG = True
    assert nnsight.CONFIG.API.APIKEY == "key"
    for section, name in (("APP", "REMOTE_LOGING"), ("API", "KEY")):
        with pytest.raises(AttributeError, match=f"CONFIG.{section} has no `{name}`. It has .*, and no use for them"):
            setattr(getattr(nnsight.CONFIG, section), name, False)
    with pytest.raises(AttributeError, match="COMPRESS"):
        nnsight.CONFIG.API.COMPRESS
    del nnsight.CONFIG.API.APIKEY, nnsight.CONFIG.API.HOST


# How they take gradients, and loop.


def test_a_session_sees_a_backward_block_between_its_traces(demo):
    with demo.session():
        with demo.trace(PROMPT):
            hidden = demo.transformer.h[3].mlp.output
            loss = demo.lm_head.output.sum()
        with loss.backward():
            gradient = hidden.grad
    with demo.trace(PROMPT):
        again = demo.transformer.h[3].mlp.output
        wanted = nnsight.grad(demo.lm_head.output.sum(), again)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


class Steers:
    """As in a class of a program's: loops over steps, as a `with`, in invokes."""

    def __init__(self, model):
        self.model = model

    def run(self, prompt, layers):
        kept = []
        with self.model.generate(max_new_tokens=3, min_new_tokens=3) as tracer:
            with tracer.invoke(prompt):
                with tracer.iter[:] as step:
                    chosen = layers if step == 0 else layers[:1]
                    for layer in chosen:
                        hidden = self.model.transformer.h[layer].mlp.output
                    kept.append((step, tuple(hidden.shape)))
            with tracer.invoke():
                with tracer.all():
                    token = self.model.lm_head.output[:, -1].argmax(-1)
                    kept.append(token.item())
        return kept


@pytest.mark.filterwarnings("ignore:`with tracer.iter:FutureWarning")
def test_a_loop_as_a_with_binds_new_names_in_an_invoke_in_a_method(demo):
    kept = Steers(demo).run(PROMPT, [2, 5])
    ids = demo.generate(PROMPT, max_new_tokens=3, min_new_tokens=3)[0, -3:].tolist()
    assert [one for one in kept if isinstance(one, tuple)] == [(0, (1, 12, 128)), (1, (1, 1, 128)), (2, (1, 1, 128))]
    assert [one for one in kept if isinstance(one, int)][:2] == ids[:2]  # the third one would have been the end


@pytest.mark.filterwarnings("ignore:`with tracer.iter:FutureWarning")
def test_the_steps_that_a_module_is_asked_for_are_those_of_the_generation(demo):
    layer, ids = demo.transformer.h[3].mlp, demo.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with demo.generate(ids, max_new_tokens=3, min_new_tokens=3) as tracer:
        for _ in tracer.iter[:]:
            layer.output[:] += 1
        wanted = tracer.result
    with pytest.warns(FutureWarning, match=r"is deprecated: for step in tracer.iter\[:\]:"):
        runs = with_steps_of_modules(demo, layer, ids)
    assert len(runs) == 4
    for run in runs:
        assert torch.equal(run, wanted)


def with_steps_of_modules(demo, layer, ids):
    runs = []
    with demo.generate(ids, max_new_tokens=3, min_new_tokens=3) as tracer:
        with layer.all():
            layer.output[:] += 1
        runs.append(tracer.result)
    with demo.generate(ids, max_new_tokens=3, min_new_tokens=3) as tracer:
        for _ in demo.all():
            layer.output[:] += 1
        runs.append(tracer.result)
    with demo.generate(max_new_tokens=3, min_new_tokens=3) as tracer:
        with tracer.invoke(ids):
            with demo.iter[:]:
                layer.output[:] += 1
        with tracer.invoke():
            runs.append(tracer.result)
    with demo.generate([PROMPT], max_new_tokens=3, min_new_tokens=3) as (a,):
        for _ in a.transformer.h.all():
            a.transformer.h[3].mlp.output[:] += 1
        runs.append(a.tracer.result)
    return runs


@pytest.mark.filterwarnings("ignore:`transformer.h.all` is deprecated:FutureWarning")
def test_steps_asked_of_a_module_by_themselves_are_refused_and_none_are_there_in_a_trace(demo):
    with pytest.raises(nnsight.errors.BlockError, match=r"`transformer.h.all\(\)` by itself has no effect"):
        with demo.generate(PROMPT, max_new_tokens=2):
            demo.transformer.h.all()
    with pytest.raises(nnsight.errors.UnknownNameError, match=r"for step in tracer\.iter"), demo.trace(PROMPT):
        with demo.transformer.h.all():
            pass
    with pytest.raises(nnsight.errors.UnknownNameError, match=r"for step in tracer\.iter"):
        demo.transformer.h.all()


# What values had, as proxies.


def test_arrays_are_saved_too_and_what_can_t_be_saved_need_not_be(demo):
    with demo.trace(PROMPT):
        array = demo.transformer.h[3].mlp.output.detach().numpy().save()
        number = array.max().save()
    assert array.shape == (1, 12, 128)
    assert number == array.max()
    with pytest.raises(AttributeError, match="save") as raised, demo.trace(PROMPT):
        range(3).save()
    assert "nnsight.save(x) takes any x" in raised.value.__notes__[0]
    assert nnsight.save(range(3)) == range(3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_what_proxies_had_says_what_to_write(demo):
    for says, line in {
        "with loss.backward()": lambda h: h.output.grad.save(),
        "tracer.stop()": lambda h: h.output.stop(),
        "is the value itself": lambda h: h.output.value,
    }.items():
        with pytest.raises(AttributeError) as raised, demo.trace(PROMPT):
            line(demo.transformer.h[3].mlp)
        assert says in raised.value.__notes__[0]
    for name, says in {"nns_output": r"It is \.output; .*E_output", "_module_path": r"It is \.path"}.items():
        with pytest.raises(nnsight.errors.UnknownNameError, match=says):
            getattr(demo.transformer.h[3], name)
    with pytest.raises(nnsight.errors.BlockError, match="which takes no prompt"):
        demo.edit(" ")


def test_other_names_of_earlier_versions_say_what_to_write(demo):
    for name in ("local", "stop"):
        with pytest.raises(AttributeError, match=rf"has no attribute '{name}'\. [A-Z]"):
            getattr(nnsight, name)
    with demo.session() as session:
        for name in ("iter", "log", "backend"):
            with pytest.raises(AttributeError, match=f"a session has no `{name}`. A block"):
                getattr(session, name)
        with pytest.raises(AttributeError, match="nothing else"):
            session.trace
    with demo.trace(PROMPT) as tracer:
        for name, says in {"exit": r"tracer\.stop\(\)", "cond": "ordinary Python", "local": "no remote"}.items():
            with pytest.raises(nnsight.errors.UnknownNameError, match=says):
                getattr(tracer, name)
    with pytest.raises(nnsight.errors.UnknownNameError, match="pickle"):
        demo.export_edits


def test_many_invokes_that_fail_are_told_in_a_line_each(demo):
    with pytest.raises(nnsight.errors.AlreadyPastError) as raised, demo.trace() as tracer:
        for layer in range(3):
            with tracer.invoke(PROMPT):
                demo.transformer.h[layer + 1].output
                demo.transformer.h[layer].output
    others = [note for note in raised.value.__notes__ if "failed too" in note]
    assert len(others) == 2
    assert not any("\n" in note for note in others)


# What they expect values to be.


def indexed_as_of_a_tuple(layer):
    hidden = layer.mlp.output[0]  # in some versions of transformers, a block's output is one
    return hidden[:, -1, :]


def in_an_invoke(demo, line):
    with demo.trace() as tracer, tracer.invoke(PROMPT):
        line(demo.transformer.h[3])


def in_an_edit(demo, line):
    def edited(model):
        line(model.transformer.h[3])

    changed = demo.edit(edited)
    with changed.trace(PROMPT):
        pass


def in_a_trace_in_another(demo, line):
    with demo.trace(ROME), demo.trace(PROMPT):
        line(demo.transformer.h[3])


def in_a_row(demo, line):
    with demo.trace([PROMPT, ROME]) as (a, _):
        line(a.transformer.h[3])


@pytest.mark.parametrize("run", [in_an_invoke, in_an_edit, in_a_trace_in_another, in_a_row])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_an_error_of_a_value_says_once_what_the_value_is(demo, run):
    is_a_tensor = "`transformer.h.3.mlp.output` is a tensor, [1, 12, 128] float32: `[0]` of it is the first"
    for line, says in {
        indexed_as_of_a_tuple: is_a_tensor,
        lambda layer: layer.mlp.output[0].mean(dim=2): is_a_tensor,
        lambda layer: layer.mlp.output.grad[0]: "with loss.backward()",
        lambda layer: layer.mlp.output.grad.save(): "with loss.backward()",
        lambda layer: layer.attn.output[1][0]: 'With attn_implementation="eager", attention returns its weights.',
        lambda layer: layer.attn.output[1].save(): 'With attn_implementation="eager", attention returns its weights.',
        lambda layer: layer.mlp.output.value: "is the value itself",
    }.items():
        with pytest.raises((AttributeError, IndexError, TypeError)) as raised:
            run(demo, line)
        assert sum(says in note for note in raised.value.__notes__) == 1, raised.value.__notes__


def test_an_error_of_the_program_s_own_is_left_as_it_is(demo):
    for line in (
        lambda layer: layer.output[0, 0, 0, 0],
        lambda layer: (layer.mlp.output, torch.ones(3)[0, 0]),
        lambda layer: (layer.mlp.output, [None][0][0]),
        lambda layer: [layer.output].pop(1),
    ):
        with pytest.raises((IndexError, RuntimeError, TypeError)) as raised, demo.trace(PROMPT):
            line(demo.transformer.h[3])
        assert not hasattr(raised.value, "__notes__")


def test_what_a_run_returned_is_asked_of_its_trace_afterwards(demo):
    with demo.generate(max_new_tokens=2) as generator, generator.invoke(PROMPT):
        pass
    with pytest.raises(nnsight.errors.OutsideTraceError) as raised:
        generator.output
    assert raised.value.__notes__ == ["What the model returned is tracer.result, also after the trace."]
    assert torch.equal(generator.result, demo.generate(PROMPT, max_new_tokens=2))
    with demo.trace(PROMPT) as tracer:
        wanted = demo.output.logits
    assert tracer.result.logits is wanted


def test_an_item_of_another_invoke_that_is_not_there_yet(demo):
    kept = {}
    with pytest.raises(KeyError) as raised, demo.trace() as tracer:
        with tracer.invoke(PROMPT):
            kept[3] = demo.transformer.h[3].mlp.output
        with tracer.invoke(PROMPT):
            demo.transformer.h[3].mlp.output[:] = kept[3]
    assert any("meet = tracer.barrier(2), and meet() in both" in note for note in raised.value.__notes__)
    with demo.trace() as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(PROMPT):
            kept[3] = demo.transformer.h[3].mlp.output
            meet()
        with tracer.invoke(PROMPT):
            meet()
            demo.transformer.h[3].mlp.output[:] = kept[3]
    with pytest.raises(KeyError) as raised, demo.trace() as tracer, tracer.invoke(PROMPT):
        kept["of itself"]
    assert raised.value.__notes__ == ["In invoke 0 of the trace."]


@pytest.mark.filterwarnings("error:.*changes nothing:FutureWarning")
def test_checks_are_made_anyway(demo):
    ids = demo.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with demo.trace(PROMPT):
        wanted = demo.lm_head.output
    with demo.trace(PROMPT, scan=False, validate=False):
        assert torch.equal(demo.lm_head.output, wanted)
    with demo.trace(remote=False) as tracer, tracer.invoke(ids, scan=False, remote=False):
        assert torch.equal(demo.lm_head.output, wanted)
    for name in ("scan", "validate"):
        says = f"`{name}=True` changes nothing. A block is checked as it runs"
        with pytest.warns(FutureWarning, match=says) as told, demo.trace(PROMPT, **{name: True}):
            assert torch.equal(demo.lm_head.output, wanted)
        assert [one.filename for one in told] == [__file__]
        with pytest.warns(FutureWarning, match=says), demo.trace() as tracer, tracer.invoke(ids, **{name: True}):
            assert torch.equal(demo.lm_head.output, wanted)
        with pytest.raises(nnsight.errors.InputError, match=f"`{name}` has no meaning here"):
            demo.trace(PROMPT, **{name: "yes"})
    with pytest.raises(nnsight.errors.InputError, match="no remote execution"), demo.trace() as tracer:
        tracer.invoke(ids, remote=True)
