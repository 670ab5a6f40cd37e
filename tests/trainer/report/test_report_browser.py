"""The page in a real browser: nothing complains, nothing scrolls sideways, keys suffice, light and dark, any width."""

import shutil

import pytest

from tests.trainer.report.reporting import WILD_RUN, make_run
from trainer.report.data import read_run
from trainer.report.page import write_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt install chromium")

SIZES = {"desktop": (1280, 800), "phone": (390, 844), "narrow": (320, 640)}
LARGEST_PAGE_BYTES, MOST_NODES = 2_500_000, 30_000  # of 1000 classes: opens in well under 2 s


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Two runs, one with a hostile name, both with a class that has one."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / WILD_RUN, num_predictions=120, num_classes=30), make_run(folder / "other", seed=1)]
    write_page([read_run(run) for run in runs], folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def visit(browser):
    """visit(path, size, scheme): the page, opened; at the end of the test it must not have complained."""
    complaints, contexts = [], []

    def open_page(path, size="desktop", scheme="light"):
        width, height = SIZES[size]
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url, path) else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def is_foreign(url, path):
    return url != path.as_uri() and not url.startswith("data:")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_no_size_scrolls_sideways_and_every_picture_is_shown(visit, page_file, size, scheme, tmp_path):
    page = visit(page_file, size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    from PIL import Image

    corner = Image.open(shot).convert("L").getpixel((2, 2))
    assert (corner < 64) == (scheme == "dark")


def test_on_paper_nothing_is_cut_at_the_edge(visit, page_file):
    page = visit(page_file)
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 with the margins of a browser
    page.emulate_media(media="print")
    cut = "[...document.querySelectorAll('.wide, .near, pre')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(cut) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 718


def test_letters_on_a_phone_stay_large_enough_to_read(visit, page_file):
    page = visit(page_file, "phone")
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.chart text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 9.5  # px: the box of a letter, of which the letter is three quarters


def test_the_page_works_by_keyboard(visit, page_file):
    page = visit(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # shown once it has the focus
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#summary"
    seen = []
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if seen[-1] == "show-raw":
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid"  # one sees where one is
            assert page.locator(".charts .raw").first.is_visible()
            page.keyboard.press("Space")
            assert not page.locator(".charts .raw").first.is_visible()
            assert page.locator(".charts .smooth").first.is_visible()
        if seen[-1] == "show-run1":
            page.keyboard.press("Space")
            assert not page.locator(".charts .run1.smooth").first.is_visible()
            assert page.locator(".charts .run0.smooth").first.is_visible()
        if seen[-1] == "SUMMARY":
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.parentElement.open")
        if seen[-1] == "PRE":
            break
    assert {"show-raw", "show-run1", "SUMMARY", "DIV", "PRE"} <= set(seen)


def test_a_run_of_a_thousand_classes_and_ninety_epochs_is_a_small_page(visit, tmp_path):
    run = make_run(tmp_path / "paper", num_classes=1000, num_epochs=90, records=100, num_predictions=5000)
    write_page([read_run(run)], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < LARGEST_PAGE_BYTES
    page = visit(tmp_path / "report.html", "phone")
    assert page.evaluate("document.querySelectorAll('*').length") < MOST_NODES
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"][0]
    assert page.locator("#classes ~ details tbody tr").count() == 980
