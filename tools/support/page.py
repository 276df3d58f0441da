"""Writes docs/support.md from what table.py found, with the newest transformers and with the oldest.

python tools/support/page.py NEWEST.json OLDEST.json
"""

import json
import pathlib
import sys

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "support.md"
HEAD = """# Which models have the uniform names

Each line is a kind of causal language model that transformers has. A tiny random model of it was built from its config
class, wrapped in `LanguageModel`, and checked by `nnsight.verify`: every number on this page was computed, none was
typed. `make support` makes the page anew.

- **●** the check holds, to within 1e-4 of the largest value, or bit for bit.
- **·** the model has no such thing: no attention in a state-space model, no plain sum where norms go over the whole
  stream.
- **✗** it does not hold; the reason stands below the table.

A kind without a stream of its own has what is inside its attention, and is not counted as whole.

"""
CHECKS = {
    "A layer's output is the next one's input": "hand on",
    "Input and what is added make the output": "sum",
    "Input + attn + mlp is the output": "attn + mlp",
    "Attention mixes tokens, the MLP doesn't": "mixing",
    "The last output projects to the logits": "project",
    "Patterns sum to one, and look back": "pattern",
    "Pattern times v is z": "pattern · v",
    "Weights W_Q, W_K, W_V make q, k and v": "W_Q W_K W_V",
    "z through W_O is the attention's output": "W_O",
    "Each write reaches the logits": "writes",
    "Writing back what was read changes nothing": "write back",
    "A padded batch is its prompts alone": "padding",
    "Act through down projection is mlp.output": "act · W_out",
    "Act is pre through the non-linearity": "pre, act",
    "Experts and shared add up to mlp.output": "experts",
    "An expert's act makes its output": "expert act",
    "Chosen experts have the largest logits": "router",
}
MARKS = {True: "●", False: "✗", None: "·"}


def is_whole(row):
    """Whether all checks hold, and it has a stream to be read: without one, it is whole in part only."""
    fails = "checks" not in row or any(passed is False for _, passed, _ in row["checks"])
    return not fails and in_part(row) is None


def in_part(row):
    """Why a kind has no stream that its layers hand on, where it has some of the names all the same."""
    first = "A layer's output is the next one's input"
    return next((why for name, passed, why in row.get("checks", ()) if name == first and passed is None), None)


def reason_of(row):
    if "failed" in row:
        return f"no tiny model: {row['failed']}"
    if (why := in_part(row)) is not None and all(passed is not False for _, passed, _ in row["checks"]):
        return f"in part, and what there is holds: {why.partition('; ')[0]}"
    reasons = "; ".join(f"{name}: {detail}" for name, passed, detail in row["checks"] if passed is False)
    return reasons + '; with `attn_implementation="eager"` it is whole' * bool(row.get("eager"))


def cell(row, check):
    marks = {name: MARKS[passed] for name, passed, _ in row.get("checks", ())}
    return marks.get(check, "")


def counted(found):
    whole = sum(map(is_whole, found["rows"]))
    total = len(found["rows"])
    return (
        f"transformers {found['transformers']}, torch {found['torch']}: **{whole} of {total} kinds verified whole** "
        f"({100 * whole / total:.0f} percent), in {found['seconds']:.0f} seconds on one thread."
    )


def page(newest, oldest, adapters):
    n_adapters = len({row["kind"] for row in newest["rows"]} & {*adapters})
    lines = [HEAD, counted(newest), "", counted(oldest), ""]
    lines += [f"{n_adapters} kind needed a fact that its tiny model can't show (`ADAPTERS` in anatomy/find.py).", ""]
    lines += [
        f"Models have their first {newest['layers']} layers here, or all, where that leaves out a kind of module.",
        "",
    ]
    lines += ["| kind | " + " | ".join(CHECKS.values()) + f" | {oldest['transformers']} |"]
    lines += ["|---|" + ":-:|" * (len(CHECKS) + 1)]
    before = {row["kind"]: row for row in oldest["rows"]}
    for row in newest["rows"]:
        cells = [cell(row, check) for check in CHECKS]
        old = before.get(row["kind"])
        cells.append("" if old is None else "whole" if is_whole(old) else "✗")
        lines.append(f"| {row['kind']} | " + " | ".join(cells) + " |")
    for found in (newest, oldest):
        lines += ["", f"## Not whole, with transformers {found['transformers']}", ""]
        lines += [f"- **{row['kind']}**: {escaped(reason_of(row))}" for row in found["rows"] if not is_whole(row)]
    return "\n".join(lines) + "\n"


def escaped(text):
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def main():
    from nnsight.anatomy.find import ADAPTERS

    newest, oldest = (json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:3])
    PAGE.write_text(page(newest, oldest, ADAPTERS))
    print(f"{PAGE}: {counted(newest)}")


if __name__ == "__main__":
    main()
