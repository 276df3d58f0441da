"""Law 3 for what a block can do beyond one forward pass: steps, rows, invokes, edits, gradients, operations.

Each kind has a generator of its own (`programs_steps.py` ...) which runs a random program with plain hooks, and as the
source that a user would write. A failure names the seed: `check(kind, seed)` replays it.
"""

import linecache
import warnings

import programs
import programs_edits
import programs_rows
import programs_source
import programs_steps
import pytest

import nnsight

KINDS = {
    "steps": (programs_steps, programs.equal),
    "rows": (programs_rows, programs.close),  # their gradients are added up in another order
    "edits": (programs_edits, programs.equal),
    "source": (programs_source, programs.equal),
}


def check(kind, seed, grads=None):
    """Runs the program of a seed both ways; fails with the seed and the program as Python source."""
    of, compare = KINDS[kind]
    program = of.program(seed)
    expected = of.with_hooks(of.module_of(seed), program)
    module, source = of.module_of(seed), program.source()
    name = f"<{of.__name__} {seed}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    try:
        got = of.with_trace(nnsight.NNsight(module), module, program, nnsight.errors)
    except Exception as error:  # noqa: BLE001  the program has to be shown with it
        pytest.fail(f"{kind}, seed {seed} raised {error!r} on\n{module}\n\n{source}")
    if wrong := programs.difference(expected, got, grads or compare):
        pytest.fail(f"{kind}, seed {seed}, hooks / trace: {wrong}\n\non {module}\n\n{source}")
    return expected
