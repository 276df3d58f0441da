"""Verifies a tiny model of every type with another head than the next token's, and writes docs/support-others.md.

    python tools/support/others.py                        # all types, into docs/support-others.md
    python tools/support/others.py --kinds fill-mask/bert # these, printed

A type is a task and a type of config: those that fill in masks, encoders with decoders, those that hear or see. Each
runs in a process of its own, as in table.py, and with the defaults of its config, as far as these can be made tiny.
"""

import argparse
import json
import pathlib
import re
import time

import page
import table

PAGE = table.ROOT / "docs" / "support-others.md"
MAPPINGS = {
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text2text-generation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "automatic-speech-recognition": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
TITLES = {
    "fill-mask": "Filling in masks",
    "text2text-generation": "Encoder and decoder",
    "automatic-speech-recognition": "Speech",
    "image-text-to-text": "Text and images",
}
HEAD = """# Other kinds of model with the uniform names

As [Which models have the uniform names](support.md), for other heads than the next token's: a tiny random model of each
kind that transformers has was built from the defaults of its config class, wrapped, and checked by `nnsight.verify`; of
an encoder-decoder, both halves and what crosses over; of a model that sees, the language model inside, on text alone.
Models have their first 3 layers here, or 6, where these can't run alone.
Where the defaults could not be made tiny, that is the reason given. `python tools/support/others.py` makes the page.

"""


def kinds_known():
    from transformers.models.auto import modeling_auto

    return [f"{task}/{kind}" for task, mapping in MAPPINGS.items() for kind in getattr(modeling_auto, mapping)]


def work(kinds, n_layers, device):
    """In the process of its own: a line of JSON for each type."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    import transformers

    import nnsight
    from nnsight.models.tasks import CLASSES

    torch.set_num_threads(1)
    for asked in kinds:
        task, _, kind = asked.partition("/")
        began = time.perf_counter()
        try:
            config = transformers.CONFIG_MAPPING[kind]()
            auto = getattr(transformers, CLASSES[task][0])
            module = made(config, auto, n_layers).to(device)
            wrap = nnsight.VisionLanguageModel if task == "image-text-to-text" else nnsight.LanguageModel
            report = nnsight.verify(wrap(module))
        except Exception as error:  # noqa: BLE001  any type may fail in any way, and that is its row
            row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        else:
            row = {"checks": [[check.name, check.passed, check.detail] for check in report.checks]}
        print("\n" + json.dumps({"kind": asked, "seconds": time.perf_counter() - began, **row}), flush=True)


def made(config, auto, n_layers):
    """A tiny model of few layers; of more, where the first few can't run by themselves."""
    from nnsight.anatomy.tiny import tiny_model

    try:
        return tiny_model(config, auto, n_layers=n_layers)
    except Exception as error:  # noqa: BLE001  any type may fail in any way, and is tried again
        n_more = n_layers if with_sections(config, str(error)) else 2 * n_layers
        try:
            return tiny_model(config, auto, n_layers=n_more)
        except Exception as other:  # noqa: BLE001  whatever it is, the first is told
            raise (other if n_more == n_layers else error) from None


def with_sections(config, error):
    """Whether the sections of a rotary embedding were missing, which checkpoints' configs have, and are there now."""
    found = re.search(r"split_sizes=\[([\d, ]+)\]", error)
    if found is None:
        return False
    for one in {id(inner): inner for inner in (config.get_text_config(), config)}.values():
        if isinstance(getattr(one, "rope_parameters", None), dict):
            one.rope_parameters["mrope_section"] = [int(size) for size in found.group(1).split(",")]
            return True
    return False


def written(rows, seconds):
    import torch
    import transformers

    lines = [HEAD]
    whole = sum(map(page.is_whole, rows))
    lines += [
        f"transformers {transformers.__version__}, torch {torch.__version__}: "
        f"**{whole} of {len(rows)} kinds verified whole**, in {seconds:.0f} seconds on one thread.",
        "",
    ]
    for task, title in TITLES.items():
        own = [row for row in rows if row["kind"].startswith(f"{task}/")]
        whole = [row for row in own if page.is_whole(row)]
        lines += [f"## {title}", "", f"{len(whole)} of {len(own)} (`{task}`) verified whole:", ""]
        lines += [", ".join(name(row) for row in whole), "", "Not whole:", ""]
        lines += [f"- **{name(row)}**: {page.escaped(page.reason_of(row))}" for row in own if not page.is_whole(row)]
        lines += [""]
    return "\n".join(lines)


def name(row):
    return page.escaped(row["kind"].partition("/")[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.kinds, asked.layers, asked.device)
        return
    began = time.perf_counter()
    rows = table.results(asked.kinds or kinds_known(), asked.layers, asked.device, pathlib.Path(__file__).resolve())
    if not asked.kinds:
        PAGE.write_text(written(rows, time.perf_counter() - began))
    print(f"{sum(map(page.is_whole, rows))} of {len(rows)} verified whole")


if __name__ == "__main__":
    main()
