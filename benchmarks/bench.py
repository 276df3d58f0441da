"""What a trace costs above the bare forward pass: by hand, with this library, and with the package of that name.

    make bench                                    with the other package, once `make peer` has made its environment
    python benchmarks/bench.py --widths 64        options: --help

Every variant runs in small batches, round robin, in one process for each environment (worker.py). Each of its passes
has a bare pass right beside it, so that a machine that slows down slows both, and the figure is the median of the
differences. The clock is the process's own, which stands while other programs run.
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

WORKER = pathlib.Path(__file__).with_name("worker.py")
COLUMNS = {
    "torch": "plain torch",
    "nnsight": "NNsight",
    "language": "LanguageModel",
    "peer": "nnsight 0.8.1",
}
ROWS = {
    "greenlet": "bare forward in a bare greenlet",
    "empty trace": "empty trace",
    "read one": "read one layer",
    "read twelve": "read twelve layers",
    "write one": "write one layer",
    "read one and stop": "read layer 5 of 12 and stop",
    "cache twelve": "cache twelve layers",
    "cache all": "cache all modules",
    "steer each step": "20 tokens, a vector added in each step",
    "read twelve in each step": "20 tokens, twelve layers read in each",
    "wrapped, no trace": "a wrapped model outside a trace",
    "first trace": "a first trace (wrapping, one read)",
}
# At width 64, what the project set itself: a figure, or one from that of plain hooks.
AIMS = {
    "empty trace": lambda hooks: 60,
    "read one": lambda hooks: 80,
    "read twelve": lambda hooks: 1.25 * hooks + 60,
    "cache twelve": lambda hooks: 1.1 * hooks + 60,
    "cache all": lambda hooks: 1.1 * hooks + 60,
    "wrapped, no trace": lambda hooks: 0,
}


class Worker:
    """A process that times batches in one environment."""

    def __init__(self, python, *libraries):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [python, str(WORKER), *libraries],
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
    """Microseconds above the bare pass of every pass of every variant, and the bare passes of each worker."""
    variants = {name: [tuple(v) for v in worker.ask(width=width)["variants"]] for name, worker in workers.items()}
    # The rows of plain torch are this process's; in the other one only the bare pass is needed.
    wanted = {
        name: [(library, row) for library, row in found if row != "bare" and (name == "ours" or library != "torch")]
        for name, found in variants.items()
    }
    task = progress.add_task(f"width {width}", total=rounds)
    for name, worker in workers.items():
        for variant in wanted[name]:
            worker.pairs(variant, 5)
    above, bare = defaultdict(list), defaultdict(list)
    for _ in range(rounds):
        for name, worker in workers.items():
            for library, row in wanted[name]:
                pairs = worker.pairs((library, row), count)
                column = library if name == "ours" else "peer"
                above[column, row] += [(seconds - floor) * 1e6 for seconds, floor in pairs]
                bare[name, row.endswith("each step")] += [floor * 1e6 for _, floor in pairs]
        progress.advance(task)
    return above, bare


def import_seconds(python):
    work = "from nnsight import NNsight"  # a bare `import nnsight` may put off what this needs
    code = f"import time, torch; began = time.perf_counter(); {work}; print(time.perf_counter() - began)"
    return float(
        subprocess.run([python, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True).stdout
    )


def import_times(pythons, repeats, progress):
    """Milliseconds that `from nnsight import NNsight` takes once torch is imported."""
    task = progress.add_task("import", total=repeats * len(pythons))
    seconds = defaultdict(list)
    for _ in range(repeats):
        for name, python in pythons.items():
            seconds[name].append(import_seconds(python))
            progress.advance(task)
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


def shown(values):
    """The median, with twice its standard error, estimated from the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    error = 2 * 1.25 * (high - low) / 1.35 / len(values) ** 0.5
    return f"{middle:,.0f} [dim]±{error:,.0f}[/dim]"


def cell(values, hooks):
    if not values:
        return "-"
    value = statistics.median(values)
    ratio = f"  {value / hooks:5.1f}x" if hooks and hooks > 0 else ""
    return shown(values) + ratio


def table(width, above, bare, columns):
    result = Table(title=f"GPT-2 of 12 layers and width {width}, 10 tokens: microseconds above the bare forward pass")
    result.add_column("")
    for column in columns:
        result.add_column(COLUMNS[column], justify="right")
    aims = width == 64
    if aims:
        result.add_column("aim", justify="right")
    for title, generates in (("bare forward, whole", False), ("20 tokens bare, whole", True)):
        floors = [bare["peer" if column == "peer" else "ours", generates] for column in columns]
        result.add_row(title, *[shown(values) for values in floors])
    for row, title in ROWS.items():
        by_hand = above.get(("torch", row))
        hooks = statistics.median(by_hand) if by_hand and row != "greenlet" else None
        # A stopped pass is shorter than the bare one: differences, so no ratio.
        base = None if row == "read one and stop" else hooks
        cells = [cell(above.get((column, row)), base if column != "torch" else None) for column in columns]
        aim = [f"{AIMS[row](hooks):,.0f}" if row in AIMS else ""] if aims else []
        result.add_row(title, *cells, *aim)
    return result


def as_json(width, above, bare):
    return {
        "width": width,
        "bare": {
            f"{name}{' 20 tokens' if generates else ''}": statistics.median(values)
            for (name, generates), values in bare.items()
        },
        "above": {f"{column}: {row}": statistics.median(values) for (column, row), values in above.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", type=pathlib.Path, default=pathlib.Path(".venv-peer"), help="environment of nnsight 0.8.1"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 768])
    parser.add_argument("--rounds", type=int, default=60, help="rounds at width 64; a third of it at others")
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
        workers = {name: Worker(python, *(ours if name == "ours" else ["nnsight"])) for name, python in pythons.items()}
        for worker in workers.values():
            stack.callback(worker.close)
        versions = ", ".join(f"nnsight {w.hello['version']} with torch {w.hello['torch']}" for w in workers.values())
        tables = []
        for width in options.widths:
            rounds = options.rounds if width <= 128 else max(3, options.rounds // 3)
            above, bare = measure(workers, width, rounds, 8, bars)
            tables.append(table(width, above, bare, columns))
            written.append(as_json(width, above, bare))
        imports = import_times(pythons, options.imports, bars)

    for each in tables:
        console.print(each)
    console.print("± is twice the standard error of the median; x is the ratio to plain hooks.")
    for name, milliseconds in imports.items():
        which = COLUMNS["peer"] if name == "peer" else "this one"
        console.print(f"from nnsight import NNsight, once torch is imported: {milliseconds:,.0f} ms ({which})")
    console.print(f"One thread, Python {sys.version.split()[0]}; {versions}.")
    if options.json:
        options.json.write_text(json.dumps({"tables": written, "import_ms": imports}, indent=1) + "\n")


if __name__ == "__main__":
    main()
