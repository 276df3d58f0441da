"""Makes the bundled model from nothing, all stages of stages.py in order, and its card: `make model`.

On two cores it takes two hours or more. The folder gets a subfolder per stage and `model`, the last one with its card.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from stages import STAGES

HERE = Path(__file__).parent


def run(script: str, *args: object) -> None:
    subprocess.run([sys.executable, str(HERE / script), *map(str, args)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument(
        "--batches", type=int, help="batches of every stage, for a trial without a card (each has its own number)"
    )
    args = parser.parse_args()
    start: list[object] = []
    for number, stage in enumerate(STAGES, 1):
        out = args.folder / f"stage-{number}"
        batches = args.batches or stage.batches
        print(
            f"== stage {number} of {len(STAGES)}: {batches} batches (the committed one took {stage.minutes} minutes)",
            flush=True,
        )
        run("train.py", "--stage", number, "--out", out, "--batches", batches, *start)
        start = ["--start", out]
    shutil.copytree(out, args.folder / "model", dirs_exist_ok=True)
    if not args.batches:
        run("card.py", args.folder / "model")


if __name__ == "__main__":
    main()
