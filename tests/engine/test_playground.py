# SPDX-License-Identifier: Apache-2.0
"""The playground page in a real browser, on a real server with an API key and a root path."""

import io
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from demo.measure import samples
from demo.world import QUESTIONS, picture_of
from small_vlm import WEIGHTS
from testing.browser import browsing, why_not
from testing.server import Server

KEY = "a key of this test"
ROOT = "/vlm"
OPTIONS = (
    *("--plugins", "flashvlm", "--visual-playground", "--visual-explain-per-minute", "600"),
    *("--root-path", ROOT, "--api-key", KEY, "--max-model-len", "2048", "--block-size", "32"),
)
TOTAL = 576
RING = QUESTIONS[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("playground") / "log"
    with Server(WEIGHTS, OPTIONS, log=log) as running:
        yield running


def test_the_page_needs_no_key_and_the_routes_it_calls_do(server: Server) -> None:
    for prefix in ("", ROOT):
        page = httpx.get(f"{server.url}{prefix}/flashvlm")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
        for path in ("/v1/visual_tokens", "/v1/chat/completions"):
            assert httpx.post(f"{server.url}{prefix}{path}", json={}).status_code == 401


class Page:
    """The page in a browser, read as users see it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def until(self, is_so: Callable[[], Any], what: str) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        problem = self.text("#problem")
        WebDriverWait(self.driver, 60, poll_frequency=0.1).until(
            lambda _: is_so(), f"{what}; the page says: {problem or 'no problem'}"
        )

    def press(self, *keys: str) -> None:
        """Type into the focused element."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        return str(self.driver.switch_to.active_element.get_attribute("id"))

    def tab_to(self, name: str) -> None:
        from selenium.webdriver import Keys

        for _ in range(20):
            if self.focused() == name:
                return
            self.press(Keys.TAB)
        raise AssertionError(f"#{name} is not reached by tabs; the last is #{self.focused()}")

    def drop(self, picture: Any, name: str = "scene.png") -> None:
        """Drop a file on the page by script; the browser cannot access one on the desktop."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        self.driver.execute_script(
            """
            const bytes = Uint8Array.from(atob(arguments[0]), (one) => one.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], arguments[1], {type: "image/png"}));
            const where = document.getElementById("drop");
            for (const type of ["dragover", "drop"]) {
              where.dispatchEvent(
                new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true})
              );
            }
            """,
            b64encode(buffer.getvalue()).decode(),
            name,
        )

    def log_in(self) -> None:
        from selenium.webdriver import Keys

        self.until(lambda: self.focused() == "key", "the page asks for the key")
        self.press(KEY, Keys.ENTER)
        self.until(lambda: not self.find("#key-part").is_displayed(), "the key is taken")
        # The browser logs the 401 response that caused the key prompt.
        self.driver.get_log("browser")

    def kept(self) -> int | None:
        """Return the number of kept tokens on the page; None while it is busy or shows none."""
        if self.find("#stage").get_attribute("aria-busy") == "true":
            return None
        shown = self.text("#n-kept")
        return int(shown.split(" of ")[0]) if shown else None

    def lit(self) -> float:
        """Return the share of the picture that is not dimmed."""
        return float(
            self.driver.execute_script(
                """
                const canvas = document.getElementById("overlay");
                const {data} = canvas.getContext("2d").getImageData(
                  0, 0, canvas.width, canvas.height);
                let clear = 0;
                for (let i = 3; i < data.length; i += 4) clear += data[i] === 0;
                return (4 * clear) / data.length;
                """
            )
        )

    def record(self) -> None:
        """Record the chat requests that the page sends from here on."""
        self.driver.execute_script(
            """
            window.recorded = [];
            const send = window.fetch;
            window.fetch = (path, options) => {
              if (path === "v1/chat/completions") recorded.push(JSON.parse(options.body));
              return send(path, options);
            };
            """
        )

    def recorded(self) -> list[dict[str, Any]]:
        requests: list[dict[str, Any]] = self.driver.execute_script("return window.recorded")
        return requests

    def answered(self, card: str) -> bool:
        done = self.find(card).get_attribute("aria-busy") == "false"
        return done and self.find(f"{card} dl").is_displayed()

    def both_answered(self) -> bool:
        return self.answered("#pruned") and self.answered("#whole")

    def complaints(self) -> list[str]:
        """Return the errors in the browser's log, including those of the security policy."""
        entries = self.driver.get_log("browser")
        return [str(entry["message"]) for entry in entries if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def open_page(server: Server) -> Iterator[Callable[..., Page]]:
    """Open the page in one browser, loaded again for each test."""
    if reason := why_not():
        pytest.skip(reason)
    with browsing() as driver:

        def opened(path: str = f"{ROOT}/flashvlm") -> Page:
            page = Page(driver, f"{server.url}{path}")
            page.log_in()
            return page

        yield opened


def test_dropping_a_picture_asking_and_moving_the_slider(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.drop(picture_of(0))
    page.until(lambda: page.kept() == 64, "64 tokens kept")
    assert page.text("#chosen") == "64 tokens"
    assert 0.05 < page.lit() < 64 / TOTAL

    page.find("#question").send_keys(RING.question)
    page.find("#ask").click()
    page.until(page.both_answered, "both answers")
    for card, visual, prompt in (("#pruned", "64 of 576", 64), ("#whole", "576 of 576", TOTAL)):
        assert page.text(f"{card} .text").split()[0] == RING.truth
        assert page.text(f"{card} .visual") == visual
        # The rest are the words of the prompt, equal for both.
        rest = int(page.text(f"{card} .prompt")) - prompt
        assert 5 < rest < 20
        assert page.text(f"{card} .ttft").endswith(" ms")
    assert "fewer prompt tokens with the budget" in page.text("#saved")
    before = page.lit()

    from selenium.webdriver import Keys

    page.find("#budget").send_keys(Keys.ARROW_LEFT * 4)
    assert page.text("#chosen") == "32 tokens"
    page.until(lambda: page.kept() == 32, "32 tokens kept")
    assert page.lit() < before
    # Released: the answer is requested without a click; the one without a budget is kept.
    page.until(lambda: page.text("#pruned .visual") == "32 of 576", "an answer from 32 tokens")

    page.find("#budget").send_keys(Keys.END)
    page.until(lambda: page.kept() == TOTAL, "all tokens kept")
    assert page.text("#chosen") == "all, no budget"
    assert page.lit() == 1
    assert page.complaints() == []


def counters(server: Server) -> dict[str, float]:
    """Return what the server counted so far of encoded pictures, selections and cached prompts."""
    found = samples(httpx.get(f"{server.url}/metrics").text)
    names = {
        "encoded": "flashvlm_feature_cache_misses",
        "selected": "flashvlm_selection_seconds_count",
        "prompt tokens from the prefix cache": "vllm:prefix_cache_hits_total",
    }
    return {what: found[name][0] for what, name in names.items()}


def test_both_answers_are_timed_at_their_second_request(
    server: Server, open_page: Callable[..., Page]
) -> None:
    page = open_page()
    page.find("#question").send_keys(RING.question)
    page.drop(picture_of(20))
    page.until(lambda: page.kept() == 64, "64 tokens kept")
    page.record()
    before = counters(server)
    page.find("#ask").click()
    page.until(page.both_answered, "both answers")
    changed = {what: now - before[what] for what, now in counters(server).items()}

    warm_up, timed, whole_warm_up, whole_timed = page.recorded()
    for first, second in ((warm_up, timed), (whole_warm_up, whole_timed)):
        assert (first["max_tokens"], "stream" in first) == (1, False)
        assert (second["max_tokens"], second["stream"]) == (128, True)
        assert first["messages"] == second["messages"] == timed["messages"]
    assert "uuid" not in timed["messages"][0]["content"][0], "or it would be encoded again"
    assert len({each["cache_salt"] for each in page.recorded()}) == 4
    assert warm_up["visual_budget"] == 64
    assert whole_warm_up["visual_budget"] is whole_timed["visual_budget"] is None
    # The same number of tokens, selected again.
    assert timed["visual_budget"] != 64 / TOTAL
    assert round(timed["visual_budget"] * TOTAL) == 64
    assert page.text("#pruned .visual") == "64 of 576"
    # Kept patches were shown before, so this picture is encoded and its tokens are chosen.
    assert changed == {"encoded": 0, "selected": 1, "prompt tokens from the prefix cache": 0}
    assert "the second request is timed" in page.text("footer")
    assert page.complaints() == []


def test_caches_can_be_left_in_the_times(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.find("#question").send_keys(RING.question)
    page.drop(picture_of(21))
    page.find("#more summary").click()
    page.find("#fair").click()
    assert "do not compare these times" in page.text("footer")
    assert "second request" not in page.text("footer")
    page.until(lambda: page.kept() == 64, "64 tokens kept")
    page.record()
    page.find("#ask").click()
    page.until(page.both_answered, "both answers")
    assert [each["visual_budget"] for each in page.recorded()] == [64, None]
    assert not [each for each in page.recorded() if "cache_salt" in each]


def test_everything_is_reachable_by_keyboard(open_page: Callable[..., Page]) -> None:
    from selenium.webdriver import Keys

    page = open_page("/flashvlm")  # without the prefix, as behind a proxy that strips it
    assert page.focused() == "file"
    page.tab_to("sample")
    page.press(Keys.ENTER)
    page.until(lambda: page.kept() == 64, "64 tokens kept")
    page.tab_to("question")
    page.press(Keys.CONTROL + "a" + Keys.NULL, "what shape is red?", Keys.ENTER)
    page.until(page.both_answered, "both answers")
    page.tab_to("budget")
    page.press(Keys.ARROW_RIGHT)
    assert page.find("#budget").get_attribute("aria-valuetext") == "80 tokens"
    page.until(lambda: page.kept() == 80, "80 tokens kept")
    page.until(lambda: page.text("#pruned .visual") == "80 of 576", "an answer from 80 tokens")
    page.until(lambda: page.text("#status").startswith("Answer with"), "the answer is announced")
    page.driver.find_element("css selector", "input[value=kept]").send_keys(Keys.ARROW_RIGHT)
    assert page.find("#overlay").get_attribute("aria-label") == "Map of saliency: 80 of 576 kept"
    assert page.find("#scale").is_displayed()
    assert page.complaints() == []


def test_fast_slider_moves_are_debounced(open_page: Callable[..., Page]) -> None:
    from selenium.webdriver import Keys

    page = open_page()
    page.find("#sample").click()
    page.until(lambda: page.kept() == 64, "64 tokens kept")
    page.driver.execute_script("performance.clearResourceTimings()")
    page.find("#budget").send_keys(Keys.ARROW_LEFT * 16)
    page.until(lambda: page.kept() == 4, "4 tokens kept")
    calls = page.driver.execute_script(
        "return performance.getEntriesByType('resource')"
        ".filter((entry) => entry.name.endsWith('visual_tokens')).length"
    )
    assert 1 <= calls <= 4, "sixteen steps are not sixteen requests"


def test_server_errors_are_shown_as_text(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.find("#sample").click()
    page.until(lambda: page.kept() == 64, "64 tokens kept")
    page.find("#more summary").click()
    page.find("#selector").send_keys("brightest")
    page.find("#ask").click()
    page.until(lambda: "brightest" in page.text("#problem"), "the server's words")
    assert page.text("#problem").startswith("The server refuses this request. It says: ")

    # Files that are not pictures are not sent.
    def drop() -> str:
        page.driver.execute_script(
            """
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(["words"], "notes.txt", {type: "text/plain"}));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}));
            """
        )
        return str(page.text("#problem"))

    # Again and again: the other request's refusal may arrive after the first drop.
    page.until(lambda: "“notes.txt” is not a picture" in drop(), "a plain answer")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_passes_the_accessibility_rules(
    open_page: Callable[..., Page], dark: bool
) -> None:
    from axe_core_python.selenium import Axe

    page = open_page()
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
    page.find("#sample").click()
    page.find("#more summary").click()
    page.find("#ask").click()
    page.until(page.both_answered, "both answers")
    result = Axe().run(page.driver)
    broken = [
        (rule["id"], [node["html"] for node in rule["nodes"]]) for rule in result["violations"]
    ]
    assert broken == []
    assert "color-contrast" in [rule["id"] for rule in result["passes"]]


def test_a_small_screen_needs_no_horizontal_scrolling(open_page: Callable[..., Page]) -> None:
    page = open_page()
    small = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", small)
    page.find("#sample").click()
    page.until(lambda: page.kept() == 64, "64 tokens kept")
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= 360


def test_the_log_contains_no_questions_of_the_page(server: Server) -> None:
    assert RING.question not in server.log
