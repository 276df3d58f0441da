"""`envoys=` gives modules classes of the user's own, and `eproperty` named values on them."""

import copy
import functools
import pickle

import pytest
import torch

import nnsight
import toys
from nnsight import Envoy, eproperty, errors
from nnsight.core import escape


class Halves(Envoy):
    """The output of a Linear, [row, 4], as [row, half, 2]."""

    @eproperty
    def halves(self, value):
        """Two halves."""
        return value.unflatten(-1, (2, 2))

    @halves.postprocess
    def halves(self, halves):
        return halves.flatten(-2)

    @eproperty(key="input", description="What comes in, doubled.")
    def twice(self, value):
        return value * 2

    def norm_of_output(self):
        return self.output.norm(dim=-1)

    @property
    def width(self):
        return self.out_features

    @eproperty
    def broken(self, value):
        return value.no_such_thing


@pytest.fixture
def model():
    return nnsight.NNsight(toys.MLP(), envoys={torch.nn.Linear: Halves})


def test_a_derived_value_is_read_written_and_changed_in_place(model, x, switch):
    with model.trace(x):
        up = model.layers[0].up
        doubled, halves, plain = up.twice, up.halves, up.output
        norm = up.norm_of_output()
        model.layers[1].up.halves = torch.zeros(3, 2, 2)
        written = model.layers[1].up.output
        model.layers[2].up.halves[:, 0] = 0
        changed = model.layers[2].up.output
        inner = model.layers[2].act.input
    assert halves.shape == (3, 2, 2)
    assert torch.equal(halves.flatten(-2), plain)
    assert torch.equal(norm, plain.norm(dim=-1))
    assert doubled.shape == (3, 4)
    assert not written.any()
    assert not changed[:, :2].any()
    assert torch.equal(changed, inner)
    assert model.head.width == 4


@pytest.mark.parametrize(
    "envoys",
    [
        Halves,
        {torch.nn.Linear: Halves},
        {"up": Halves},
        {"layers.*.up": Halves, "nowhere": Halves},
        {"layers.0.up": Halves},
        {".layers.0.up": Halves},
        {"blocks.*.rise": Halves},
    ],
)
def test_keys_are_classes_ends_of_paths_stars_and_further_names(envoys, x):
    model = nnsight.NNsight(toys.MLP(), envoys=envoys, rename={"layers": "blocks", "up": "rise"})
    assert type(model.layers[0].up) is Halves
    assert model.blocks[0].rise is model.layers[0].up
    assert type(model) is nnsight.NNsight
    with model.trace(x):
        assert model.layers[0].up.halves.shape == (3, 2, 2)


def test_a_class_comes_before_a_path_and_other_modules_stay_as_they_are():
    class Other(Envoy):
        pass

    model = nnsight.NNsight(toys.MLP(), envoys={"up": Other, "layers.*": Other, torch.nn.Linear: Halves})
    assert type(model.layers[0].up) is Halves
    assert type(model.layers[0]) is Other
    assert type(model.layers[0].act) is type(model.layers) is Envoy


def test_scopes_rows_and_invokes_have_them_each_in_its_own_part(model, x):
    with model.trace(x) as tracer:
        whole = tracer.model.layers[0].up.halves
    with model.trace(x) as outer, model.trace(x * 2):
        other = outer.layers[0].up.halves
        assert outer.layers[0].up.width == 4
        assert outer.layers[1].up.norm_of_output().shape == (3,)
    assert torch.equal(other, whole)
    with model.trace(x) as (a, b, _):
        first, norm = a.layers[0].up.halves, b.layers[0].up.norm_of_output()
        b.layers[1].up.halves = torch.zeros(1, 2, 2)
        written = a.tracer.model.layers[1].up.output
    assert torch.equal(first, whole[:1])
    assert norm.shape == (1,)
    assert not written[1].any()
    assert written[0].any()
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            one = model.layers[0].up.halves
        with tracer.invoke(x[1:]):
            two = model.layers[0].up.halves
            model.layers[1].up.halves = torch.zeros(2, 2, 2)
    torch.testing.assert_close(torch.cat([one, two]), whole)


def test_copies_pickles_views_and_late_modules_have_them(model, x):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.edit(lambda one: None)):
        assert type(other.head) is Halves
        with other.trace(x):
            assert other.head.output.shape == (3, 4)
    model.late = torch.nn.Linear(4, 4)
    assert type(model.late) is Halves


def test_an_attribute_error_of_the_users_comes_out_as_itself(model, x):
    for ask in (lambda m, _: m.head.broken, lambda _, t: t.model.head.broken, lambda _, t: t.rows[0].head.broken):
        with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"):
            with model.trace(x) as tracer:
                ask(model, tracer)
    with pytest.raises(errors.UnknownNameError, match="has no `brokn`"), model.trace(x):
        model.head.brokn


class Mine(nnsight.NNsight):
    """A model of the user's own class, as other libraries make them."""

    def __init__(self, module):
        super().__init__(module)
        self.note = "as it was set"

    @property
    def last(self):
        return self.layers[-1].output

    @last.setter
    def last(self, value):
        self.layers[-1].output = value

    @eproperty(key="input")
    def twice(self, value):
        return value * 2

    @property
    def broken(self):
        return self.output.no_such_thing

    @functools.cached_property
    def broken_too(self):
        return self.layers.no_such_thing

    def layer(self, index):
        return self.layers[index]

    def trace(self, *args, **kwargs):
        return super().trace(*args, **kwargs)


def test_a_model_s_own_class_has_its_names_in_the_run_or_row_that_is_asked(x):
    model = Mine(toys.MLP())
    with model.trace(x) as one, model.trace(x * 2):
        mine, other = one.last, model.last
        assert one.note == "as it was set"
    with model.trace(x):
        assert torch.equal(mine, model.last)
    assert not torch.equal(mine, other)
    with model.trace(x) as (a, b, _):
        twice, row = a.twice, b.layer(1).output
        b.last = torch.zeros(1, 4)
        whole = a.tracer.last
    assert torch.equal(twice, x[:1] * 2)
    assert row.shape == (1, 4)
    assert not whole[1].any()
    assert whole[0].any()
    with model.edit(lambda one: setattr(one, "last", one.last * 0)).trace(x):
        assert not model.last.any()


def test_an_attribute_error_in_a_property_comes_out_as_itself(x):
    class Broken(Envoy):
        @property
        def broken(self):
            return self.output.no_such_thing

    of_module = nnsight.NNsight(toys.MLP(), envoys={"head": Broken})
    for ask in (lambda m, _: m.head.broken, lambda _, t: t.head.broken, lambda _, t: t.rows[0].head.broken):
        with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"):
            with of_module.trace(x) as tracer:
                ask(of_module, tracer)
        assert escape._local.__dict__ == {}  # it would hold the frames
    model = Mine(toys.MLP())
    for ask in (lambda t: model.broken, lambda t: t.broken, lambda t: t.model.broken):
        with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"):
            with model.trace(x) as tracer:
                ask(tracer)
    with pytest.raises(errors.UnknownNameError, match="`layers`, a ModuleList, has no `no_such_thing`"):
        model.broken_too
    assert getattr(model, "broken_too", None) is None


def test_one_that_nothing_is_made_from_can_only_be_read(model, x):
    with pytest.raises(errors.WriteError, match=r"(?s)`twice` can be read.*you wrote.*@twice.postprocess"):
        with model.trace(x):
            model.head.twice = x
    with pytest.raises(errors.OutsideTraceError):
        model.head.halves
    assert Halves.halves.__doc__ == "Two halves."
    assert Halves.twice.__doc__ == "What comes in, doubled."
    assert "halves" in dir(model.head)


def test_a_tree_is_printed_with_the_values_that_are_described():
    model = nnsight.NNsight(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()), envoys={torch.nn.Linear: Halves}
    )
    linear = """Linear(
  in_features=4, out_features=4, bias=True
  (twice): What comes in, doubled.
)"""
    assert repr(model[0]) == linear
    inner = linear.replace("\n", "\n  ")
    assert repr(model) == f"Sequential(\n  (0): {inner}\n  (1): Tanh()\n)"
    assert repr(nnsight.NNsight(model._module)) == repr(model._module)

    class Described(nnsight.NNsight):
        @eproperty(description="What the model says.")
        def said(self, value):
            return value

    assert repr(Described(torch.nn.Linear(1, 1, bias=False))) == (
        "Linear(\n  in_features=1, out_features=1, bias=False\n  (said): What the model says.\n)"
    )


@pytest.mark.parametrize(
    ("envoys", "says"),
    [
        ({"up": torch.nn.Linear}, "is no subclass of nnsight.Envoy"),
        ({"up": nnsight.NNsight}, "is no subclass of nnsight.Envoy"),
        ({3: Halves}, "neither a class of modules nor a path"),
        (["up"], r"\['up'\] is no subclass"),
        ({"upp": Halves}, "(?s)none of `upp` is a module.*nearest +`up`"),
    ],
)
def test_what_can_be_no_class_of_envoys_is_refused(envoys, says):
    with pytest.raises(errors.InputError, match=says):
        nnsight.NNsight(toys.MLP(), envoys=envoys)


def test_a_name_or_key_that_an_eproperty_can_not_have_is_refused():
    with pytest.raises(errors.InputError, match="'output', 'input', 'inputs', not 'result'"):
        eproperty(key="result")
    with pytest.raises(errors.InputError, match="`output` is a value of every module"):

        class _Wrong(Envoy):
            @eproperty
            def output(self, value):
                return value


def test_a_class_that_says_how_invokes_are_put_together_is_refused_rather_than_ignored():
    with pytest.raises(errors.InputError, match=r"of Mine would never be called: the inputs of several invokes"):

        class Mine(nnsight.NNsight):
            def _batch_size(self, *inputs, **options):
                return 1

            def _batch(self, invokes, fn):
                return invokes


def test_a_method_of_an_eproperty_takes_a_value():
    with pytest.raises(
        errors.InputError, match=r"`heads\(self\)` takes others(.|\n)*instead +def heads\(self, value\):"
    ):

        @eproperty(key="output")
        def heads(self):
            return self


class Ending(nnsight.NNsight):
    @property
    def ending(self):
        return self.layers[-1].output

    def shifted(self, by):
        return self.ending + by


class Doubled(Ending):
    @property
    def ending(self):
        return super().ending * 2

    def shifted(self, by):
        return super().shifted(by) + 1


def test_super_in_a_class_of_ones_own_is_the_runs_and_the_rows(x):
    model = Doubled(toys.MLP())
    with model.trace(x) as tracer:
        whole = tracer.shifted(3)
        assert isinstance(tracer.model, Doubled)
        assert not isinstance(tracer.layers[0], nnsight.Envoy)
    with model.trace(x):
        assert torch.equal(whole, model.layers[-1].output * 2 + 4)
    with model.trace(x) as (_a, b, _c):
        assert torch.equal(b.shifted(3), whole[1:2])
