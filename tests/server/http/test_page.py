"""The page in a real browser: Debian's chromium and chromium-driver."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.live import fetch
from tests.support.paths import SAMPLES
from tests.support.processes import ON_CPU, SAID, running

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    DRIVER is None or shutil.which("chromium") is None, reason="needs chromium and its driver"
)
OWL, CATS = SAID["owl.png"]["caption"], SAID["cats.png"]["caption"]


@pytest.fixture(scope="module")
def port():
    with running(*ON_CPU) as (_, http, _):
        yield http


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, port):
    chromium.set_window_size(1100, 1200)
    chromium.get(f"http://127.0.0.1:{port}/")
    yield chromium
    said = [entry["message"] for entry in chromium.get_log("browser")]
    assert not [message for message in said if "/caption" not in message]


def choose(browser, *files) -> None:
    browser.find_element(By.ID, "file").send_keys("\n".join(map(str, files)))


def wait(browser, condition):
    return WebDriverWait(browser, 30, 0.02).until(condition)


def captions(browser) -> list[str]:
    return [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".caption")]


def ended(count: int):
    """A condition: the page has `count` captions, and all are complete."""

    def look(browser) -> bool:
        there = browser.find_elements(By.CSS_SELECTOR, ".caption")
        return len(there) == count and all(
            each.text and "growing" not in each.get_attribute("class") for each in there
        )

    return look


def test_several_images_become_a_grid_with_captions_scores_and_times(browser):
    choose(browser, *(SAMPLES / name for name in ("owl.png", "cats.png", "donuts.png")))
    wait(browser, ended(3))
    assert captions(browser) == [OWL, CATS, SAID["donuts.png"]["caption"]]
    assert all("% a token" in each.text for each in browser.find_elements(By.CLASS_NAME, "score"))
    times = [each.text for each in browser.find_elements(By.CLASS_NAME, "time")]
    assert all("encode" in time and time.endswith("ms") for time in times)


def test_a_caption_grows_token_by_token(browser):
    browser.execute_script("""
        window.grown = [];
        new MutationObserver(changes => {
            for (const { target, addedNodes } of changes)
                if (target.matches?.('.caption')) window.grown.push(addedNodes[0].textContent);
        }).observe(document.getElementById('cards'), {subtree: true, childList: true});
    """)
    choose(browser, SAMPLES / "owl.png")
    wait(browser, ended(1))
    grown = [text for text in browser.execute_script("return window.grown") if text]
    assert len(set(grown)) > 2, "it came at once"
    assert all(OWL.startswith(text) for text in grown)


def test_beams_stand_beside_greedy(browser):
    browser.find_element(By.ID, "beams").click()
    choose(browser, SAMPLES / "owl.png")
    wait(browser, ended(2))
    assert [e.text for e in browser.find_elements(By.CLASS_NAME, "how")] == ["greedy", "4 beams"]
    assert captions(browser) == [OWL, OWL]


def test_an_image_is_pasted(browser):
    browser.execute_script("""
        fetch('/samples/cats.png').then(reply => reply.blob()).then(blob => {
            const data = new DataTransfer();
            data.items.add(new File([blob], 'pasted.png', {type: 'image/png'}));
            document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        });
    """)
    wait(browser, ended(1))
    assert captions(browser) == [CATS]


def test_what_is_wrong_is_said_where_it_is_wrong(browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    choose(browser, tmp_path / "broken.png", SAMPLES / "owl.png")
    wait(browser, ended(2))
    broken, owl = captions(browser)
    assert "not an image" in broken
    assert owl == OWL
    choose(browser, tmp_path / "notes.txt")
    assert browser.find_element(By.ID, "status").text == "That is not an image."


def test_it_is_worked_by_keyboard_alone(browser):
    body = browser.find_element(By.TAG_NAME, "body")
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        here = browser.switch_to.active_element
        if here.get_attribute("title") == "cats.png":
            break
    else:
        pytest.fail("no sample can be reached")
    here.send_keys(Keys.ENTER)
    wait(browser, ended(1))
    assert captions(browser) == [CATS]
    while browser.switch_to.active_element.get_attribute("id") != "prompt":
        ActionChains(browser).send_keys(Keys.TAB).perform()
    browser.switch_to.active_element.send_keys("how many cats are there", Keys.ENTER)
    wait(browser, lambda browser: captions(browser) == ["two"])
    while browser.switch_to.active_element.get_attribute("id") != "tab-curl":
        ActionChains(browser).send_keys(Keys.TAB).perform()
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert "requests.post" in body.text
    assert '"prompt": "how many cats are there"' in body.text


def test_the_code_that_is_shown_runs(browser, port, tmp_path, monkeypatch, capsys):
    browser.find_element(By.ID, "prompt").send_keys("how many cats are there")
    shutil.copy(SAMPLES / "cats.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for name in ("Python", "openai"):
        browser.find_element(By.ID, f"tab-{name}").click()
        exec(browser.find_element(By.ID, "code").text, {})
        assert capsys.readouterr().out.strip() == "two"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        choose(browser, SAMPLES / "owl.png")
        wait(browser, ended(1))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        dark = browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
        assert dark == (scheme == "dark")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_runs_that_is_not_ours(port):
    page = fetch(port, "GET", "/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "<style" not in page.body.decode() and "onclick" not in page.body.decode()
    for name in ("page.css", "page.js", "docs.js", "swagger-ui/swagger-ui.css"):
        assert fetch(port, "GET", f"/static/{name}").status == 200
    assert fetch(port, "GET", "/static/../pages.py").status == 404
    assert fetch(port, "GET", "/static/swagger-ui/README.md").status == 404


def test_the_interface_is_shown(browser, port):
    browser.get(f"http://127.0.0.1:{port}/docs")
    wait(browser, lambda browser: browser.find_elements(By.CLASS_NAME, "opblock-summary-path"))
    paths = [e.text for e in browser.find_elements(By.CLASS_NAME, "opblock-summary-path")]
    assert "/caption" in [path.replace("\u200b", "") for path in paths]
