"""Draws docs/images/lens.png anew: what `nnsight lens --html` writes for the bundled model, photographed by Chromium.

    .venv/bin/python tools/picture.py                   docs/images/lens.png
    .venv/bin/python tools/picture.py --dark dark.png   on a dark page

Needs a Chromium (`apt-get install chromium`); CHROMIUM names it where it isn't on the path.
"""

import argparse
import os
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
import zlib

from nnsight import LanguageModel
from nnsight.analysis import logit_lens
from nnsight.plots import lens_html

ROOT = pathlib.Path(__file__).parents[1]
PROMPT = "The Eiffel Tower is in the city of"
SCALE = 2  # pixels of the picture to one of the page
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars""".split()
# Leaves the size of what there is to see in the page, for `--dump-dom`.
MEASURE = """<script>
const edges = [...document.querySelectorAll("h1, dl, table, footer")].map(e => e.getBoundingClientRect());
const size = [Math.max(...edges.map(e => e.right)), Math.max(...edges.map(e => e.bottom))].map(x => Math.ceil(x + 24));
document.body.dataset.size = size.join("x");
</script></body>"""


def first_rows(png, n_rows):
    """A PNG cut off below. A row is stored as its difference to the one above, so that the first ones stay valid."""
    at, chunks = 8, []
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += size + 12
    width, _, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, rest[-1]) == (8, 0), "a PNG of eight bits, not interlaced"
    row = 1 + width * {2: 3, 6: 4}[colour]
    pixels = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))[: n_rows * row]
    header = struct.pack(">IIBBBBB", width, n_rows, depth, colour, *rest)
    kept = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    return png[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in kept
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=ROOT / "docs/images/lens.png", type=pathlib.Path)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        parser.error("no Chromium found: apt-get install chromium, or set CHROMIUM")

    html = lens_html(logit_lens(LanguageModel("nnsight/demo"), options.prompt))
    with tempfile.TemporaryDirectory() as folder:
        page, probe = pathlib.Path(folder, "lens.html"), pathlib.Path(folder, "probe.html")
        page.write_text(html, encoding="utf-8")
        probe.write_text(html.replace("</body>", MEASURE), encoding="utf-8")

        def browse(file, *flags):
            scheme = [f"--blink-settings=preferredColorScheme={0 if options.dark else 1}"]
            command = [chromium, *QUIET, f"--user-data-dir={folder}/profile", *scheme, *flags, file.as_uri()]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

        measured = browse(probe, "--window-size=1200,900", "--dump-dom")
        width, height = map(int, re.search(r'data-size="(\d+)x(\d+)"', measured).groups())
        # Chromium counts a bar that isn't there into the window: the page gets less height, and the rest stays blank.
        shot = [f"--screenshot={options.file.resolve()}", f"--window-size={width},{height + 200}"]
        browse(page, f"--force-device-scale-factor={SCALE}", *shot)
    options.file.write_bytes(first_rows(options.file.read_bytes(), height * SCALE))
    print(f"{options.file}: {width} x {height}, {options.file.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
