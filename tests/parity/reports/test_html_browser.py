"""The page in a real browser: needs Chromium (``apt-get install chromium``)."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from mtl_export.parity.reports.html import html_text
from tests.parity.reports.samples import REPORTS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "headless_shell")
SIZE = (1160, 2000)
LIGHT_PAGE, DARK_PAGE = (0xF6, 0xF7, 0xF9), (0x12, 0x15, 0x1A)
LIGHT_RED, DARK_RED = (0xC0, 0x27, 0x1B), (0xFF, 0x6F, 0x61)

pytestmark = pytest.mark.other_env


@pytest.fixture(scope="module")
def browser() -> str:
    """Return the browser's path."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


def run(browser: str, page: Path, *options: str) -> str:
    """Return what headless ``browser`` says after loading ``page``."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}",
             f"--window-size={SIZE[0]},{SIZE[1]}"]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, *options, page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    # What a page is refused, by its own policy or otherwise, is told on the console.
    assert not re.search(r"CONSOLE|Refused to", done.stderr), done.stderr
    return done.stdout


def pixels(path: Path) -> tuple[int, int, list[bytes]]:
    """Return width, bytes per pixel and rows of an 8-bit PNG."""
    content = path.read_bytes()
    width, _, _, colour = struct.unpack(">IIBB", content[16:26])
    size = {2: 3, 6: 4}[colour]
    data, at = b"", 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        data += content[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    raw, rows = zlib.decompress(data), [bytes(width * size)]
    for start in range(0, len(raw), width * size + 1):
        line = bytearray(raw[start + 1 : start + 1 + width * size])
        _unfilter(raw[start], line, rows[-1], size)
        rows.append(bytes(line))
    return width, size, rows[1:]


def _unfilter(kind: int, line: bytearray, above: bytes, size: int) -> None:
    """Undo a PNG row filter in place: https://www.w3.org/TR/png/#9Filter-types."""
    for i in range(len(line)):
        left = line[i - size] if i >= size else 0
        corner = above[i - size] if i >= size else 0
        up = above[i]
        if kind == 4:
            near = left + up - corner
            distances = (abs(near - left), abs(near - up), abs(near - corner))
            guess = (left, up, corner)[distances.index(min(distances))]
        else:
            guess = (0, left, up, (left + up) // 2)[kind]
        line[i] = (line[i] + guess) & 0xFF


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_drawn(browser: str, tmp_path: Path, dark: bool) -> None:
    """A screenshot has the page's colour and the red of what failed, in light and dark."""
    page = tmp_path / "parity.html"
    page.write_text(html_text(REPORTS["failing"]()), encoding="utf-8")
    picture = tmp_path / "page.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    run(browser, page, scheme, f"--screenshot={picture}")
    width, size, rows = pixels(picture)
    assert (width, len(rows)) == SIZE
    corner = tuple(rows[0][:3])
    assert corner == (DARK_PAGE if dark else LIGHT_PAGE)
    red = bytes(DARK_RED if dark else LIGHT_RED)
    count = sum(row[i : i + 3] == red for row in rows for i in range(0, len(row), size))
    assert count > 1000  # the squares of the heat maps


@pytest.mark.parametrize("kind", REPORTS)
def test_a_browser_reads_the_page_as_it_was_written(
    browser: str, tmp_path: Path, kind: str
) -> None:
    """Nothing is refused by the content policy, and no element is moved or dropped."""
    page = tmp_path / "parity.html"
    text = html_text(REPORTS[kind]())
    page.write_text(text, encoding="utf-8")
    seen = run(browser, page, "--dump-dom")
    for tag in ("section", "table", "svg", "rect", "circle", "path", "tr", "td", "details"):
        assert len(re.findall(f"<{tag}[ >]", seen)) == len(re.findall(f"<{tag}[ >/]", text)), tag
