"""The command line: `nnsight lens`, `nnsight verify`, `nnsight demo`; `python -m nnsight` is the same.

What takes long to import is imported in the command that needs it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from nnsight import __version__
from nnsight.errors import Error, InputError, ModelError

if TYPE_CHECKING:
    from nnsight.analysis import Lens
    from nnsight.models.language import LanguageModel
    from nnsight.models.transformers_model import TransformersModel

Model = TypeVar("Model", bound="TransformersModel")
BUNDLED = "nnsight/demo"
_UNLIMITED = 100_000  # columns
_CLOSING = """The steps stand in nnsight/demo_steps.py. All tokens at once, and as a picture:
  nnsight lens "The Eiffel Tower is in the city of"
  nnsight lens "The Eiffel Tower is in the city of" --html lens.html"""

app = typer.Typer(
    help="Read, change and recompute the inner values of a language model while it runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nnsight {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version, and leave.")
    ] = False,
) -> None:
    pass


def _in_a_folder(file: Path | None) -> Path | None:
    """Looked at before the model runs, which may take a while."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}")
    return file


@app.command()
def lens(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model reads.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The bundled model, a folder, or a name on the Hugging Face hub.")
    ] = BUNDLED,
    top: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many candidates are listed: below the table for the last token, and in each cell of the HTML.",
        ),
    ] = 5,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write the picture to this file.", show_default=False, dir_okay=False, callback=_in_a_folder
        ),
    ] = None,
) -> None:
    """What the model would say next if it stopped after each layer: layers by tokens."""
    with _readable_errors():
        network = _load(model, _opened)
        from nnsight.analysis import logit_lens
        from nnsight.plots import Answer, AnswerTable, LensTable, lens_html

        result = logit_lens(network, prompt, top_k=top)
        console = _console(wide=True)
        console.print(LensTable(result))
        at, where = _asked_about(network, result)
        said = [Answer(str(rank), *word) for rank, word in enumerate(result.top(-1, at), start=1)]
        console.print("", Text(f"{where}, after the last layer:", style="dim"), AnswerTable(said), sep="\n")
        if html is not None:
            _write(html, lens_html(result))


def _asked_about(network: LanguageModel, lens: Lens) -> tuple[int, str]:
    """The token whose prediction is the answer, and what that is called: the first mask, or what follows the last."""
    if network.task != "fill-mask":
        return -1, "next"
    mask = getattr(network.tokenizer, "mask_token", None)
    at = lens.tokens.index(mask) if mask in lens.tokens else len(lens.tokens) - 1
    return at, f"in the place of {lens.tokens[at]}"


@app.command()
def verify(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The bundled model, a folder, or a name on the Hugging Face hub."),
    ] = BUNDLED,
) -> None:
    """Prove by numbers that the uniform names of a model mean what they say. Exit code 1 where a check fails."""
    with _readable_errors():
        network = _load(model, _opened_with_its_head)
        from nnsight.anatomy.verify import verify as checks_of
        from nnsight.plots import CheckTable

        report = checks_of(network)
        _console(wide=True).print(CheckTable(report))
        if not report:
            raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Show in under a minute what the library does, on the model that comes with it, and the Python that does it."""
    with _readable_errors():
        began = time.perf_counter()
        network = _load(BUNDLED, _opened)
        from nnsight.demo_steps import STEPS
        from nnsight.plots import AnswerTable, python_text

        console = _console()
        for step, shown in STEPS:
            console.print(Rule(Text(step.__name__, style="bold"), align="left", style="dim"))
            for function in shown:
                console.print(python_text(inspect.getsource(function)), "\n", soft_wrap=True, sep="")
            console.print(Padding(AnswerTable(step(network)), (0, 0, 1, 4), expand=False))
        took = time.perf_counter() - began
        console.print(Rule(f"{took:.0f} seconds", align="left", style="dim"))
        console.print(_CLOSING, soft_wrap=True)


def _console(wide: bool = False) -> Console:
    """Standard output; where that is no terminal and `wide`, nothing has to be cut to a width."""
    console = Console(highlight=False)
    return console if console.is_terminal or not wide else Console(highlight=False, width=_UNLIMITED)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Error(f"{file} can't be written: {error.strerror}.") from error
    Console(stderr=True, soft_wrap=True).print(Text(f"written: {file}"))


@contextmanager
def _readable_errors() -> Iterator[None]:
    """An error of the library's becomes a message on stderr and exit code 1; a bug keeps its traceback."""
    try:
        yield
    except Error as error:
        said = str(error)
        if isinstance(error, InputError):
            what, _, rows = said.partition("\n\n")
            said = f"{what}\n\nIn Python:\n\n{rows}" if rows else what
        kind = "" if type(error) is Error else f"{type(error).__name__}: "
        Console(stderr=True, soft_wrap=True).print(Text(f"{kind}{said}", style="red"))
        raise typer.Exit(1) from None


def _opened(name: str) -> LanguageModel:
    """A model of text, or of text and images."""
    from nnsight import LanguageModel, VisionLanguageModel

    try:
        return LanguageModel(name)
    except ModelError as refusal:
        try:
            return VisionLanguageModel(name)
        except ModelError:
            raise refusal from None


def _opened_with_its_head(name: str) -> TransformersModel:
    """A model for the task that its config names: also one that says no tokens."""
    from nnsight import TransformersModel
    from nnsight.models.tasks import READ_IMAGES, SAY_TOKENS

    model = TransformersModel(name)
    return _opened(name) if model.task in (None, READ_IMAGES, *SAY_TOKENS) else model


def _load(name: str, opened: Callable[[str], Model]) -> Model:
    """A model with its weights. A spinner turns meanwhile, but where transformers has a progress bar of its own."""
    console = Console(stderr=True)
    with console.status("importing transformers"):
        from nnsight.models import language  # noqa: F401  which takes long
    with console.status(Text(f"loading {name}")):
        model = opened(name)
        if name == BUNDLED or Path(name).is_dir():
            model.dispatch()
    model.dispatch()
    return model
