"""Builds a tiny random model of every causal language model type that the installed transformers has, and runs it once.

    python tools/support/build.py            # all types
    python tools/support/build.py llama bart # these
    python tools/support/build.py --parts    # and compare the modules, layer by layer, with those of the large model

Prints a line per type: how long it took, how many parameters it has, and which fields of the default config had to be
filled in; or why it can't be built.
"""

import argparse
import os
import re
import time
import warnings
from dataclasses import dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from defaults import complete, default_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.anatomy.tiny.leaves import configs
from nnsight.core.fakes import ValuelessMode

TRIES = 5
EXPERT = re.compile(r"(?<=experts\.)\d+")


@dataclass
class Row:
    """What became of one type."""

    kind: str
    seconds: float = 0.0
    parameters: int = 0
    shape: tuple[int, ...] = ()
    filled: list[str] = field(default_factory=list)
    parts: str = ""
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.kind:28} no    {self.reason}"
        size = f"{self.seconds:5.2f} s  {self.parameters / 1e6:5.2f} M"
        filled = f"  default config without {', '.join(self.filled)}" if self.filled else ""
        return f"{self.kind:28} ok    {size}  {list(self.shape)}{self.parts}{filled}"


def build(kind: str, **options: int) -> tuple[torch.nn.Module, PreTrainedConfig, list[str]]:
    """A tiny model of a type, the large config that it is made of, and the fields that the config lacked by default."""
    config, filled = default_config(kind), []
    auto = class_of(kind, config)
    for _ in range(TRIES):
        try:
            return tiny_model(config, auto, **options), config, filled
        except Exception as error:
            names = complete(config, error)
            if not names:
                error.config = config
                raise
            filled += names
    return tiny_model(config, auto, **options), config, filled


def run_large(kind: str, config: PreTrainedConfig) -> None:
    """Run the model of a type's config once, as large as it is: without weights."""
    auto = class_of(kind, config)
    with ValuelessMode(), torch.no_grad():
        model = auto.from_config(config) if auto is AutoModelForCausalLM else auto(config)
        model(torch.zeros(2, 7, dtype=torch.long), use_cache=False)


def class_of(kind: str, config: PreTrainedConfig) -> type:
    """What makes a model of a type's config."""
    own: type = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    return AutoModelForCausalLM if type(config) is CONFIG_MAPPING[kind] else own


def compared(model: torch.nn.Module, config: PreTrainedConfig) -> str:
    """Whether the tiny model has the large one's modules: the same classes in the same places, experts of a list as
    one."""
    inner = next(one for one in configs(config) if isinstance(one, type(model.config)))
    with torch.device("meta"):
        large = type(model)._from_config(inner)
    ours, theirs = (
        {(EXPERT.sub("*", path), type(one)) for path, one in each.named_modules()} for each in (model, large)
    )
    different = sorted({path for path, _ in ours ^ theirs})
    return f"  parts differ: {', '.join(different[:3])} ..." if different else "  same parts"


def row(kind: str, parts: bool) -> Row:
    """Build one type, run it, and look at its logits."""
    started = time.perf_counter()
    try:
        model, config, filled = build(kind)
        comparison = compared(model, config) if parts else ""
        ids, inputs = tiny_ids(model)
        with torch.no_grad():
            logits = model(ids, **inputs).logits
    except Exception as error:  # noqa: BLE001 - reported, as the table's row
        return Row(kind, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if not torch.isfinite(logits).all():
        return Row(kind, reason="its logits are not finite")
    count = sum(parameter.numel() for parameter in model.parameters())
    return Row(kind, time.perf_counter() - started, count, tuple(logits.shape), filled, comparison)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="types to build; all by default")
    parser.add_argument("--parts", action="store_true", help="compare the modules with the large model's")
    asked = parser.parse_args()
    kinds = asked.kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    started, rows = time.perf_counter(), []
    for kind in kinds:
        rows.append(row(kind, asked.parts))
        print(rows[-1], flush=True)
    built = [one for one in rows if not one.reason]
    filled = sum(bool(one.filled) for one in built)
    print(
        f"\ntransformers {transformers.__version__}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s:"
    )
    print(f"{len(built)} of {len(rows)} built and run, {filled} of them from a default config with fields filled in")
    if asked.parts:
        print(f"{sum('same' in one.parts for one in built)} with the same parts as the large model")


if __name__ == "__main__":
    main()
