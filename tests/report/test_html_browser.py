"""The HTML report in a real browser: nothing is loaded or executed that it does not hold, and everything works.

Skipped where there is no Chromium with its driver; .ci/run installs both where it may.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_toys import EVIL, project_of, records_of

from pqk.record.schema import empty_record
from pqk.report.html.page import write_html

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with chromedriver here"),
]
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--window-size=1300,900",
    "--disable-gpu-sandbox",
)
_SOFTWARE = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # WebGL without a GPU


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small project, whose records and reports hold what would run if it were not escaped."""

    def made(**known: Any) -> dict[str, Any]:
        least = {"exp_id": "B1", "role": "candidate", "status": "ok", "datetime": "2026-11-30T12:00:00Z"}
        return {**empty_record(), **least, **known}

    records = records_of(made)
    hostile = {**records[1], "model": EVIL, "notes": EVIL, "run_id": EVIL, "device": EVIL, "versions": {EVIL: EVIL}}
    hostile |= {"quantizer": "</script><script>window.hacked=4</script>", "verdict": "fail", "verdict_reasons": [EVIL]}
    hostile |= {"quality_drop_pct": -0.3, "intervals": None, "t_pair_p50_ms": 15.0}
    root = project_of(tmp_path_factory.mktemp("html") / "project", [*records, hostile])
    write_html("B1", root / "reports" / "zh.html", root, "zh")
    return write_html("B1", root / "reports" / "B1.html", root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for word in (*_OPTIONS, *_SOFTWARE):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser: Any, report: Path) -> Any:
    browser.get(report.as_uri())
    wait(browser, "ready")
    return browser


def wait(browser: Any, name: str) -> None:
    """Waits until the page has set a mark on its root: charts are drawn in software here, on a core of their own."""
    until = time.monotonic() + 240
    while browser.execute_script(f"return document.documentElement.dataset.{name}") != "yes":
        assert time.monotonic() < until, f"the page is not {name}"
        time.sleep(0.2)


def becomes(true: Callable[[], bool]) -> bool:
    """Returns whether something becomes true within a minute."""
    until = time.monotonic() + 60
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def column(browser: Any, heading: str) -> list[str]:
    """The texts of a column, of the rows that are shown."""
    return list(
        browser.execute_script(
            """
            const table = document.getElementById("records");
            const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.innerText.startsWith(arguments[0]));
            const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
            return rows.map((row) => row.cells[at].firstChild.textContent.trim());
            """,
            heading,
        )
    )


def button(browser: Any, heading: str) -> Any:
    from selenium.webdriver.common.by import By

    found = browser.find_elements(By.CSS_SELECTOR, "#records th button")
    return next(each for each in found if each.get_attribute("textContent").startswith(heading))


def still(browser: Any) -> str:
    """The address of the picture that was taken of the WebGL views."""
    return str(browser.execute_script("return document.querySelector('img.still').src"))


def pixels(address: str) -> np.ndarray:
    """The pixels (h,w,3) of a picture's data address, on white."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))[..., :3].astype(int)


def test_nothing_is_loaded_or_executed(page: Any, report: Path) -> None:
    assert page.execute_script("return window.hacked") is None
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    loaded = {address for address in asked if not address.startswith(("data:", "blob:"))}
    assert loaded == {report.as_uri()}


def test_the_policy_stops_what_is_put_in(page: Any) -> None:
    """Even a page whose escaping failed would run nothing."""
    page.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"x\" onerror=\"window.hacked=5\">');"
        "const s = document.createElement('script'); s.textContent = 'window.hacked=6'; document.body.append(s);"
    )
    time.sleep(0.5)
    assert page.execute_script("return window.hacked") is None
    page.get_log("browser")  # the browser reports what it stopped


def test_the_table_sorts_by_mouse_and_keys(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    drop = button(page, "drop %")
    page.execute_script("arguments[0].click()", drop)
    assert column(page, "drop %") == ["-0.30", "+0.00", "+0.40"]
    drop.send_keys(Keys.ENTER)
    assert column(page, "drop %") == ["+0.40", "+0.00", "-0.30"]
    verdict = button(page, "verdict")
    verdict.send_keys(Keys.SPACE)
    assert column(page, "verdict")[-1] == "–"  # a row without a value stays last
    verdict.send_keys(Keys.SPACE)
    assert column(page, "verdict")[-1] == "–"
    number = button(page, "#")
    number.send_keys(Keys.ENTER)
    assert column(page, "#") == ["1", "2", "3"]


def test_the_table_filters_by_words_and_lists(page: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    words = page.find_element(By.ID, "words")
    words.send_keys("candidate PASS")
    assert column(page, "#") == ["3"] and page.find_element(By.ID, "shown").text == "1 of 3 rows"
    words.send_keys(Keys.ESCAPE)
    assert column(page, "#") == ["1", "2", "3"]
    Select(page.find_element(By.CSS_SELECTOR, "select[data-key=verdict]")).select_by_visible_text("fail")
    assert column(page, "verdict") == ["fail"]
    Select(page.find_element(By.CSS_SELECTOR, "select[data-key=verdict]")).select_by_index(0)


def test_every_chart_is_drawn(page: Any) -> None:
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.plot')]"
        ".map((plot) => [plot.id, plot.querySelectorAll('.trace, .point').length])"
    )
    assert {"pareto", "latency", "speeds", "executed", "graphs", "ablation-0"} == {name for name, _ in drawn}
    assert all(count > 0 for _, count in drawn), drawn


def test_point_maps_are_there_with_one_camera_and_two_colours(page: Any) -> None:
    wait(page, "printable")
    before = still(page)
    for half in np.array_split(pixels(before), 2, axis=1):  # Teacher and candidate
        redder = half[..., 0] - half[..., 2]
        assert (redder > 70).sum() > 200 and (redder < -70).sum() > 200
    page.execute_script(
        "Plotly.relayout('scene-0', {'scene.camera': {eye: {x: 1, y: -1, z: -1}, up: {x: 0, y: -1, z: 0}}})"
    )

    def eyes() -> list[dict[str, float]]:
        script = "const l = document.getElementById('scene-0').layout; return [l.scene.camera.eye, l.scene2.camera.eye]"
        return list(page.execute_script(script))

    assert becomes(lambda: eyes() == [{"x": 1, "y": -1, "z": -1}] * 2)
    page.execute_script("document.querySelector('input[value=error]').click()")

    def blue_is_gone() -> bool:
        after = pixels(still(page))
        return not (after[..., 0] - after[..., 2] < -70).any()

    assert becomes(blue_is_gone) and still(page) != before  # no blue in the colours of errors


def test_the_switch_changes_the_theme(page: Any) -> None:
    def seen() -> list[str]:
        script = """
            const text = document.querySelector("#pareto .xtick text");
            return [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill];
        """
        return list(page.execute_script(script))

    first = seen()
    page.execute_script("document.getElementById('theme').click()")
    assert becomes(lambda: seen()[0] != first[0] and seen()[1] != first[1])


def test_it_prints_and_speaks_chinese(browser: Any, report: Path) -> None:
    from selenium.webdriver.common.by import By

    browser.get(report.with_name("zh.html").as_uri())
    wait(browser, "ready")
    assert browser.find_element(By.CSS_SELECTOR, "#table h2").text == "表格"
    assert browser.execute_script("return document.documentElement.lang") == "zh-CN"
    paper = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})["data"]
    assert paper.startswith("JVBERi") and len(paper) > 50_000  # %PDF in base64
