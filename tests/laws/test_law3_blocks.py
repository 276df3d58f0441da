"""Law 3 for what a block can do beyond one forward pass: steps, rows, invokes, edits, gradients, operations.

Each kind has a generator of its own (`programs_steps.py` ...) which runs a random program with plain hooks, and as the
source that a user would write. A failure names the seed: `check(kind, seed)` replays it.
"""

import linecache

import programs
import programs_edits
import programs_gradients
import programs_mixed
import programs_rows
import programs_source
import programs_steps
import pytest

import nnsight

KINDS = {
    "steps": (programs_steps, programs.equal),
    "rows": (programs_rows, programs.close),  # their gradients are added up in another order
    "edits": (programs_edits, programs.equal),
    "gradients": (programs_gradients, programs.equal),
    "source": (programs_source, programs.equal),
    "mixed": (programs_mixed, programs.close),
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_equal_plain_torch_hooks(kind):
    for seed in range(260):
        check(kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gradients"])
def test_random_blocks_equal_plain_torch_hooks_with_a_thread(kind, monkeypatch):
    """But for gradients, which torch adds up, and computes, in the order of a number that it counts per thread."""
    monkeypatch.setattr(nnsight.CONFIG, "switch", "thread")
    for seed in range(10_000, 10_060):
        check(kind, seed, programs.close)


def drawn(kind, count):
    """The programs of some seeds, and what they come to with plain hooks."""
    of, _ = KINDS[kind]
    for seed in range(count):
        program = of.program(seed)
        yield program, of.with_hooks(of.module_of(seed), program)


def test_the_generator_draws_loops_of_every_kind():
    keys, acts, raised, kept = set(), set(), set(), 0
    for program, outcome in drawn("steps", 150):
        keys |= {"".join(c for c in loop.key if not c.isdigit()) for loop in program.loops}
        acts |= {item.act for loop in program.loops for _, item in loop.body}
        raised.add(outcome.raised)
        kept += len(outcome.kept)
    assert keys >= {"all", ":", "", "::", "[, ]"}
    assert acts >= {"read", "write", "edit", "augment", "skip", "call"}
    assert raised >= {None, "missed"}
    assert kept > 600


def test_the_generator_draws_rows_and_invokes_that_use_each_others_values():
    shapes, acts, raised, earlier, later, same = set(), set(), set(), 0, 0, 0
    for program, outcome in drawn("rows", 200):
        shapes.add((program.live, len(program.blocks), None in program.cuts))
        acts |= {(item.act, item.port) for block in program.blocks for item in block}
        raised.add(outcome.raised)
        binds = {item.name: (at, item) for at, block in enumerate(program.blocks) for item in block}
        for at, block in enumerate(program.blocks):
            for item in block:
                for by, giver in (binds[name] for name in item.needs()):
                    earlier, later = earlier + (by < at), later + (by > at)
                    same += by != at and giver.path == item.path and giver.port == item.port
    assert shapes >= {(True, 1, False), (False, 2, False), (False, 3, True), (False, 2, True), (False, 4, True)}
    assert acts >= {("stop", None), ("read", "result"), ("write", "out"), ("write", "in"), ("edit", "out")}
    assert raised >= {None, "missed"}
    assert min(earlier, later) > 15
    assert same > 3


def test_the_generator_draws_edits_in_every_form():
    forms, numbers, acts = set(), set(), set()
    for program, _ in drawn("edits", 100):
        numbers.add(len(program.edits))
        forms |= {(edit.form, edit.inplace, edit.owner != "") for edit in program.edits}
        acts |= {item.act for edit in program.edits for item in edit.items}
    assert numbers == {1, 2, 3}
    wanted = {("function", False), ("decorator", False), ("with", False), ("function", True), ("with", True)}
    assert {(form, below) for form, _, below in forms} >= wanted
    assert acts >= {"read", "write", "edit", "augment", "skip", "call"}


def test_the_generator_draws_gradients_that_are_read_and_changed():
    forms, acts, asked = set(), set(), 0
    for program, _ in drawn("gradients", 100):
        forms.add((program.form, program.function_first))
        acts |= {act for act, _ in program.asked}
        asked += len(program.asked)
    assert forms == {(form, first) for form in ("method", "function", "after", "plain") for first in (True, False)}
    assert acts == {"read", "scale", "ones"}
    assert asked > 150


def test_the_generator_draws_operations_of_every_kind():
    places, acts = set(), set()
    for program, _ in drawn("source", 150):
        places |= {item.path.rstrip("0123456789") for item in program.items}
        acts |= {(item.act, item.port) for item in program.items}
    assert {"source.torch_tanh_", "source.self_lin_", "source.a_", "source.x_", "lin", ""} <= places
    assert any("helper_0.source.torch_mul" in place for place in places)
    assert acts >= {("skip", "skip"), ("write", "ins"), ("edit", "in"), ("augment", "out")}


def test_the_generator_draws_combinations_of_them_all():
    found, acts, raised, ends, cached = set(), set(), set(), set(), 0
    for program, outcome in drawn("mixed", 400):
        found.add((program.form, program.n > 0, len(program.edits) > 0))
        items = [item for block in program.blocks for item in (*block.first, *block.body)]
        acts |= {item.act for item in items}
        ends |= {"caught"} if any(getattr(item, "caught", False) for item in items) else set()
        ends |= {"break"} if any(block.breaks[0] is not None for block in program.blocks) else set()
        raised.add(outcome.raised)
        cached += program.cache
    assert found == {(form, n, edits) for form in ("whole", "rows", "invokes") for n in (0, 1) for edits in (0, 1)}
    assert acts >= {"read", "write", "edit", "augment", "skip", "call", "nested", "raise", "return", "stop"}
    assert ends == {"caught", "break"}
    assert raised >= {None, "missed", "late", "thrown"}
    assert cached > 20
