"""Claims about the web page, asked through its API and in a real browser, as `make app` starts it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.processes import ENVIRONMENT, ROOT, closed_port

pytestmark = pytest.mark.slow
PROMPT = "a photo of three circles"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SETTINGS = (0, 2, 0, 1, "git")  # seed, pictures, temperature, rewrites, chosen by


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    log, port = tmp_path_factory.mktemp("app") / "log", closed_port()
    command = [sys.executable, "scripts/app.py", "--config", "configs/miniature_app.yaml", "--port", str(port)]
    with open(log, "w") as file:
        server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 120
        while "open http" not in log.read_text() and server.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        assert "open http" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_the_api_rewrites_draws_and_judges_and_says_in_words_what_it_cannot(address):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    reasoning, rewrite, said, before, after, bars, history = client.predict(PROMPT, *SETTINGS, api_name="/try")
    assert rewrite.count("circle") == 3 and "three" in reasoning and re.match(r"\d+ tokens", said)
    assert len(before) == len(after) == 2 and "gdino, trained" in bars
    assert history["data"][0][:2] == [PROMPT, rewrite]
    *_, best = client.predict("قطة 🐈 على حصيرة", 0, 1, 1.0, 3, "git", api_name="/try")  # no crash, some answer
    for text, says in (("  ", "Write"), ("x" * 100_000, "100,000 characters")):
        with pytest.raises(AppError, match=says):
            client.predict(text, *SETTINGS, api_name="/try")
    for settings in ((2**64, 2, 0, 1, "git"), (0, 1.5, 0, 1, "git"), (0, 2, None, 1, "git"), (0, 1000, 0, 1, "git")):
        with pytest.raises(AppError):
            client.predict(PROMPT, *settings, api_name="/try")
    two = client.predict(PROMPT, *SETTINGS, "miniature/weights/policy", "miniature/weights/instruct",
                         api_name="/compare")  # fmt: skip
    assert two[1] == rewrite and two[4] != rewrite and len(two[2]) == len(two[5]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["wide", "phone"])
def test_in_a_browser_words_are_typed_a_button_is_clicked_and_pictures_appear(address, size):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.goto(address)
        page.locator("#prompt textarea").first.fill(PROMPT)
        page.locator("#draw").first.click()
        for side in ("#before", "#after"):
            page.wait_for_selector(f"{side} img", timeout=60_000)
        page.wait_for_selector(".bars i")
        assert page.locator("#rewrite textarea").first.input_value().count("circle") == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]  # nothing stands out to the right
        browser.close()


@pytest.mark.parametrize("options", [[], ["--gpt_path", "nowhere"], ["--gpt_path", "x", "--rewards", "format"]])
def test_what_is_missing_is_one_line_before_the_page_is_up(options, capsys, monkeypatch):
    from scripts import app

    monkeypatch.chdir(ROOT)
    assert app.main([*options, "--sdmodel_name", "miniature/weights/flux"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("app: error:")
