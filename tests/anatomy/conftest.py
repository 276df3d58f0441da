"""Has `families.py` imported by its name."""

import pathlib
import sys

for folder in (pathlib.Path(__file__).parent, pathlib.Path(__file__).parent.parent / "models"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
