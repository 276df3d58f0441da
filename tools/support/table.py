"""Verifies a tiny random model of every causal language model type that transformers has, and writes docs/support.md.

    python tools/support/table.py                      # all types, into docs/support.md
    python tools/support/table.py --kinds llama mamba  # these, printed
    python tools/support/table.py --json FILE          # the results as data, for the page that shows two versions
    python tools/support/table.py --device cuda        # the models are there; the page is of the CPU

Each type runs in a process of its own, so that one that hangs or ends its process is a row like any other.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback

import page

SECONDS = 300
ROOT = pathlib.Path(__file__).parents[2]
CHUNK = 8


def kinds_known():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def work(kinds, n_layers, device):
    """In the process of its own: a line of JSON for each type."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    from build import build

    import nnsight
    from nnsight.anatomy.verify import verify

    torch.set_num_threads(1)
    for kind in kinds:
        began = time.perf_counter()
        try:
            model = made(build, kind, n_layers).to(device)
        except Exception as error:  # noqa: BLE001  any type may fail in any way, and that is its row
            row = {"failed": told(error) + of_large(kind, error)}
        else:
            report = verify(nnsight.LanguageModel(model))
            row = {"checks": [[check.name, check.passed, check.detail] for check in report.checks]}
            if not report and model.config._attn_implementation != "eager":
                row["eager"] = is_whole_eagerly(model)
        print("\n" + json.dumps({"kind": kind, "seconds": time.perf_counter() - began, **row}), flush=True)


def told(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def of_large(kind, error):
    """What to say where the model of the large config fails in the same way: then it isn't made small wrongly."""
    from build import run_large

    try:
        run_large(kind, error.config)
    except Exception as other:  # noqa: BLE001  whatever it is, it is told
        if type(other) is not type(error):
            return ""
        frames = traceback.extract_tb(other.__traceback__)
        own = [frame for frame in frames if f"{os.sep}models{os.sep}" in frame.filename] or frames
        at = f"`{own[-1].line}`, line {own[-1].lineno} of {pathlib.Path(own[-1].filename).name}"
        return f"; of the large config, too, no model runs: {told(other)}, at {at}"
    return ""


def is_whole_eagerly(model):
    """Whether a model that isn't whole is so with transformers' eager attention: then sdpa is given something else."""
    import nnsight

    try:
        model.set_attn_implementation("eager")
        return bool(nnsight.verify(nnsight.LanguageModel(model)))
    except Exception:  # noqa: BLE001  it is not, whatever happens
        return False


def made(build, kind, n_layers):
    """A tiny model of few layers; of all, where its layers can't be cut, or the first few aren't of all kinds."""
    whole = build(kind)[0]
    try:
        few = build(kind, n_layers=n_layers)[0]
    except Exception:  # noqa: BLE001  whatever it is, the whole one was built
        return whole
    return few if kinds_in(few) == kinds_in(whole) else whole


def kinds_in(model):
    return {type(module) for module in model.modules()}


def results(kinds, n_layers, device="cpu", script=__file__):
    """The rows of all types, in order. A process that ends in the middle leaves the rest to another one."""
    rows, left = {}, list(kinds)
    while left:
        chunk = left[:CHUNK]
        options = ["--layers", str(n_layers), "--device", device, "--kinds", *chunk]
        command = [sys.executable, str(script), "--work", *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=ROOT, check=False
            )
            printed, ended = run.stdout, f"the process ended with {run.returncode}: {run.stderr.strip()[-200:]}"
        except subprocess.TimeoutExpired as late:
            printed, ended = (late.stdout or b"").decode(), f"it took more than {SECONDS} seconds"
        done = [json.loads(line) for line in printed.splitlines() if line.startswith('{"kind"')]
        for row in done:
            rows[row["kind"]] = row
            print_row(row)
        if len(done) < len(chunk):
            lost = chunk[len(done)]
            rows[lost] = {"kind": lost, "seconds": 0.0, "failed": ended}
            print_row(rows[lost])
        left = [kind for kind in left if kind not in rows]
    return [rows[kind] for kind in kinds]


def print_row(row):
    failed = "" if page.is_whole(row) else page.reason_of(row)
    print(f"{row['kind']:28}{row['seconds']:6.1f} s  {failed or 'whole'}"[:240], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.kinds, asked.layers, asked.device)
        return
    began = time.perf_counter()
    rows = results(asked.kinds or kinds_known(), asked.layers, asked.device)
    whole = sum(map(page.is_whole, rows))
    print(f"{whole} of {len(rows)} verified whole, in {time.perf_counter() - began:.0f} s")
    if asked.json:
        import torch
        import transformers

        about = {"transformers": transformers.__version__, "torch": torch.__version__, "layers": asked.layers}
        asked.json.write_text(json.dumps({**about, "seconds": time.perf_counter() - began, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
