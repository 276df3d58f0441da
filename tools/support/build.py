"""Builds a tiny random model of every causal language model type that the installed transformers has, and runs it once.

    python tools/support/build.py            # all types
    python tools/support/build.py llama t5   # these

Prints a line per type: how long it took, how many parameters it has, and which fields of the default config had to be filled in;
or why it can't be built.
"""

import argparse
import os
import time
import warnings
from dataclasses import dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from defaults import complete, default_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nnsight.anatomy.tiny import tiny_ids, tiny_model

TRIES = 5


@dataclass
class Row:
    """What became of one type."""

    kind: str
    seconds: float = 0.0
    parameters: int = 0
    shape: tuple[int, ...] = ()
    filled: list[str] = field(default_factory=list)
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.kind:28} no    {self.reason}"
        filled = f"  default config without {', '.join(self.filled)}" if self.filled else ""
        return f"{self.kind:28} ok    {self.seconds:5.2f} s  {self.parameters / 1e6:5.2f} M  {list(self.shape)}{filled}"


def build(kind: str) -> tuple[torch.nn.Module, list[str]]:
    """A tiny model of a type, and the fields that its default config lacked."""
    config, filled = default_config(kind), []
    own = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    auto = AutoModelForCausalLM if type(config) is CONFIG_MAPPING[kind] else own
    for _ in range(TRIES):
        try:
            return tiny_model(config, auto), filled
        except Exception as error:  # noqa: BLE001 - any code may fail in any way on an incomplete config; what isn't that is raised
            names = complete(config, error)
            if not names:
                raise
            filled += names
    return tiny_model(config, auto), filled


def row(kind: str) -> Row:
    """Build one type, run it, and look at its logits."""
    started = time.perf_counter()
    try:
        model, filled = build(kind)
        ids, inputs = tiny_ids(model)
        with torch.no_grad():
            logits = model(ids, **inputs).logits
    except Exception as error:  # noqa: BLE001 - reported, as the table's row
        return Row(kind, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if not torch.isfinite(logits).all():
        return Row(kind, reason="its logits are not finite")
    count = sum(parameter.numel() for parameter in model.parameters())
    return Row(kind, time.perf_counter() - started, count, tuple(logits.shape), filled)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="types to build; all by default")
    kinds = parser.parse_args().kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    started, rows = time.perf_counter(), []
    for kind in kinds:
        rows.append(row(kind))
        print(rows[-1], flush=True)
    built = [one for one in rows if not one.reason]
    filled = sum(bool(one.filled) for one in built)
    print(
        f"\ntransformers {transformers.__version__}, torch {torch.__version__}: {len(built)} of {len(rows)} built and run",
        end="",
    )
    print(f", {filled} of them from a default config with fields filled in, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
