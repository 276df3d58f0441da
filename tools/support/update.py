"""Puts the rows of single kinds into docs/support.md, as table.py found them anew: rows, reasons and counts.

    python tools/support/table.py --kinds gemma2 doge --json FILE    # with the one transformers, or the other
    python tools/support/update.py FILE ...

The whole page is made by `make support`; the time that it says stays that of the last whole run.
"""

import json
import pathlib
import re
import sys

from page import CHECKS, PAGE, cell, escaped, is_whole, reason_of

ROW = re.compile(r"^\| (\S+) \|(.*)\|$")
NEEDS = {"expert act": "experts"}  # a new check's column, and the one without which it has nothing to check
REASON = re.compile(r"^- \*\*(\S+)\*\*: ")


def updated(text, found):
    """The page with one version's rows in the place of those that it has."""
    lines, newest = text.split("\n"), f"## Not whole, with transformers {found['transformers']}"
    is_newest = newest == next(line for line in lines if line.startswith("## Not whole"))
    rows = {row["kind"]: row for row in found["rows"]}
    lines = with_columns(lines)
    unknown = rows.keys() - {match[1] for line in lines if (match := ROW.match(line))}
    if newest not in lines or unknown:
        raise SystemExit(f"{PAGE} has no {newest!r}, or no rows of {sorted(unknown)}: make support")
    after = with_reasons([with_cells(line, rows, is_newest) for line in lines], rows, newest)
    more = n_whole(after, is_newest) - n_whole(lines, is_newest)  # the oldest has kinds that stand in no row
    return "\n".join(
        counted(line, more) if line.startswith(f"transformers {found['transformers']},") else line for line in after
    )


def with_columns(lines):
    """The table with columns for checks that it lacks: empty, but where there is nothing to be checked."""
    at = next(index for index, line in enumerate(lines) if line.startswith("| kind |"))
    have = [one.strip() for one in lines[at].split("|")[2:-2]]
    for index in range(at, len(lines)):
        if not lines[index].startswith("|"):
            break
        kind, *marks, old = (one.strip() for one in lines[index].split("|")[1:-1])
        if index == at + 1:
            continue
        cells = dict(zip(have, marks, strict=True))
        new = [cells[one] if one in have else one if index == at else new_cell(cells, one) for one in CHECKS.values()]
        lines[index] = f"| {kind} | " + " | ".join(new) + f" | {old} |"
    lines[at + 1] = "|---|" + ":-:|" * (len(CHECKS) + 1)
    return lines


def new_cell(cells, column):
    return "·" if cells[NEEDS[column]] == "·" else ""


def with_cells(line, rows, is_newest):
    match = ROW.match(line)
    if match is None or match[1] not in rows:
        return line
    row, cells = rows[match[1]], [one.strip() for one in match[2].split("|")]
    if is_newest:
        cells[: len(CHECKS)] = [cell(row, check) for check in CHECKS]
    else:
        cells[-1] = "whole" if is_whole(row) else "✗"
    return f"| {match[1]} | " + " | ".join(cells) + " |"


def with_reasons(lines, rows, heading):
    at = lines.index(heading) + 2
    end = next((index for index in range(at, len(lines)) if not REASON.match(lines[index])), len(lines))
    reasons = {REASON.match(line)[1]: line for line in lines[at:end]}
    for kind, row in rows.items():
        reasons.pop(kind, None)
        if not is_whole(row):
            reasons[kind] = f"- **{kind}**: {escaped(reason_of(row))}"
    order = [match[1] for line in lines if (match := ROW.match(line))]
    return [*lines[:at], *sorted(reasons.values(), key=lambda line: order.index(REASON.match(line)[1])), *lines[end:]]


def n_whole(lines, is_newest):
    kinds = [[one.strip() for one in match[2].split("|")] for line in lines if (match := ROW.match(line))]
    return sum("●" in one and "✗" not in one[:-1] if is_newest else one[-1] == "whole" for one in kinds)


def counted(line, more):
    whole, total = map(int, re.search(r"\*\*(\d+) of (\d+) kinds", line).groups())
    whole += more
    counts = f"**{whole} of {total} kinds verified whole** ({100 * whole / total:.0f} percent)"
    return re.sub(r"\*\*.*\*\* \(\d+ percent\)", counts, line)


def main():
    text = PAGE.read_text()
    for path in sys.argv[1:]:
        text = updated(text, json.loads(pathlib.Path(path).read_text()))
    PAGE.write_text(text)
    print("\n".join(line for line in text.split("\n") if line.startswith("transformers ")))


if __name__ == "__main__":
    main()
