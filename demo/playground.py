# SPDX-License-Identifier: Apache-2.0
"""``python -m demo.playground``: take screenshots of the playground at two budgets.

Serves the small VLM, opens the page in a headless Chromium, asks about the drawn sample at one
budget, moves the slider by its arrow keys and waits for the other answer. The answer without a
budget is asked for once, and is the same in both screenshots.
"""

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from small_vlm import WEIGHTS
from testing.browser import browsing, why_not
from testing.server import Server

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "demo" / "output" / "playground.log"
BEFORE, AFTER = (ROOT / "docs" / "users" / f"playground-{name}.png" for name in ("before", "after"))
ARGUMENTS = (
    *("--plugins", "flashvlm", "--visual-playground", "--max-model-len", "2048"),
    *("--block-size", "32", "--served-model-name", "small-vlm"),
)
QUESTION = "What color is the star?"
FIRST, STEPS, SECOND = 128, 8, 32
"""A budget, steps of the slider to the left from there, and where they lead."""
SIZE = (1280, 1080)
COLORS = 256
"""Of the palette the pictures are stored with: half the size."""
PATIENCE = 60  # seconds


def main() -> int:
    """Write both screenshots and return the exit code."""
    if reason := why_not():
        print(f"playground: {reason}", file=sys.stderr)
        return 1
    with Server(WEIGHTS, ARGUMENTS, log=LOG) as server, browsing(*SIZE) as driver:
        driver.get(f"{server.url}/flashvlm")
        driver.find_element("id", "sample").click()
        question = driver.find_element("id", "question")
        question.clear()
        question.send_keys(QUESTION)
        _wait(driver, "#n-kept", "64 of 576")
        driver.find_element("id", "ask").click()
        for card in ("#pruned", "#whole"):
            _wait(driver, f"{card} .visual", "of 576")
        for budget, path in ((FIRST, BEFORE), (SECOND, AFTER)):
            # The page asks by itself. A click would cancel its request, and the next one would wait
            # for the end of that in the engine.
            _slide(driver, budget)
            _wait(driver, "#pruned .visual", f"{budget} of 576")
            driver.execute_script("document.activeElement.blur()")  # without the frame of the focus
            _save(driver.get_screenshot_as_png(), path)
            size = path.stat().st_size / 1000
            print(f"{path.relative_to(ROOT)}: {size:.0f} kB, {budget} tokens, {_times(driver)}")
    return 0


def _times(driver: Any) -> str:
    pruned, whole = (
        driver.find_element("css selector", f"{card} .ttft").text for card in ("#pruned", "#whole")
    )
    return f"TTFT {pruned}, without a budget {whole}"


def _slide(driver: Any, budget: int) -> None:
    from selenium.webdriver import Keys

    slider = driver.find_element("id", "budget")
    for _ in range(100):
        chosen = driver.find_element("id", "chosen").text
        tokens = int(chosen.split()[0])
        if tokens == budget:
            break
        slider.send_keys(Keys.ARROW_LEFT if tokens > budget else Keys.ARROW_RIGHT)
    _wait(driver, "#n-kept", f"{budget} of 576")


def _wait(driver: Any, selector: str, text: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, PATIENCE, poll_frequency=0.1).until(
        lambda one: text in one.find_element("css selector", selector).text,
        f"{selector} never said {text!r}",
    )


def _save(screenshot: bytes, path: Path) -> None:
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    image.quantize(COLORS, kmeans=4).save(path, format="PNG", optimize=True)


if __name__ == "__main__":
    sys.exit(main())
