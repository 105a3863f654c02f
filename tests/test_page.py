"""The web page as a browser and a person with a keyboard find it; the server behind it is real, its model is not."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from gram_core.types import Explanation, FloatArray, ImageResult, Plan, PrototypeSeen, ViewSeen
from gram_core.views import WORKING
from server import pages, replay
from server.errors import STATUS
from server.fake import FakeClassifier, FakeClassSet, FakePrepared
from server.settings import Settings
from tests.server_fixtures import HeldClassifier, Live, b64, code, live, png, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")

KEY = "gk_page"
CLASSES = ("cat", "dog", "cup of coffee")
EVIL = "<img src=x onerror=alert(1)>"
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of 4\d\d")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Every piece of text that can be seen, with the contrast of its colour to what is painted behind it.
CONTRAST = """() => {
  const parts = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    const own = parts(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(node.parentElement));
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest(".quiet, option")) continue;
    if (node.closest(":disabled")) continue;
    const behind = ground(node);
    const [a, b] = [light(over(parts(getComputedStyle(node).color), behind)), light(behind)].sort((x, y) => y - x);
    found.push([walker.currentNode.data.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""
PASTE = """([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const held = new DataTransfer();
  held.items.add(new File([bytes], name, { type }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: held, bubbles: true, cancelable: true }));
}"""
DROP = """([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const held = new DataTransfer();
  held.items.add(new File([bytes], name, { type }));
  const drop = document.getElementById("drop");
  for (const kind of ["dragenter", "dragover", "drop"]) {
    drop.dispatchEvent(new DragEvent(kind, { dataTransfer: held, bubbles: true, cancelable: true }));
  }
}"""


# ---- a browser ----


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """One look at the page: what it asked for, and what it complained about in the console."""

    page: Page
    asked: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def choose(self, *photos: dict[str, Any]) -> None:
        self.page.locator("#files").set_input_files(list(photos))
        expect(self.page.locator("#thumbs li")).to_have_count(len(photos))

    def name(self, *classes: str) -> None:
        self.page.get_by_label("Class names, one per line").fill("\n".join(classes))

    def classify(self) -> None:
        self.page.get_by_role("button", name="Classify").click()

    def cards(self, count: int) -> list[str]:
        """The label on each card, once they are there."""
        expect(self.page.locator("#results > li")).to_have_count(count)
        return self.page.locator("#results .label").all_inner_texts()

    def posts(self) -> list[Request]:
        return [request for request in self.asked if request.method == "POST"]


@contextmanager
def visit(browser: Browser, server: Live, *, refused: bool = False, **options: Any) -> Iterator[Visit]:
    """Open the page. Whatever happens there: nothing leaves the origin, nothing is kept, nothing breaks a rule."""
    origin = f"http://127.0.0.1:{server.port}/"
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(5000)
    seen = Visit(page)
    page.on("request", lambda request: seen.asked.append(request))
    page.on("console", lambda said: seen.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (seen.complaints.append("a dialog"), dialog.dismiss()))
    page.goto(origin)
    try:
        yield seen
        elsewhere = [r.url for r in seen.asked if not r.url.startswith((origin, f"blob:{origin}", "data:"))]
        assert elsewhere == []
        assert [said for said in seen.complaints if not (refused and REFUSED.match(said))] == []
        kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""]
        assert page.evaluate("indexedDB.databases()") == []
    finally:
        context.close()


def photo(seed: int = 0, name: str | None = None, data: bytes | None = None) -> dict[str, Any]:
    return {"name": name or f"photo-{seed}.png", "mimeType": "image/png", "buffer": data or png(seed, (40, 30))}


def labels(server: Live, photos: Sequence[dict[str, Any]], classes: Sequence[str], **fields: Any) -> list[str]:
    """What the API says of the same."""
    answer = server.ask(*(p["buffer"] for p in photos), classes=list(classes), **fields)
    return [result["label"] for result in answer.json()["results"]]


def key_file(folder: Path) -> Path:
    (folder / "keys").write_text(f"team:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    return folder / "keys"


# ---- its files ----


def test_the_page_and_its_files_are_served_with_the_policy(server: Live) -> None:
    for path, name in pages.FILES.items():
        response = server.client.get(path, headers={"range": "bytes=0-3"})
        assert response.status_code == 200
        assert response.content == (pages.FOLDER / name).read_bytes()
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["content-type"] == pages.TYPES[Path(name).suffix]
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        head = server.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(response.content))
        assert code(server.client.post(path)) == "method_not_allowed"


def test_every_file_has_its_path_and_nothing_else_has_one(server: Live) -> None:
    there = {str(file.relative_to(pages.FOLDER)) for file in pages.FOLDER.rglob("*") if file.is_file()}
    assert there == set(pages.FILES.values())
    for path in ("/ui", "/ui/", "/ui/index.html", "/ui/app.js/", "/ui/..%2fpages.py", "/ui/%2e%2e/pages.py", "/app.js"):
        assert code(server.client.get(path)) == "not_found", path
    assert not set(pages.FILES) & set(server.client.get("/openapi.json").json()["paths"])


def test_a_range_of_absurd_length_costs_nothing(server: Live) -> None:
    ranges = "bytes=" + ",".join(f"{n}-{n + 1}" for n in range(2000))
    started = time.perf_counter()
    response = server.client.get("/", headers={"range": ranges[:30_000]})
    assert response.status_code == 200
    assert time.perf_counter() - started < 0.05 + 0.2  # the second is for a busy machine


def test_files_name_nobody_else_and_put_no_markup_in() -> None:
    for file in pages.FOLDER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}, file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|alert\(", text), (
            file
        )
        assert not re.search(r"localStorage|sessionStorage|indexedDB|\.cookie", text), file
        if file.suffix == ".html":
            assert not re.search(r"\s(style|on\w+)=|<style|<script(?![^>]*\ssrc=\"ui/)", text), file
    assert f"const WORKING = {WORKING};" in (pages.FOLDER / "results.js").read_text()


def test_without_the_page_its_paths_are_unknown() -> None:
    with live(ui=False, ui_public=True) as bare:
        assert {code(bare.client.get(path)) for path in pages.FILES} == {"not_found"}
    assert pages.public(Settings(ui=False, ui_public=True)) == ()


def test_the_page_needs_a_key_unless_it_is_public(tmp_path: Path) -> None:
    with live(api_keys_file=key_file(tmp_path)) as locked:
        assert {code(locked.client.get(path)) for path in pages.FILES} == {"unauthenticated"}
        assert locked.client.get("/", headers={"x-api-key": KEY}).status_code == 200
    with live(api_keys_file=key_file(tmp_path), ui_public=True) as shown:
        for method in ("GET", "HEAD"):
            assert {shown.client.request(method, path).status_code for path in pages.FILES} == {200}
        refused = [shown.client.get("/info"), shown.client.get("/openapi.json"), shown.client.post("/")]
        assert {response.status_code for response in refused} == {401}
        assert code(shown.client.post("/v1/classify", json={})) == "unauthenticated"


# ---- a person ----


@in_chromium
def test_photos_and_names_become_bars(browser: Browser, server: Live) -> None:
    photos = [photo(n) for n in range(8)]
    with visit(browser, server) as seen:
        expect(seen.page.locator("#model")).to_contain_text("fake on cpu")
        seen.choose(*photos)
        seen.name(*CLASSES)
        seen.classify()
        assert seen.cards(8) == labels(server, photos, CLASSES)
        expect(seen.page.locator("#status")).to_contain_text("no label changed")  # said to those who do not see it
        summary = seen.page.locator("#summary")
        expect(summary).to_contain_text(re.compile("8 photos, 3 classes, .*s: no label changed"))
        card = seen.page.locator("#results > li").first
        expect(card).to_contain_text("tuned: infomax on all photos together, 20 steps, 8 views")
        expect(card).to_contain_text("uncertainty (entropy) 1.00 \u2192 0.50 nats")
        expect(card.get_by_text("Nearest prototypes")).to_be_visible()
        assert card.locator(".crops li").count() == 1
        result = server.ask(*(p["buffer"] for p in photos), classes=list(CLASSES)).json()["results"][0]
        numbers = card.locator(".bars .line").all_inner_texts()
        best = [f"{100 * side['predictions'][0]['score']:.1f}\u00a0%" for side in (result["baseline"], result)]
        assert [text.split("\n")[-1] for text in numbers[:2]] == best
        widths = card.locator(".bars .fill").evaluate_all("all => all.map(fill => fill.style.width)")
        assert len(widths) == 6
        assert float(widths[1].rstrip("%")) == pytest.approx(100 * result["score"], abs=0.01)


@in_chromium
def test_few_photos_are_answered_zero_shot_and_that_is_said_before_and_after(browser: Browser, server: Live) -> None:
    with visit(browser, server) as seen:
        seen.choose(photo())
        expect(seen.page.locator("#scope-note")).to_contain_text("With fewer than 8 photos this answers zero-shot.")
        seen.name(*CLASSES)
        seen.classify()
        seen.cards(1)
        told = "skipped: fewer than 8 photos to tune on together \u2013 answered zero-shot"
        expect(seen.page.locator("#results .did")).to_have_text(told)
        expect(seen.page.locator("#summary")).to_contain_text("Every answer is zero-shot")


@in_chromium
def test_a_label_that_tuning_changed_is_marked_in_words(browser: Browser) -> None:
    class Turning(FakeClassifier):
        def _result(self, image: FakePrepared, classes: FakeClassSet, plan: Plan) -> ImageResult:
            made = super()._result(image, classes, plan)
            if plan.skip is not None:
                return made
            turned: FloatArray = np.ascontiguousarray(-made.baseline_cosines)
            return replace(made, cosines=turned, adaptation=replace(made.adaptation, label_changed=True))

    with live(Turning()) as server, visit(browser, server) as seen:
        photos = [photo(n) for n in range(8)]
        seen.choose(*photos)
        seen.name("cat", "dog")
        seen.classify()
        after = seen.cards(8)
        before = labels(server, photos, ("cat", "dog"), adaptation={"method": "none"})
        marks = seen.page.locator("#results .changed").all_inner_texts()
        assert {*after, *before} == {"cat", "dog"}
        assert all(a != b for a, b in zip(after, before, strict=True))
        assert marks == [f"changed, was {b}" for b in before]
        expect(seen.page.locator("#summary")).to_contain_text("8 labels changed")


@in_chromium
def test_a_keyboard_is_enough(browser: Browser, server: Live) -> None:
    photos = [photo(1), photo(2)]
    with visit(browser, server) as seen:
        # Long before the key: Chromium begins to hand choosers over a while after it is asked to.
        seen.page.on("filechooser", lambda chooser: chooser.set_files(photos))
        expect(seen.page.locator("#model")).to_contain_text("fake")
        press = seen.page.keyboard.press
        press("Tab")
        assert focused(seen.page) == "files"
        press("Enter")
        expect(seen.page.locator("#thumbs li")).to_have_count(2)
        outline = seen.page.locator("#drop").evaluate("node => getComputedStyle(node).outlineStyle")
        assert outline == "solid"
        press("Tab")
        assert seen.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove photo-1.png"
        press("Enter")
        expect(seen.page.locator("#thumbs li")).to_have_count(1)
        assert seen.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove photo-2.png"
        for _ in range(2):
            press("Tab")
        assert focused(seen.page) == "classes"
        seen.page.keyboard.type("cat\ndog\ncow")
        press("Tab")
        assert focused(seen.page) == "method"
        seen.page.keyboard.type("tpt")
        press("Control+Enter")
        assert seen.cards(1) == labels(server, photos[1:], ("cat", "dog", "cow"), adaptation={"method": "tpt"})
        expect(seen.page.locator("#results .did")).to_contain_text("tpt on this photo alone")


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id"))


@in_chromium
def test_photos_are_pasted_and_dropped_and_a_pasted_list_is_split(browser: Browser, server: Live) -> None:
    with visit(browser, server) as seen:
        for how, seed in ((PASTE, 1), (DROP, 2), (PASTE, 3)):
            seen.page.evaluate(how, ["image.png", "image/png", b64(png(seed))])
        thumbs = seen.page.locator("#thumbs img")
        expect(thumbs).to_have_count(3)
        names = thumbs.evaluate_all("all => all.map(image => image.alt)")
        assert names == ["image.png", "image-2.png", "image-3.png"]
        paste = """text => {
          const clipboardData = new DataTransfer();
          clipboardData.setData("text/plain", text);
          const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
          document.getElementById("classes").dispatchEvent(event);
        }"""
        seen.page.evaluate(paste, "cat, dog,  cup of coffee")
        names_typed = seen.page.get_by_label("Class names, one per line")
        expect(names_typed).to_have_value("cat\ndog\ncup of coffee")
        names_typed.fill("Paris, France\nRome, Italy")
        seen.page.get_by_role("button", name="Split at commas").click()
        expect(names_typed).to_have_value("Paris\nFrance\nRome\nItaly")


@in_chromium
def test_an_error_is_shown_kindly_with_its_code_and_request(browser: Browser, server: Live) -> None:
    with visit(browser, server, refused=True) as seen:
        seen.choose(photo())
        seen.name("cat", "a " * 90 + "dog")
        seen.classify()
        notice = seen.page.get_by_role("alert").filter(has_text="class_text_too_long")
        expect(notice).to_contain_text("A class name is too long for the model")
        expect(notice).to_contain_text("Shorten the name or the template.")
        expect(notice).to_contain_text("It is about \u201ca a a a")
        expect(notice).to_contain_text("status 422")
        expect(notice).to_contain_text(re.compile(r"request req_\w+"))
        seen.name("cat", "dog")
        seen.classify()
        seen.cards(1)
        expect(notice).to_have_count(0)


@in_chromium
def test_a_busy_server_is_asked_again_by_a_button(browser: Browser, server: Live) -> None:
    busy = {"error": {"code": "overloaded", "message": "the queue is full.", "request_id": "r1", "retryable": True}}
    with visit(browser, server, refused=True) as seen:
        answer = {"status": 429, "headers": {"retry-after": "3"}, "body": json.dumps(busy)}
        seen.page.route("**/v1/classify", lambda route: route.fulfill(**answer), times=1)
        seen.choose(photo())
        seen.name(*CLASSES)
        seen.classify()
        expect(seen.page.locator("#notice")).to_contain_text("The server is busy")
        expect(seen.page.locator("#notice")).to_contain_text("It asks for 3 seconds.")
        seen.page.get_by_role("button", name="Try again").click()
        seen.cards(1)


@in_chromium
def test_one_bad_photo_has_its_own_card_and_the_others_their_answers(browser: Browser, server: Live) -> None:
    photos = [photo(0), photo(1, "torn.png", png(1, (40, 30))[:90])]
    with visit(browser, server) as seen:
        seen.choose(*photos)
        seen.name(*CLASSES)
        seen.classify()
        assert seen.cards(2) == labels(server, photos[:1], CLASSES)
        torn = seen.page.locator("#results > li").nth(1)
        expect(torn).to_contain_text("A photo is damaged")
        expect(torn).to_contain_text("torn.png")
        expect(seen.page.locator("#summary")).to_contain_text("1 photo could not be read")


@in_chromium
def test_names_stay_text_wherever_they_are_shown(browser: Browser) -> None:
    class Naming(FakeClassifier):
        def _explanation(self, image: FakePrepared, plan: Plan) -> Explanation:
            return replace(super()._explanation(image, plan), prototypes=(PrototypeSeen(EVIL, 0.5),))

    with live(Naming()) as server, visit(browser, server) as seen:
        photos = [photo(n, EVIL.replace("/", "") + f"{n}.png") for n in range(8)]
        seen.choose(*photos)
        seen.name(EVIL, "<script>alert(2)</script>", "{{7*7}}", "caf\u00e9")
        seen.classify()
        seen.cards(8)
        for kind in ("curl", "Python"):
            seen.page.get_by_role("button", name=f"Copy as {kind}").click()
        expect(seen.page.locator("#results .class", has_text=EVIL).first).to_be_visible()
        assert seen.page.locator("img[src='x'], #results script, #summary script").count() == 0
        assert {
            image for image in seen.page.locator("img").evaluate_all("all => all.map(i => i.src.split(':')[0])")
        } == {
            "blob",
            "http",
        }


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_off_and_everything_can_be_read(browser: Browser, server: Live, scheme: Any, width: int) -> None:
    size = {"width": width, "height": 780}
    long = "a very long name of a class that goes on and on without an end " * 2
    with visit(browser, server, refused=True, viewport=size, color_scheme=scheme) as seen:
        seen.choose(*(photo(n) for n in range(8)), photo(9, "x" * 120 + ".gif", b"GIF89a"))
        seen.name("Donaudampfschifffahrtsgesellschaftskapit\u00e4n" * 2, long, "cat")
        seen.page.get_by_text("More options").click()
        seen.classify()
        seen.page.get_by_role("button", name="Leave it out").click()
        seen.classify()
        seen.cards(8)
        seen.page.get_by_role("button", name="Copy as curl").click()
        assert_readable(seen.page, width)
        seen.name("cat", "a " * 90 + "dog")
        seen.classify()
        expect(seen.page.locator("#notice")).to_contain_text("class_text_too_long")
        assert_readable(seen.page, width)


def assert_readable(page: Page, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate(CONTRAST)
    assert len(texts) > 20
    assert [(text, round(ratio, 2)) for text, ratio in texts if ratio < 4.5] == []
    unnamed = page.locator("input, select, textarea").evaluate_all(
        "all => all.filter(f => !f.labels.length && !f.ariaLabel).map(f => f.id)"
    )
    assert unnamed == []


@in_chromium
def test_a_copied_command_asks_the_same_and_is_told_the_same(browser: Browser, server: Live, tmp_path: Path) -> None:
    names = [f'it\'s; "odd", $HOME & 100% \\{n}.png' for n in range(7)] + ["-rf.png"]
    classes = ("it's", "a;b,c=d", "$HOME `id`", '"quoted" \\ back', "@file", "<x", "\u96ea \U0001f600")
    photos = [photo(n, name) for n, name in enumerate(names)]
    for one in photos:
        (tmp_path / one["name"]).write_bytes(one["buffer"])
    with visit(browser, server, permissions=["clipboard-read", "clipboard-write"]) as seen:
        seen.choose(*photos)
        seen.name(*classes)
        seen.page.get_by_text("More options").click()
        seen.page.get_by_label("Seed").fill("7")
        seen.page.get_by_label("Template").fill('it\'s a photo of {}; "really"')
        seen.classify()
        shown = seen.cards(8)
        asked = {"templates": ['it\'s a photo of {}; "really"'], "adaptation": {"seed": 7, "method": "infomax"}}
        assert shown == labels(server, photos, classes, **asked)

        seen.page.get_by_role("button", name="Copy as curl").click()
        curl = seen.page.locator("pre").inner_text()
        assert seen.page.evaluate("navigator.clipboard.readText()") == curl
        done = subprocess.run(["sh", "-c", curl], cwd=tmp_path, capture_output=True, check=True, timeout=20)
        told = json.loads(done.stdout)
        assert [result["label"] for result in told["results"]] == shown, told
        assert told["results"][0]["explain"]["views"]

        seen.page.get_by_role("button", name="Copy as Python").click()
        python = seen.page.locator("pre").inner_text()
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", python], cwd=tmp_path, capture_output=True, check=True, timeout=20
        )
        lines = done.stdout.decode("utf-8").splitlines()
        assert [line.partition(" -> ")[2].rpartition(" ")[0] for line in lines] == shown


@in_chromium
def test_a_key_is_sent_and_kept_nowhere(browser: Browser, tmp_path: Path) -> None:
    with (
        live(api_keys_file=key_file(tmp_path), ui_public=True, wait=True) as locked,
        visit(browser, locked, refused=True) as seen,
    ):
        expect(seen.page.locator("#model")).to_have_text("This server wants an API key.")
        field_ = seen.page.get_by_label("API key")
        expect(field_).to_be_focused()
        for wrong in ("schl\u00fcssel", "gk_wrong"):
            field_.fill(wrong)
            field_.press("Tab")
            expect(seen.page.locator("#model")).to_have_text("This key is not valid here.")
            field_.fill("")
            field_.press("Tab")
            expect(seen.page.locator("#model")).to_have_text("This server wants an API key.")
        field_.fill("schl\u00fcssel")
        seen.classify()
        expect(seen.page.locator("#problem")).to_contain_text("This is no API key")
        field_.fill("gk_wrong")
        field_.press("Tab")
        expect(seen.page.locator("#model")).to_have_text("This key is not valid here.")
        field_.fill(KEY)
        seen.choose(photo())
        seen.name(*CLASSES)
        expect(seen.page.locator("#model")).to_contain_text("fake")
        seen.classify()
        seen.cards(1)
        assert seen.posts()[-1].header_value("authorization") == f"Bearer {KEY}"
        assert all(KEY not in request.url for request in seen.asked)
        seen.page.get_by_role("button", name="Copy as curl").click()
        curl = seen.page.locator("pre").inner_text()
        assert KEY not in seen.page.content()
        (tmp_path / "photo-0.png").write_bytes(photo()["buffer"])
        env = {"API_KEY": KEY, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["sh", "-c", curl], cwd=tmp_path, env=env, capture_output=True, check=True, timeout=20)
        assert json.loads(done.stdout)["object"] == "classification"
        seen.page.reload()
        expect(seen.page.get_by_label("API key")).to_have_value("")


@in_chromium
def test_what_would_be_refused_is_said_before_it_is_sent(browser: Browser) -> None:
    big = io.BytesIO()
    Image.new("RGB", (120, 100)).save(big, "PNG")
    limits = {"max_images": 2, "max_image_bytes": 6000, "max_image_pixels": 10_000, "max_request_pixels": 20_000}
    with live(**limits) as server, visit(browser, server) as seen:
        expect(seen.page.locator("#photo-limits")).to_contain_text("up to 2")
        problem, count = seen.page.locator("#problem"), seen.page.locator("#photo-count")
        seen.name(*CLASSES)
        seen.classify()
        expect(problem).to_contain_text("Add at least one photo.")
        for wrong, words in (
            (photo(0, data=b"GIF89a" + b"x" * 50), "it is no JPEG, PNG or WEBP"),
            (photo(0, data=png(0, (80, 80))), "19 KiB, the server takes 6 KiB"),
            (photo(0, data=big.getvalue()), "0 megapixels, the server takes"),
        ):
            seen.choose(wrong)
            expect(seen.page.locator("#thumbs .reason")).to_contain_text(words)
            seen.classify()
            expect(problem).to_contain_text("1 photo will not be accepted")
            seen.page.get_by_role("button", name="Leave it out").click()
            expect(seen.page.locator("#thumbs li")).to_have_count(0)
        seen.choose(*(photo(n) for n in range(3)))
        expect(count).to_contain_text("3 photos, the server takes 2 at a time. Remove 1.")
        seen.classify()
        expect(problem).to_contain_text("3 photos, the server takes 2 at a time.")
        seen.page.get_by_role("button", name="Remove photo-2.png").click()
        for names, words in ((["cat"], "at least two class names"), (["cat", "cat "], "is there twice")):
            seen.name(*names)
            seen.classify()
            expect(problem).to_contain_text(words)
        seen.name(*CLASSES)
        seen.page.get_by_text("More options").click()
        seen.page.get_by_label("Steps").fill("900")
        seen.classify()
        expect(problem).to_contain_text("Steps: a whole number from 0 to 64.")
        seen.page.get_by_label("Steps").fill("")
        seen.page.get_by_label("Template").fill("no name {x}")
        seen.classify()
        expect(problem).to_contain_text("The template needs {} exactly once")
        assert seen.posts() == []


@in_chromium
def test_a_request_under_way_is_shown_and_can_be_cancelled(browser: Browser) -> None:
    held = HeldClassifier()
    with live(held) as server:
        try:
            with visit(browser, server) as seen:
                seen.choose(photo())
                seen.name(*CLASSES)
                seen.classify()
                expect(seen.page.locator("#running")).to_be_visible()
                expect(seen.page.locator("#doing")).to_have_text("The model is looking and tuning.")
                expect(seen.page.locator("#go")).to_be_disabled()
                until(lambda: held.runs, "the engine has it")
                seen.page.get_by_role("button", name="Cancel").click()
                expect(seen.page.locator("#status")).to_have_text("Cancelled.")
                expect(seen.page.locator("#go")).to_be_enabled()
                expect(seen.page.locator("#running")).to_be_hidden()
                until(lambda: server.metric("gram_client_disconnects_total", stage="adapt") == 1, "the server knows")
                held.gate.set()
                seen.classify()
                seen.cards(1)
        finally:
            held.gate.set()


# ---- what it says ----


@in_chromium
def test_views_are_drawn_where_they_were_cut(browser: Browser) -> None:
    """Boxes are top, left, height, width in the working image: here 256 x 128 of a photo of 600 x 300."""

    class Viewing(FakeClassifier):
        def _explanation(self, image: FakePrepared, plan: Plan) -> Explanation:
            views = (
                ViewSeen(None, False, 1.0, True),
                ViewSeen((32, 64, 64, 128), True, 0.5, True),
                ViewSeen((0, 0, 10, 10), False, 2.0, False),
            )
            return replace(super()._explanation(image, plan), views=views)

    pixels = np.zeros((300, 600, 3), dtype=np.uint8)
    pixels[75:225, 150:300, 0] = 255  # the box, left half red and right half blue
    pixels[75:225, 300:450, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    with live(Viewing()) as server, visit(browser, server) as seen:
        seen.choose(photo(0, data=buffer.getvalue()))
        seen.name(*CLASSES)
        seen.page.get_by_label("Method").select_option("tpt")
        seen.classify()
        seen.cards(1)
        boxes = seen.page.locator(".boxes")
        expect(boxes).to_have_attribute("viewBox", "0 0 256 128")
        drawn = boxes.locator("rect").evaluate_all(
            "all => all.map(r => ['x', 'y', 'width', 'height'].map(a => Number(r.getAttribute(a))))"
        )
        assert drawn == [[0, 0, 256, 128], [64, 32, 128, 64]]
        crops = seen.page.locator(".crops li")
        expect(crops).to_have_count(2)
        expect(crops.first).to_have_attribute("title", "view 1, mirrored, uncertainty 0.50 nats")  # the surest first
        colours = """canvas => {
          const side = canvas.width;
          const copy = new OffscreenCanvas(side, side).getContext("2d", { willReadFrequently: true });
          copy.drawImage(canvas, 0, 0);
          return [0.1, 0.9].map((x) => [...copy.getImageData(side * x, side / 2, 1, 1).data.slice(0, 3)]);
        }"""
        until(lambda: any(crops.first.locator("canvas").evaluate(colours)[0]), "the crop is drawn")
        assert crops.first.locator("canvas").evaluate(colours) == [[0, 0, 255], [255, 0, 0]]


@in_chromium
def test_every_outcome_is_told_in_words(browser: Browser, server: Live) -> None:
    outcomes = [("completed", None), ("completed", "not_accepted")]
    outcomes += [("skipped", reason) for reason in sorted(replay.SKIPS)]
    outcomes += [("partial", reason) for reason in sorted(replay.SHEDS)]
    outcomes += [("fallback", reason) for reason in ("not_finite", "diverged", "kl_cap", "out_of_memory", "internal")]
    numbers = {"steps": 1, "steps_requested": 2, "views": 1, "views_requested": 8, "method": "gram", "scope": "image"}
    with visit(browser, server) as seen:
        tell = "async one => (await import('/ui/words.js')).told(one, 8)"
        for status, reason in outcomes:
            accepted = status in ("completed", "partial") and reason != "not_accepted"
            told = seen.page.evaluate(tell, {"status": status, "reason": reason, "accepted": accepted, **numbers})
            assert ("answered zero-shot" in told) == (not accepted), told
            assert "_" not in told, told
            assert reason is None or len(told) > 20, told
        kind = "async ([code, status]) => (await import('/ui/words.js')).kindly(code, status)"
        for name, status in STATUS.items():
            assert all(len(words) > 10 for words in seen.page.evaluate(kind, [name, status]))


@in_chromium
def test_a_server_that_starts_or_goes_is_waited_for(browser: Browser, server: Live) -> None:
    with visit(browser, server, refused=True) as seen:
        seen.page.route("**/v1/classify", lambda route: route.abort(), times=1)
        seen.choose(photo())
        seen.name(*CLASSES)
        seen.classify()
        expect(seen.page.locator("#notice")).to_contain_text("The server can't be reached")
        seen.complaints[:] = [said for said in seen.complaints if "net::ERR_FAILED" not in said]
        seen.page.get_by_role("button", name="Try again").click()
        seen.cards(1)


def test_the_address_that_a_person_types_is_the_page(server: Live) -> None:
    response = httpx.get(f"http://localhost:{server.port}", headers={"accept": "text/html"}, trust_env=False)
    assert response.status_code == 200
    assert response.text.startswith("<!doctype html>")
