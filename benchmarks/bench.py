"""What a trace costs above the bare forward pass: by hand, with this library, and with the package of that name.

    make bench                                    also makes the environment of the other package, the first time
    python benchmarks/bench.py --widths 64        options: --help

Every variant runs in small batches, round robin, in one process for each environment (worker.py). Each of its passes
has a bare pass right beside it, so that a machine that slows down slows both, and the figure is the median of the
differences. The clock is the process's own, which stands while other programs run. On another `--device` it is the one
on the wall, and each pass ends when the device has done all of it.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections import defaultdict

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

IMPORTS = ("import nnsight", "from nnsight import NNsight")  # the first puts off what the second needs
WORKER = pathlib.Path(__file__).with_name("worker.py")
COLUMNS = {
    "torch": "plain torch",
    "nnsight": "NNsight",
    "language": "LanguageModel",
    "peer": "nnsight 0.8.1",
}
# What a trace adds to a forward pass, in microseconds.
ADDED = {
    "greenlet": "bare forward in a bare greenlet",
    "pause at one": "the same, a hook that switches: one layer",
    "pause at twelve": "the same, twelve layers",
    "empty trace": "empty trace",
    "read one": "read one layer",
    "read twelve": "read twelve layers",
    "write one": "write one layer",
    "heads of one": "q, k, v and z of one layer",
    "read one and stop": "read layer 5 of 12 and stop",
    "wrapped, no trace": "a wrapped model outside a trace",
    "first trace": "a first trace (wrapping, one read)",
}
# What a whole program costs, as a ratio to the same with plain hooks.
WHOLE = {
    "steer each step": "20 tokens, a vector added in each step",
    "read twelve in each step": "20 tokens, twelve layers read in each",
    "patch rows": "two prompts, one patched from the other: rows",
    "patch invokes": "the same: invokes",
    "cache twelve": "cache twelve layers",
    "cache all": "cache all modules",
    "read in a forward": "read an operation inside a forward",
    "grad twelve": "gradients of twelve layers, `nnsight.grad`",
    "backward twelve": "the same: `with loss.backward():`",
}
# At width 64, what must be reached: a figure, or one from that of plain hooks. Half of it is the aim.
LIMITS = {
    "empty trace": lambda hooks: 60,
    "read one": lambda hooks: 80,
    "read twelve": lambda hooks: 1.25 * hooks + 60,
    "heads of one": lambda hooks: 60,
    "wrapped, no trace": lambda hooks: 0,
}
# At every width, as ratios.
AIMS = {"steer each step": 1.03, "cache twelve": 1.1, "cache all": 1.1}


def environment_of(python):
    """A PYTHONPATH that is set for this library would have the other environment import it, too."""
    foreign = set() if python == sys.executable else {"PYTHONPATH"}
    return {name: value for name, value in os.environ.items() if name not in foreign}


class Worker:
    """A process that times batches in one environment."""

    def __init__(self, python, device, *libraries):
        environment = {
            **environment_of(python),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if device == "cpu":  # the other package moves a model to a GPU where there is one
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [python, str(WORKER), device, *libraries],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.hello = self.hear()

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks/worker.py ended with {self.process.wait()}, see above")
        return json.loads(line)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def pairs(self, variant, count):
        library, row = variant
        return self.ask(library=library, row=row, count=count)["pairs"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(workers, width, rounds, count, progress):
    """The seconds of every pass of every variant, each with those of the bare pass beside it."""
    variants = {name: [tuple(v) for v in worker.ask(width=width)["variants"]] for name, worker in workers.items()}
    wanted = {name: chosen(found, ours=name == "ours") for name, found in variants.items()}
    task = progress.add_task(f"width {width}", total=rounds)
    for name, worker in workers.items():
        for variant in wanted[name]:
            worker.pairs(variant, 5)
    pairs = defaultdict(list)
    for _ in range(rounds):
        for name, worker in workers.items():
            for library, row in wanted[name]:
                pairs[library if name == "ours" else "peer", row] += worker.pairs((library, row), count)
        progress.advance(task)
    return pairs


def chosen(found, *, ours):
    """Plain torch is timed in our process; of the other package, LanguageModel only for what NNsight can't do there."""
    if ours:
        return [(library, row) for library, row in found if row != "bare"]
    return [
        (library, row)
        for library, row in found
        if library == "nnsight" or (library == "language" and ("nnsight", row) not in found)
    ]


def import_milliseconds(python, statement):
    code = f"import time, torch; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    # An installed package is compiled already; where bytecode isn't written, every import would compile it anew.
    environment = environment_of(python)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout) * 1e3


def import_times(pythons, repeats, progress):
    """Milliseconds that importing takes once torch is imported."""
    if not repeats:
        return {}
    task = progress.add_task("import", total=(repeats + 1) * len(pythons) * len(IMPORTS))
    times = defaultdict(list)
    for i in range(repeats + 1):
        for name, python in pythons.items():
            for statement in IMPORTS:
                taken = import_milliseconds(python, statement)
                if i:  # the first compiles
                    times[name, statement].append(taken)
                progress.advance(task)
    return {key: statistics.median(taken) for key, taken in times.items()}


def shown(values, digits=0):
    """The median, with twice its standard error, estimated from the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    error = 2 * 1.25 * (high - low) / 1.35 / len(values) ** 0.5
    return f"{middle:,.{digits}f} [dim]±{error:,.{digits}f}[/dim]"


def added(pairs):
    return [(seconds - floor) * 1e6 for seconds, floor in pairs]


def new_table(title, columns, last):
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(COLUMNS[column], justify="right")
    for each in last:
        table.add_column(each, justify="right")
    return table


def table_of_added(width, pairs, columns, device):
    """Microseconds above the bare pass: the median of the differences within each pair."""
    limited = width == 64 and device == "cpu"
    title = f"GPT-2 of 12 layers and width {width}, 10 tokens, {device}: microseconds above the bare forward pass"
    table = new_table(title, columns, ["at most", "aim"] if limited else [])
    floors = {column: [floor * 1e6 for _, floor in pairs[column, "read one"]] for column in columns}
    table.add_row("bare forward, whole", *[shown(floors[column]) for column in columns])
    for row, title in ADDED.items():
        hooks = statistics.median(added(pairs["torch", row])) if pairs.get(("torch", row)) else None
        cells = [shown(added(pairs[column, row])) if pairs.get((column, row)) else "-" for column in columns]
        limit = LIMITS[row](hooks) if row in LIMITS else None
        last = ["", ""] if limit is None else [f"{limit:,.0f}", f"{limit / 2:,.0f}"]
        table.add_row(title, *cells, *(last if limited else []))
    return table


def table_of_whole(width, pairs, columns, device):
    """Whole runs as a ratio to plain hooks, each first taken as a ratio to the bare pass beside it."""
    title = f"width {width}, {device}: whole runs, plain hooks in ms, the others as a ratio to them"
    table = new_table(title, columns, ["aim"])
    for row, title in WHOLE.items():
        hooks = relative(pairs["torch", row])
        cells = [f"{statistics.median(seconds for seconds, _ in pairs['torch', row]) * 1e3:,.2f}"]
        for column in columns[1:]:
            found = relative(pairs.get((column, row), []))
            by_hand = statistics.median(hooks)
            cells.append(shown([value / by_hand for value in found], digits=3) if found else "-")
        table.add_row(title, *cells, f"{AIMS[row]:.2f}" if row in AIMS else "")
    return table


def relative(pairs):
    return [seconds / floor for seconds, floor in pairs]


def as_json(width, pairs):
    return {
        "width": width,
        "bare_us": statistics.median(floor for _, floor in pairs["torch", "read one"]) * 1e6,
        "added_us": {f"{column}: {row}": statistics.median(added(found)) for (column, row), found in pairs.items()},
        "relative": {f"{column}: {row}": statistics.median(relative(found)) for (column, row), found in pairs.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", type=pathlib.Path, default=pathlib.Path(".venv-peer"), help="environment of nnsight 0.8.1"
    )
    parser.add_argument("--device", default="cpu", help="where the model is: cuda, for one")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 768])
    parser.add_argument(
        "--rounds", type=int, default=60, help="rounds at width 64, two or more; a third of it at others"
    )
    parser.add_argument("--imports", type=int, default=7, help="how often each import is timed")
    parser.add_argument("--without-language", action="store_true", help="leave LanguageModel out")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there too")
    options = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 130)
    peer = options.peer / "bin" / "python"
    pythons = {"ours": sys.executable} | ({"peer": str(peer)} if peer.exists() else {})
    if "peer" not in pythons:
        console.print(
            f"no environment of nnsight 0.8.1 in {options.peer} (`make peer` makes it): its column is left out"
        )
    ours = ["nnsight"] if options.without_language else ["nnsight", "language"]
    columns = ["torch", *ours, *(["peer"] if "peer" in pythons else [])]

    written = []
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(bars)
        workers = {
            name: Worker(python, options.device, *(ours if name == "ours" else ["nnsight", "language"]))
            for name, python in pythons.items()
        }
        for worker in workers.values():
            stack.callback(worker.close)
        versions = ", ".join(f"nnsight {w.hello['version']} with torch {w.hello['torch']}" for w in workers.values())
        tables = []
        for width in options.widths:
            rounds = max(2, options.rounds) if width <= 128 else max(3, options.rounds // 3)
            pairs = measure(workers, width, rounds, 8, bars)
            tables += [table(width, pairs, columns, options.device) for table in (table_of_added, table_of_whole)]
            written.append(as_json(width, pairs))
        imports = import_times(pythons, options.imports, bars)

    for each in tables:
        console.print(each)
    console.print("± is twice the standard error of the median.")
    for (name, statement), milliseconds in imports.items():
        which = COLUMNS["peer"] if name == "peer" else "this one"
        console.print(f"{statement}, once torch is imported: {milliseconds:,.1f} ms ({which})")
    console.print(f"One thread, Python {sys.version.split()[0]}; {versions}.")
    if options.json:
        options.json.write_text(
            json.dumps({"tables": written, "import_ms": {": ".join(key): ms for key, ms in imports.items()}}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
