"""The examples of README.md and docs/: found, run in their order, and compared with the output that the page shows.

A ```python block runs in the namespace of its page, as a file called example.py. A ```text block right behind it is
what it prints, and, where it raises, the error; `...` in it stands for anything, and how far rounding goes (below 1e-5)
is each processor's own. A block that stops in the debugger is answered with the commands behind the (Pdb) of that
output. `make pages` writes what is printed now into the pages.
"""

import contextlib
import doctest
import io
import itertools
import linecache
import os
import pathlib
import pdb
import re
import sys
import traceback
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = "example.py"
ROUNDING = re.compile(r"\b(0\.0e\+00|\d\.\de-(0[6-9]|[1-9]\d))\b")
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Example:
    """A block of a page: its code, where it stands, and the output that the page shows (None: it shows none)."""

    page: pathlib.Path
    line: int
    code: str
    shown: str | None
    shown_at: tuple[int, int] | None = None

    @property
    def place(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def examples_of(page):
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    examples = []
    for fence, following in itertools.zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        line = text.count("\n", 0, fence.start(2)) + 1
        prints = following and following[1] == "text" and not text[fence.end() : following.start()].strip()
        shown, shown_at = (following[2], following.span(2)) if prints else (None, None)
        examples.append(Example(page, line, fence[2], shown, shown_at))
    return examples


def run(example, names):
    """What the block prints; an error that it raises is printed below that, as Python prints its last lines."""
    # An error or a receipt shows lines of the block, with their numbers in it.
    for file in (FILE, os.path.abspath(FILE)):  # the debugger asks for the second
        linecache.cache[file] = (len(example.code), None, example.code.splitlines(keepends=True), file)
    code = compile(example.code, FILE, "exec", dont_inherit=True)
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed), typing(re.findall(r"^\(Pdb\) (.*\n)", example.shown or "", re.MULTILINE)):
        try:
            exec(code, names)
        except Exception as raised:  # noqa: BLE001 (it is returned, and compared)
            error = raised
    out = printed.getvalue()
    if error is not None:
        # The class is shown by its own name: its module is long, and no news.
        last = "".join(traceback.format_exception_only(type(error), error))
        out += re.sub(rf"^[\w.]*\b{type(error).__name__}\b", type(error).__name__, last)
    return trimmed(out), error


@contextlib.contextmanager
def typing(commands):
    """Answers `breakpoint()` with these lines, echoed as on a terminal."""
    commands = iter(commands)

    class Keyboard:
        def readline(self):
            command = next(commands, "")
            sys.stdout.write(command)
            return command

    def stop():
        # Without a readrc: a person's own settings are no part of a page.
        debugger = pdb.Pdb(stdin=Keyboard(), stdout=sys.stdout, nosigint=True, readrc=False)
        debugger.set_trace(sys._getframe(1))

    hook, tracer = sys.breakpointhook, sys.gettrace()
    sys.breakpointhook = stop
    try:
        yield
    finally:
        sys.breakpointhook = hook
        sys.settrace(tracer)


def trimmed(text):
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"


def namespace():
    return {"__name__": "__page__"}


def same(shown, printed):
    shown, printed = (ROUNDING.sub("rounding", text) for text in (trimmed(shown), printed))
    return doctest.OutputChecker().check_output(shown, printed, SAME)


def update(page):
    """Writes what the blocks print now into the page, where that differs from what it shows."""
    names, text, shift = namespace(), page.read_text(encoding="utf-8"), 0
    for example in examples_of(page):
        printed, error = run(example, names)
        if example.shown is None and error is not None:
            raise SystemExit(f"{example.place} raises, and shows no output:\n{printed}")
        if example.shown is None or same(example.shown, printed):
            continue
        begin, end = (at + shift for at in example.shown_at)
        text = text[:begin] + printed + text[end:]
        shift += len(printed) - len(example.shown)
        print(f"{example.place}: now prints\n{printed}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        update(pathlib.Path(name).resolve())
