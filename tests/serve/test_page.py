"""The page in a real browser, by keyboard alone: a label, a steered answer, a curl line that runs.

Skipped without Playwright or a Chromium. `SHOTS=FOLDER` keeps pictures.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from interp_steer.prompts.file import QUESTIONS, PromptFile
from interp_steer.serve.gate import Limits
from interp_steer.serve.service import Service, Shelf
from tests.conftest import command
from tests.serve.conftest import listening

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.slow
ANSWERED = re.compile(r"\d+ tokens, ")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
NAMES = re.compile(r"Paris|France|French|Eiffel", re.I)


@pytest.fixture
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def served(starter, tmp_path, monkeypatch):
    """The starter, its labels and no directions yet."""
    from interp_steer.util.files import cache_dir

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(cache_dir("models"))
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    command("labels", "import", "starter")
    prompts = [item.prompt for item in PromptFile.read(QUESTIONS).items(as_chat=True)]
    made = Service.of(starter, Shelf(tmp_path), {}, prompts, "starter", Limits())
    with listening(made) as address:
        yield address


def shot(page, name):
    if folder := os.environ.get("SHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_by_keyboard_alone(served, browser):
    context = browser.new_context(
        viewport={"width": 1280, "height": 860},
        permissions=["clipboard-read", "clipboard-write"],
    )
    page, asked, wrong = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(served)
    expect(page.locator("#query")).to_be_focused()
    keys = page.keyboard
    keys.type("paris")
    page.wait_for_selector("#hits li")
    shot(page, "labels")
    numbers = page.locator("#hits li b").all_inner_texts()
    place = next(n for n, text in enumerate(numbers) if "2652" in text)
    for _ in range(place + 1):
        keys.press("ArrowDown")
    keys.press("Enter")
    page.wait_for_selector(".step")
    assert page.evaluate("document.activeElement.type") == "range"
    for _ in range(10):
        keys.press("ArrowRight")
    assert page.input_value("#line") == "add(f13-2652, 0.45 dose) at 13 on prompt"
    for _ in range(60):  # tab on to the question
        if page.evaluate("document.activeElement.id") == "text":
            break
        keys.press("Tab")
    keys.type("Describe a walk through a city.")
    keys.press("Enter")
    expect(page.locator("#status")).to_have_text(ANSWERED, timeout=120_000)
    unsteered, steered = page.locator(".columns article p").all_inner_texts()
    assert unsteered != steered and NAMES.search(steered) and not NAMES.search(unsteered)
    assert page.locator(".columns article mark").count() > 20
    shot(page, "desktop")
    # the dose curve, and the line that a terminal runs
    page.locator("#draw").focus()
    keys.press("Enter")
    page.wait_for_selector("#curve svg", timeout=60_000)
    heights = page.locator("#curve circle").evaluate_all(
        "dots => dots.map(d => +d.getAttribute('cy'))"
    )
    assert heights == sorted(heights, reverse=True) and heights[0] > heights[-1]
    page.locator("[data-copy=curl]").focus()
    keys.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Copied: curl"))
    line = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert '"role":"assistant"' in done.stdout and NAMES.search(done.stdout), done.stdout
    page.locator("[data-copy=python]").focus()
    keys.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("openai"))
    compile(page.evaluate("navigator.clipboard.readText()"), "copied", "exec")
    assert asked and all(url.startswith((served, "data:", "blob:")) for url in asked)
    assert not wrong
    shot(page, "curve")


def test_the_copied_command_gives_the_text_that_is_seen(served, browser):
    """In a terminal of the same cache; then a talk under another system prompt is a new one."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(served)
    page.fill("#query", "paris")
    page.locator("#hits li").first.click()
    page.wait_for_selector(".step")
    page.click("summary")
    page.fill("#max_tokens", "16")
    page.fill("#system", "Answer briefly.")
    page.fill("#text", "Describe a walk.")
    page.click("#send")
    expect(page.locator("#status")).to_have_text(ANSWERED, timeout=120_000)
    _, steered = page.locator(".columns article p").all_inner_texts()
    page.click("[data-copy=command]")
    expect(page.locator("#status")).to_have_text(re.compile("^Copied: interp-steer features get"))
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    told = [command(*shlex.split(line)[1:])[0] for line in lines if not line.startswith("#")]
    assert steered.removesuffix(" …").split() == told[-1].split("]\n")[-1].split()
    page.fill("#system", "Answer at length.")
    page.fill("#text", "And in winter?")
    page.click("#send")
    expect(page.locator(".turn").last.locator(".help")).to_have_text(re.compile("does not read"))
    expect(page.locator("#status")).to_have_text(ANSWERED, timeout=120_000)
    page.fill("#text", "And in spring?")  # which that talk goes on with
    page.click("#send")
    expect(page.locator(".turn")).to_have_count(3)
    expect(page.locator("#status")).to_have_text(ANSWERED, timeout=120_000)
    assert not page.locator(".turn").last.locator(".help").count()


def test_phones_and_the_dark(served, browser):
    """Nothing stands beyond the edge of a phone; both schemes have their pictures."""
    for name, width, height, scheme in (
        ("phone", 375, 740, "light"), ("phone_dark", 375, 740, "dark"), ("dark", 1280, 860, "dark"),
    ):  # fmt: skip
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        page = context.new_page()
        page.goto(served)
        page.fill("#query", "paris")
        page.wait_for_selector("#hits li")
        page.locator("#hits li").first.click()
        page.wait_for_selector(".step")
        page.click("summary")
        page.fill("#max_tokens", "24")
        page.fill("#text", "Describe a walk.")
        page.click("#send")
        expect(page.locator("#status")).to_have_text(ANSWERED, timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(20, 23, 26)") == (scheme == "dark")
        if folder := os.environ.get("SHOTS"):
            page.locator(".columns").scroll_into_view_if_needed()
            page.screenshot(path=str(Path(folder) / f"{name}.png"))
        context.close()
