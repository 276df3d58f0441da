"""The few settings of the library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Config:
    """Settings for the whole process; `nnsight.CONFIG` is the one instance.

    Attributes:
        switch: How a model's stack is kept apart from the block's: "greenlet", "thread" (slower, and needs no care of
            C++ stacks), or "auto", which takes threads only where `TORCH_SHOW_CPP_STACKTRACES` is set.
    """

    switch: str = "auto"


CONFIG = Config()
