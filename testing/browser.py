# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for the playground page: its tests, and the pictures of it in the docs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DRIVER = "chromedriver"


def why_not() -> str | None:
    """Return what is missing for ``browsing`` on this machine; None: nothing."""
    if not any(shutil.which(name) for name in _BROWSERS):
        return f"no Chromium on this machine (looked for {', '.join(_BROWSERS)})"
    if shutil.which(_DRIVER) is None:
        return f"no {_DRIVER} on this machine (Debian: apt-get install chromium-driver)"
    return None


@contextmanager
def browsing(
    width: int = 1280, height: int = 1000, *, dark: bool = False, scale: float = 1
) -> Iterator[Any]:
    """Yield a Selenium driver with a window of ``width`` x ``height`` CSS pixels.

    Both programs are named, so that Selenium downloads neither.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, _BROWSERS)))
    # Without its sandbox, which root in a container cannot have: it opens our own page only.
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which(_DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        yield driver
    finally:
        driver.quit()
