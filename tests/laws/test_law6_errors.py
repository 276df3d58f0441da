"""Law 6: an error is raised at the user's line, with its own class and text, and the model is usable afterwards."""

import contextlib
import re
import subprocess
import sys
import textwrap
import threading
import traceback

import pytest
import torch

import nnsight
import toys
from nnsight import errors


class Caught:
    """What a block raised, and where the traceback leads."""

    def __init__(self, error):
        self.error, self.text = error, str(error)
        self.frames = traceback.extract_tb(error.__traceback__)

    @property
    def users(self):
        return [frame for frame in self.frames if frame.filename == __file__]

    @property
    def torchs(self):
        return [frame for frame in self.frames if "/torch/" in frame.filename]

    def at(self, mark):
        """Whether the user's last frame is the line with `# mark`, and no frame but theirs precedes it."""
        last = max(i for i, frame in enumerate(self.frames) if frame.filename == __file__)
        before = self.frames[: last + 1]
        return before[-1].line.endswith(f"# {mark}") and all(frame.filename == __file__ for frame in before)


@pytest.fixture(autouse=True)
def _usable_afterwards_and_silent(mlp, x, capfd):
    """After each of these errors the model gives the right numbers, traced and not, and nothing was printed."""
    expected = mlp._module(x)
    yield
    assert torch.equal(mlp._module(x), expected)
    with mlp.trace(x) as tracer:
        seen = mlp.layers[1].output
        assert torch.equal(tracer.result, expected)
    assert seen.shape == (3, 4)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


# Each mistake has a class of its own


def test_a_value_that_is_past(mlp, x, switch):
    with pytest.raises(errors.AlreadyPastError, match=r"layers\.0") as info, mlp.trace(x):
        later = mlp.layers[2].output
        mlp.layers[0].output  # here
    assert later.shape == (3, 4)
    assert Caught(info.value).at("here")


def test_the_text_for_a_value_that_is_past(mlp, x):
    with pytest.raises(errors.AlreadyPastError) as info, mlp.trace(x):
        mlp.layers[2].output
        _wanted = mlp.layers[0].act.output  # here
    caught = Caught(info.value)
    assert "layers.0.act" in caught.text
    assert "_wanted = mlp.layers[0].act.output" in caught.text
    assert "layers.2" in caught.text
    assert caught.at("here")
    assert caught.torchs == []


def test_a_value_that_was_read_before_names_the_line(mlp, x):
    with pytest.raises(errors.AlreadyPastError) as info, mlp.trace(x):
        _first = mlp.layers[0].output
        mlp.layers[1].output
        _again = mlp.layers[0].output  # here
    assert "_first = mlp.layers[0].output" in str(info.value)
    assert Caught(info.value).at("here")


def test_a_module_that_is_never_called(x):
    model = nnsight.NNsight(toys.Wide(5))
    with pytest.raises(errors.NeverCalledError) as info, model.trace(x):
        _missing = model.layers[4].output  # here
    caught = Caught(info.value)
    assert "layers.4" in caught.text
    assert "never" in caught.text
    assert "_missing = model.layers[4].output" in caught.text
    assert caught.at("here")
    assert caught.torchs == []
    with model.trace(x) as tracer:
        assert torch.equal(tracer.result, model._module(x))


def test_a_module_that_is_called_fewer_times_than_asked(x):
    model = nnsight.NNsight(toys.RNN(steps=2))
    with pytest.raises(errors.OutOfOrderError) as info, model.trace(x):
        for _ in range(3):
            model.cell.mix.output
            state = model.cell.output
    caught = Caught(info.value)
    assert isinstance(info.value, (errors.CalledFewerTimesError, errors.AlreadyPastError))
    assert "cell.mix" in caught.text
    assert caught.users[-1].line.startswith("model.cell.mix.output")
    assert state.shape == (3, 4)


def test_beneath_a_skipped_module_nothing_is_called(mlp, x):
    with pytest.raises(errors.NeverCalledError) as info, mlp.trace(x):
        mlp.layers[1].skip(x)
        mlp.layers[1].act.output  # here
    assert "layers.1.act" in str(info.value)


def test_outside_a_trace(mlp, x):
    for ask in (
        lambda: mlp.layers[0].output,
        lambda: mlp.layers[0].input,
        lambda: mlp.layers[0].inputs,
        lambda: mlp.output,
        lambda: mlp.layers[0].skip(x),
        lambda: setattr(mlp.layers[0], "output", x),
        lambda: setattr(mlp.layers[0], "input", x),
    ):
        with pytest.raises(errors.OutsideTraceError) as info:
            ask()  # here
        assert isinstance(info.value, ValueError)
        assert "trace" in str(info.value)
        assert Caught(info.value).torchs == []
    with pytest.raises(errors.OutsideTraceError, match=r"layers\.0"):
        mlp.layers[0].output


def test_after_a_trace(mlp, x):
    with mlp.trace(x) as tracer:
        pass
    with pytest.raises(errors.OutsideTraceError):
        mlp.layers[0].output
    with pytest.raises(errors.BlockError):
        tracer.model.layers[0].output


def test_a_trace_of_another_model_is_outside(mlp, x):
    other = nnsight.NNsight(toys.MLP())
    with pytest.raises(errors.OutsideTraceError), other.trace(x):
        mlp.layers[0].output


def test_a_misspelt_module(mlp, x):
    with pytest.raises(errors.UnknownNameError) as info, mlp.trace(x):
        mlp.layers[1].actt.output  # here
    caught = Caught(info.value)
    assert isinstance(info.value, AttributeError)
    assert "actt" in caught.text
    assert re.search(r"\bact\b", caught.text)
    assert caught.at("here")
    assert caught.torchs == []
    assert traceback.format_exception(info.value)[-1] == f"nnsight.errors.UnknownNameError: {caught.text}\n"
    assert info.value.obj is None  # from what is named here, Python 3.12 would make a "Did you mean" of its own
    with pytest.raises(errors.UnknownNameError, match="embd"):
        mlp.embd
    with pytest.raises(errors.UnknownNameError, match="hed"):
        mlp["layers.0.hed"]
    with pytest.raises(errors.UnknownNameError, match="hed"):
        mlp.get("layers.0.hed")


def test_a_bad_index(mlp, x):
    with pytest.raises(errors.UnknownIndexError) as info, mlp.trace(x):
        mlp.layers[99].output
    assert isinstance(info.value, IndexError)
    assert "99" in str(info.value)
    assert "3" in str(info.value)
    with pytest.raises(errors.UnknownIndexError):
        mlp.layers[-4]


@pytest.mark.parametrize("port", ["output", "input"])
def test_writing_none(mlp, x, port):
    with pytest.raises(errors.BlockError) as info, mlp.trace(x):
        if port == "output":
            mlp.layers[1].output = None  # here
        else:
            raise errors.WriteError("not about inputs")
    assert type(info.value) is errors.WriteError
    if port == "output":
        assert "None" in str(info.value)
        assert Caught(info.value).at("here")


def test_writing_an_input_when_the_module_has_run(mlp, x, switch):
    with pytest.raises(errors.WriteError) as info, mlp.trace(x):
        mlp.layers[1].output
        mlp.layers[1].input = x  # here
    caught = Caught(info.value)
    assert "layers.1" in caught.text
    assert "input" in caught.text
    assert caught.at("here")
    with pytest.raises(errors.WriteError), mlp.trace(x):
        mlp.layers[1].output
        mlp.layers[1].inputs = ((x,), {})


def test_skipping_a_module_that_has_run(mlp, x):
    with pytest.raises((errors.OutOfOrderError, errors.WriteError)) as info, mlp.trace(x):
        mlp.layers[1].output
        mlp.layers[1].skip(x)  # here
    assert "layers.1" in str(info.value)
    assert Caught(info.value).at("here")


def test_a_write_that_never_reaches_the_model(x):
    model = nnsight.NNsight(toys.Wide(5))
    for write in (
        lambda: setattr(model.layers[4], "output", x),
        lambda: model.layers[4].skip(x),
        lambda: setattr(model.layers[4], "input", x),
    ):
        with pytest.raises(errors.BlockError, match=r"layers\.4"), model.trace(x):
            write()


def test_writing_inputs_that_are_no_pair(mlp, x):
    for wrong in (x, (x,), ((x,), {}, 1), ([x], {}), ((x,), None)):
        with contextlib.suppress(errors.BlockError), mlp.trace(x):
            mlp.layers[1].inputs = wrong
            if not isinstance(wrong, tuple) or len(wrong) != 2 or wrong[1] is None:
                raise AssertionError(f"{wrong!r} was taken")


def test_what_is_given_to_trace(mlp, x):
    with pytest.raises(errors.InputError) as info, mlp.trace():
        mlp.layers[0].output
    assert isinstance(info.value, ValueError)
    assert Caught(info.value).torchs == []


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_module_that_torch_would_not_let_us_tap(x):
    scripted = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.jit.script(toys.Pair()))
    model = nnsight.NNsight(scripted)
    with pytest.raises(errors.Error) as info, model.trace(x):
        model[1].first.output
    assert isinstance(info.value, (errors.ModelError, errors.BlockError))
    assert re.search("[Ss]cript", str(info.value))
    with model.trace(x):
        assert model[1].output.shape == (3, 4)


def test_wrapping_what_is_no_module():
    for wrong in ("gpt2", None, 3, torch.nn.Linear, lambda x: x):
        with pytest.raises((errors.Error, TypeError)):
            nnsight.NNsight(wrong)


def test_different_mistakes_never_share_a_text(mlp, x):
    texts = {}

    def collect(kind, do):
        with pytest.raises(errors.Error) as info:
            do()
        assert type(info.value).__name__ not in texts
        texts[type(info.value).__name__] = str(info.value).splitlines()[0]
        assert isinstance(info.value, kind)

    def traced(do):
        def inside():
            with mlp.trace(x):
                mlp.layers[1].output
                do()

        return inside

    wide = nnsight.NNsight(toys.Wide(5))

    def never():
        with wide.trace(x):
            wide.layers[4].output

    collect(errors.AlreadyPastError, traced(lambda: mlp.layers[0].output))
    collect(errors.NeverCalledError, never)
    collect(errors.OutsideTraceError, lambda: mlp.layers[0].output)
    collect(errors.UnknownNameError, lambda: mlp.layer)
    collect(errors.UnknownIndexError, lambda: mlp.layers[7])
    collect(errors.WriteError, traced(lambda: setattr(mlp.layers[1], "input", x)))
    collect(errors.InputError, lambda: mlp.trace(torch.zeros(1, 1), 1).__enter__())
    bare = {re.sub(r"`[^`]*`", "", text) for text in texts.values()}
    assert len(bare) == len(texts) == 7
    assert all(text.strip() for text in bare)


def test_the_tree_of_errors():
    for name in ("AlreadyPastError", "NeverCalledError", "CalledFewerTimesError"):
        assert issubclass(getattr(errors, name), errors.OutOfOrderError)
    assert issubclass(errors.OutOfOrderError, errors.BlockError)
    assert issubclass(errors.OutsideTraceError, ValueError)
    assert issubclass(errors.UnknownNameError, AttributeError)
    assert issubclass(errors.UnknownIndexError, IndexError)
    assert issubclass(errors.InputError, ValueError)
    everything = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(value, nnsight.Error) for value in everything)


# Where the traceback leads


def test_the_last_line_of_the_users_is_the_line_of_the_mistake(mlp, x, switch):
    def helper():
        return mlp.layers[0].output  # deep

    with pytest.raises(errors.AlreadyPastError) as info, mlp.trace(x):
        mlp.layers[1].output
        helper()
    caught = Caught(info.value)
    assert caught.at("deep")
    assert caught.torchs == []
    assert not [frame for frame in caught.frames if "greenlet" in frame.filename or "threading" in frame.filename]


def test_an_error_of_the_blocks_own_has_only_the_users_frames(mlp, x, switch):
    with pytest.raises(KeyError) as info, mlp.trace(x):
        mlp.layers[1].output
        raise KeyError("mine")  # here
    caught = Caught(info.value)
    assert [frame.filename for frame in caught.frames] == [__file__]
    assert info.value.__cause__ is None
    assert info.value.__context__ is None


def test_an_error_of_the_models_starts_at_the_line_that_waited(x, switch):
    own = ValueError("the model's own")
    model = nnsight.NNsight(toys.Fails(error=own))
    with pytest.raises(ValueError, match="the model's own") as info, model.trace(x):
        model.first.output
        model.second.output  # here
    assert info.value is own
    caught = Caught(info.value)
    assert caught.frames[0].filename == __file__
    assert "model.second.output  # here" in caught.frames[0].line
    assert caught.frames[-1].name == "forward"
    assert caught.frames[-1].filename == toys.__file__
    assert "raise self.error" in caught.frames[-1].line


def test_an_error_of_the_models_after_the_last_question(x, switch):
    model = nnsight.NNsight(toys.Fails(error=ValueError("the model's own")))
    with pytest.raises(ValueError, match="the model's own") as info:
        with model.trace(x):  # opens
            model.first.output
    caught = Caught(info.value)
    assert caught.frames[0].filename == __file__
    assert "model.trace(x)" in caught.frames[0].line
    assert caught.frames[-1].filename == toys.__file__


def test_a_wrong_shape_is_torchs_error_with_a_note(mlp, x, switch):
    with pytest.raises(RuntimeError, match="shapes") as info, mlp.trace(x):
        mlp.layers[1].down.input = torch.zeros(3, 9)  # wrote
        mlp.head.output  # waited
    caught = Caught(info.value)
    assert type(info.value) is RuntimeError
    assert "# waited" in caught.frames[0].line
    note = "\n".join(info.value.__notes__)
    assert "mlp.layers[1].down.input = torch.zeros(3, 9)" in note or str(number_of_mark("wrote")) in note
    assert re.search(r"3, 9", note)
    assert re.search(r"3, 4", note)


def number_of_mark(mark):
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {mark}"))


def test_a_wrong_dtype_is_torchs_error_with_a_note(mlp, x):
    with pytest.raises(RuntimeError) as info, mlp.trace(x):
        mlp.layers[1].down.input = torch.zeros(3, 4, dtype=torch.int64)
    assert "int64" in "\n".join(info.value.__notes__)


def test_a_wrong_device_is_torchs_error_with_a_note(mlp, x):
    with pytest.raises((RuntimeError, NotImplementedError)) as info, mlp.trace(x) as tracer:
        mlp.layers[1].down.input = torch.zeros(3, 4, device="meta")
        tracer.result.sum().item()
    assert not isinstance(info.value, errors.Error)


def test_an_error_without_any_write_has_no_note(x):
    model = nnsight.NNsight(toys.Fails(error=ValueError("the model's own")))
    with pytest.raises(ValueError, match="the model's own") as info, model.trace(x):
        model.second.output
    assert not any("wrote" in note for note in getattr(info.value, "__notes__", []))


def test_the_models_errors_keep_their_cause(x):
    def question(x):
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    model = nnsight.NNsight(toys.Ask(question))
    with pytest.raises(ValueError, match="second") as info, model.trace(x):
        model.after.output
    assert isinstance(info.value.__cause__, KeyError)


def test_wrong_arguments_are_pythons_error(mlp, x):
    with pytest.raises((TypeError, errors.InputError)) as info, mlp.trace(x, nonsense=1):
        mlp.head.output
    assert "nonsense" in str(info.value)


def test_an_assertion_about_a_value_is_an_assertion(mlp, x):
    with pytest.raises(AssertionError), mlp.trace(x):
        assert mlp.layers[0].output.shape == (9, 9)


# Errors caught inside the block, which goes on


def test_a_bad_read_caught_in_the_block_and_then_on(mlp, x, switch):
    """A name that isn't there does not move the run."""
    expected = mlp._module(x)
    with mlp.trace(x) as tracer:
        first = mlp.layers[0].output
        for bad in (lambda: mlp.layers[9], lambda: mlp.nope, lambda: mlp.layers[0].actt.output):
            with pytest.raises(errors.BlockError):
                bad()
        second = mlp.layers[1].output
        out = tracer.result
    assert first.shape == second.shape
    assert torch.equal(out, expected)


def test_a_write_that_is_refused_caught_in_the_block_and_then_on(mlp, x, switch):
    expected = mlp._module(x)
    with mlp.trace(x) as tracer:
        mlp.layers[1].output
        with pytest.raises(errors.WriteError):
            mlp.layers[1].input = x
        with pytest.raises(errors.WriteError):
            mlp.layers[1].output = None
        later = mlp.layers[2].output
        out = tracer.result
    assert later.shape == (3, 4)
    assert torch.equal(out, expected)


def test_a_value_that_is_past_caught_in_the_block_and_then_the_result(mlp, x, switch):
    expected = mlp._module(x)
    with mlp.trace(x) as tracer:
        mlp.layers[1].output
        with pytest.raises(errors.AlreadyPastError):
            mlp.layers[0].output
        out = tracer.result
    assert torch.equal(out, expected)


def test_asking_again_for_what_is_past_says_so_again(mlp, x):
    with mlp.trace(x):
        mlp.layers[1].output
        for _ in range(2):
            with pytest.raises(errors.AlreadyPastError):
                mlp.layers[0].output


def test_a_model_error_caught_in_the_block(x, switch):
    model = nnsight.NNsight(toys.Fails(error=ValueError("the model's own")))
    with contextlib.suppress(errors.BlockError), model.trace(x):
        first = model.first.output
        with pytest.raises(ValueError, match="the model's own"):
            model.second.output
        with pytest.raises((errors.Error, ValueError)):
            model.second.output
    assert first.shape == (3, 4)


# What Python itself asks of an object


def test_hasattr_is_false_for_what_is_not_there(mlp, x):
    assert not hasattr(mlp, "nope")
    assert not hasattr(mlp.layers[0], "nope")
    assert getattr(mlp, "nope", 3) == 3
    assert hasattr(mlp, "layers")
    assert hasattr(mlp.layers[0].up, "weight")
    with mlp.trace(x):
        assert not hasattr(mlp, "nope")
        assert not hasattr(mlp.layers[1], "nope")
        assert hasattr(mlp.layers[1], "act")
        seen = mlp.layers[0].output
    assert seen.shape == (3, 4)


def test_an_attribute_error_of_the_models_comes_out_as_itself(x, switch):
    def question(x):
        return x.no_such_thing

    model = nnsight.NNsight(toys.Ask(question))
    for ask in (
        lambda: model.after.output,
        lambda: model.after.input,
        lambda: model.after.inputs,
        lambda: model.output,
    ):
        with pytest.raises(AttributeError, match="no_such_thing") as info, model.trace(x):
            ask()
        assert type(info.value) is AttributeError
        assert Caught(info.value).frames[-1].name == "question"
    with pytest.raises(AttributeError, match="no_such_thing") as info, model.trace(x) as tracer:
        tracer.result
    assert type(info.value) is AttributeError
    with pytest.raises(AttributeError, match="no_such_thing") as info, model.trace(x) as tracer:
        tracer.model.after.output
    assert type(info.value) is AttributeError
    with pytest.raises(AttributeError, match="no_such_thing") as info, model.trace(x):
        model.after.output = x
    assert type(info.value) is AttributeError


@pytest.mark.parametrize(
    "own",
    [
        StopIteration("own"),
        GeneratorExit("own"),
        KeyError("own"),
        IndexError("own"),
        SystemExit(3),
        StopAsyncIteration(),
    ],
    ids=repr,
)
def test_any_exception_of_the_models_comes_out_as_itself(x, own, switch):
    model = nnsight.NNsight(toys.Fails(error=own))
    with pytest.raises(type(own)) as info, model.trace(x):
        model.second.output
    assert info.value is own
    with pytest.raises(type(own)) as info:
        with model.trace(x):
            model.first.output
    assert info.value is own


def test_a_greenlet_exit_of_the_models_is_the_models_error(x, switch):
    import greenlet

    own = greenlet.GreenletExit("own")
    model = nnsight.NNsight(toys.Fails(error=own))
    with pytest.raises(greenlet.GreenletExit) as info, model.trace(x):
        model.second.output
    assert info.value is own


def test_a_stop_iteration_of_the_blocks_is_its_own(mlp, x):
    with pytest.raises(StopIteration), mlp.trace(x):
        mlp.layers[0].output
        next(iter([]))


# Which side, and which thread


def test_another_threads_read_is_an_error_of_its_own(mlp, x, switch):
    found = []

    def read(tracer):
        try:
            tracer.model.layers[1].output
        except Exception as error:  # noqa: BLE001  whatever it is
            found.append(error)

    with mlp.trace(x) as tracer:
        first = mlp.layers[0].output
        thread = threading.Thread(target=read, args=(tracer,))
        thread.start()
        thread.join()
        second = mlp.layers[1].output
    assert [type(error) for error in found] == [errors.OtherThreadError]
    assert "thread" in str(found[0])
    assert first.shape == second.shape


def test_an_error_prints_once_and_shows_the_users_line_last(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, nnsight
            model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
            with model.trace(torch.ones(2, 4)):
                second = model[1].output
                first = model[0].output
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "During handling" not in done.stderr
    assert "/torch/" not in done.stderr
    assert "first = model[0].output" in done.stderr
    assert done.stderr.count("AlreadyPastError") == 1
    files = re.findall(r'File "([^"]+)", line', done.stderr)
    assert files[0] == str(script)
    assert len(files) <= 6, done.stderr


# Tracebacks


@pytest.mark.parametrize("way", ["live", "invoke", "edit"])
def test_the_traceback_of_an_error_of_ours_ends_at_the_users_line(mlp, x, way):
    with pytest.raises(errors.AlreadyPastError) as info:
        if way == "live":
            with mlp.trace(x):
                mlp.layers[2].output
                mlp.layers[1].output  # here
        elif way == "invoke":
            with mlp.trace() as tracer:
                with tracer.invoke(x):
                    mlp.layers[2].output
                    mlp.layers[1].output  # here
        else:
            with mlp.edit() as edited:
                edited.layers[2].output
                edited.layers[1].output  # here
            with edited.trace(x):
                edited.output
    last = Caught(info.value).frames[-1]
    assert last.filename == __file__
    assert last.line.endswith("# here")


def test_behind_the_users_line_the_models_own_frames_follow(x):
    model = nnsight.NNsight(torch.nn.Sequential(toys.MLP(), toys.Ask(torch.nn.Linear(5, 5))))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as info, model.trace(x):
        model[0].output
        model.output  # here
    caught = Caught(info.value)
    assert caught.at("here")
    behind = [frame.filename for frame in caught.frames[caught.frames.index(caught.users[0]) + 1 :]]
    assert behind
    assert not any("/nnsight/" in name for name in behind)


def test_at_the_end_of_a_block_one_frame_of_ours_stands_in_front_of_the_models(x):
    model = nnsight.NNsight(torch.nn.Sequential(toys.MLP(), toys.Ask(torch.nn.Linear(5, 5))))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as info, model.trace(x):
        model[0].output
    frames = Caught(info.value).frames
    ours = [frame.name for frame in frames if "/nnsight/" in frame.filename]
    assert ours == ["__exit__"]
    assert frames[-1].filename != __file__


def test_an_error_inside_the_library_keeps_its_frames(mlp, x, monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(nnsight.core.run.Run, "_wait", broken)
    with pytest.raises(KeyError) as info, mlp.trace(x):
        mlp.layers[1].output
    assert any("/nnsight/node.py" in frame.filename for frame in Caught(info.value).frames)


def test_what_a_trace_is_refused_with_has_few_frames_behind_the_users_line():
    model = nnsight.LanguageModel("nnsight/demo")
    for refused in (lambda: model.trace(""), lambda: model.trace(prompt="Rome"), lambda: model.generate("Rome", n=3)):
        with pytest.raises(errors.InputError) as info:
            refused()
        frames = Caught(info.value).frames
        assert len(frames) - max(i for i, frame in enumerate(frames) if frame.filename == __file__) <= 4
        assert info.value.__cause__ is None
