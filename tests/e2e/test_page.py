"""The page at /, in a browser, over the real server and the embedded model."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from headlong.demo.paths import MODEL_DIR
from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine import Engine
from headlong.server.listen import bind
from support.browser import chromium
from support.engines import build_engine

PATIENCE_MS = 30_000
KEY = "a-key-for-the-page"
CHAT = "**/v1/chat/completions"
STATUS = "**/status"
QUESTION = "The access code Alice 4821. What is the access code Alice?"
ANSWER = "The access code Alice 4821."

OpenPage = Callable[..., Page]


def demo_engine() -> Engine:
    return build_engine(
        MODEL_DIR,
        profile=str(MODEL_DIR / "profile.json"),
        kv_cache_memory_bytes=64 << 20,
        max_model_len=8192,
        max_num_batched_tokens=512,
    )


@contextmanager
def serving(engine: Engine, config: ServerConfig) -> Iterator[str]:
    app = create_app(AsyncEngine(engine), config)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", log_level="error"))
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def engine(browser: Browser) -> Engine:
    return demo_engine()


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with serving(engine, ServerConfig(served_model_name=("demo",))) as url:
        yield url


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[OpenPage]:
    """Opens the page as it was never seen; what a browser complains of fails the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []
    strangers: list[str] = []

    def open_page(at: str = url, prepare: Callable[[Page], None] | None = None, **how: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | how))
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: strangers.append(request.url))
        if prepare is not None:
            prepare(page)
        page.goto(at)
        expect(page.locator("#model")).to_have_text("demo", timeout=PATIENCE_MS)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # What a test provokes by cutting the line is a complaint about the network alone.
    assert [each for each in complaints if "net::ERR" not in each] == []
    assert [each for each in strangers if not each.startswith(("http://127.0.0.1:", "data:"))] == []


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def endless(page: Page) -> None:
    """Lets answers run to their last token, so that there is time to look at them."""

    def change(route: Route) -> None:
        body = route.request.post_data_json
        assert body is not None
        route.continue_(post_data=json.dumps(body | {"ignore_eos": True, "max_tokens": 4000}))

    page.route(CHAT, change)


def num_tokens(page: Page) -> int:
    """Tokens of the last answer, as its figures tell."""
    figures = page.locator(".figures-line").last
    expect(figures).to_contain_text("Answer", timeout=PATIENCE_MS)
    found = re.search(r"Answer ([\d,]+)", figures.inner_text())
    assert found is not None
    return int(found[1].replace(",", ""))


def wait_at_rest(page: Page, engine: Engine) -> None:
    """The engine has forgotten the request, and the page shows it."""
    rest = threading.Event()
    for _ in range(200):
        if not engine.has_work and not any(engine.cache.owned_blocks):
            break
        rest.wait(0.1)
    assert not engine.has_work
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    expect(page.locator("#running")).to_have_text("0", timeout=PATIENCE_MS)


def test_the_page_shows_the_model_its_heads_and_its_cache(open_page: OpenPage, url: str) -> None:
    page = open_page()
    expect(page.locator("#state")).to_have_text("ready")
    expect(page).to_have_title("demo · Headlong")
    status = httpx.get(f"{url}status").json()
    expected: Counter[str] = Counter()
    for layer in status["head_groups"]:
        for group in layer:
            keeps_all = status["groups"][group]["window_size"] is None
            expected["cell tone-all" if keeps_all else "cell tone-0"] += 1
    cells = page.locator("#headmap rect").evaluate_all(
        "all => all.map(cell => cell.getAttribute('class'))"
    )
    assert Counter(cells) == expected == {"cell tone-all": 4, "cell tone-0": 12}
    assert page.locator("#legend .name").all_inner_texts() == ["retrieval", "streaming"]
    assert page.locator("#bars .name").all_inner_texts() == ["retrieval", "streaming"]


def test_the_head_map_tells_of_a_head_by_pointer_and_by_keyboard(open_page: OpenPage) -> None:
    page = open_page()
    tip = page.locator("#tip")
    page.hover("#headmap rect[data-layer='2'][data-head='3']")
    expect(tip).to_contain_text("Layer 2, KV head 3")
    expect(tip).to_contain_text("keeps the first 16 and the last 128 tokens")
    page.hover("#live-title")
    expect(tip).to_be_hidden()
    page.focus("#headmap svg")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    expect(tip).to_contain_text("Layer 1, KV head 1")
    expect(tip).to_contain_text("keeps every token")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_enter_sends_and_the_answer_comes_with_its_figures(
    open_page: OpenPage, engine: Engine
) -> None:
    page = open_page()
    page.fill("#prompt", "one line")
    page.press("#prompt", "Shift+Enter")
    assert page.input_value("#prompt") == "one line\n"
    assert page.locator(".message").count() == 0
    ask(page, QUESTION)
    answers = page.locator(".message.model")
    expect(answers.locator(".text")).to_have_text(ANSWER, timeout=PATIENCE_MS)
    expect(page.locator("#send")).to_have_text("Send", timeout=PATIENCE_MS)
    expect(page.locator("#prompt")).to_have_value("")
    figures = answers.locator(".figures-line")
    for name in ("Prompt", "Answer", "TTFT", "Speed", "KV peak"):
        expect(figures).to_contain_text(name)
    expect(figures).to_contain_text("0 cached")
    # The second question comes with the first one and its answer.
    ask(page, "The door code Bruno 77. What is the door code Bruno?")
    expect(answers).to_have_count(2)
    expect(answers.nth(1).locator(".text")).to_contain_text("Bruno 77", timeout=PATIENCE_MS)
    expect(answers.nth(1).locator(".figures-line")).not_to_contain_text(" 0 cached")
    wait_at_rest(page, engine)
    expect(page.locator("#ttft")).to_contain_text("s")
    page.click("#clear")
    assert page.locator(".message").count() == 0


@pytest.mark.parametrize("way", ["button", "escape", "new chat"])
def test_a_stopped_answer_leaves_the_engine(open_page: OpenPage, engine: Engine, way: str) -> None:
    page = open_page(prepare=endless)
    ask(page, QUESTION)
    expect(page.locator(".message.model .figures-line")).to_contain_text("Answer")
    match way:
        case "button":
            page.click("#send:text('Stop')")
        case "escape":
            page.keyboard.press("Escape")
        case _:
            page.click("#clear")
    expect(page.locator("#send")).to_have_text("Send")
    if way != "new chat":
        expect(page.locator(".figures-line")).to_contain_text("stopped by you")
    wait_at_rest(page, engine)


def test_the_answer_grows_and_the_live_view_moves(open_page: OpenPage, engine: Engine) -> None:
    page = open_page(prepare=endless)
    page.click("#example")
    assert "What is the access code" in page.input_value("#prompt")
    page.press("#prompt", "Enter")
    seen = num_tokens(page)
    figures = page.locator(".figures-line")
    expect(figures).not_to_contain_text(f"Answer {seen:,} tokens", timeout=PATIENCE_MS)
    assert num_tokens(page) > seen
    expect(page.locator("#send")).to_have_text("Stop")
    expect(page.locator("#running")).to_have_text("1", timeout=PATIENCE_MS)
    expect(page.locator("#kv-saved")).to_contain_text("MiB")
    expect(page.locator("#generation-rate")).to_have_text(re.compile(r"[1-9].* tok/s"))
    line = page.locator("#generation-spark .spark-line")
    expect(line).to_have_attribute("d", re.compile(r"^M.+L"), timeout=PATIENCE_MS)
    amount = page.locator("#bars .amount").first
    expect(amount).to_have_text(re.compile(r"^[1-9]\d* owned"))
    page.keyboard.press("Escape")
    wait_at_rest(page, engine)
    expect(amount).to_have_text(re.compile(r"^0 owned"))
    # A long question is folded.
    page.click("text=/Show all/")
    expect(page.locator(".message.user .text")).not_to_have_class("text folded")


def test_settings_are_sent_and_what_is_refused_is_told(open_page: OpenPage) -> None:
    page = open_page()
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json))
    page.fill("#temperature", "0.5")
    page.fill("#max-tokens", "5")
    page.select_option("#policy", "wider")
    page.fill("#window", "256")
    ask(page, QUESTION)
    expect(page.locator(".figures-line")).to_contain_text("max tokens reached")
    (body,) = [each for each in bodies if each]
    assert body["temperature"] == 0.5
    assert body["max_tokens"] == 5
    assert body["kv_policy"] == {"window_size": 256}
    # The browser itself refuses what is out of range.
    page.fill("#window", "1")
    ask(page, QUESTION)
    assert page.input_value("#prompt") == QUESTION
    page.select_option("#policy", "full")
    ask(page, QUESTION)
    expect(page.locator(".message.model")).to_have_count(2)
    expect(page.locator("#send")).to_have_text("Send", timeout=PATIENCE_MS)
    assert [each["kv_policy"] for each in bodies if each][1:] == ["full"]

    def refuse(route: Route) -> None:
        error = {"message": "<b>no</b> room", "type": "x", "param": None, "code": None}
        # 203 has no entry in the browser's console, as a refusal would have.
        route.fulfill(status=203, body=f"data: {json.dumps({'error': error})}\n\n")

    page.route(CHAT, refuse)
    ask(page, "again")
    expect(page.locator(".error")).to_have_text("<b>no</b> room")
    assert page.input_value("#prompt") == "again"


def test_text_stays_text(open_page: OpenPage) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"

    def answer(route: Route) -> None:
        choice = {"index": 0, "delta": {"content": hostile}, "finish_reason": "stop"}
        route.fulfill(body=f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n")

    page = open_page(prepare=lambda page: page.route(CHAT, answer))
    ask(page, hostile)
    expect(page.locator(".message .text")).to_have_text([hostile, hostile])
    assert page.locator("#log img, #log script").count() == 0


def test_a_model_without_a_chat_template_continues_text(open_page: OpenPage) -> None:
    def without_template(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"has_chat_template": False})

    page = open_page(prepare=lambda page: page.route(STATUS, without_template))
    ask(page, "The access code Alice 4821.\nThe access code Alice")
    expect(page.locator(".message.model .text")).to_contain_text("4821", timeout=PATIENCE_MS)


def test_a_server_that_drains_or_is_gone_is_seen(open_page: OpenPage) -> None:
    page = open_page()
    notice, state = page.locator("#notice"), page.locator("#state")
    expect(notice).to_be_hidden()
    expect(page.locator("#running")).to_have_text("0")

    def draining(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"state": "draining"})

    page.route(STATUS, draining)
    expect(state).to_have_text("draining")
    expect(notice).to_contain_text("takes nothing new")
    page.unroute(STATUS, draining)
    page.route(STATUS, lambda route: route.abort())
    expect(state).to_have_text("unreachable")
    expect(notice).to_contain_text("cannot be reached")
    expect(page.locator("#running")).to_have_text("\u2013")
    page.unroute(STATUS)
    expect(state).to_have_text("ready")
    expect(notice).to_be_hidden()
    expect(page.locator("#running")).to_have_text("0")


def test_a_hidden_page_asks_for_nothing(open_page: OpenPage) -> None:
    def hide(page: Page) -> None:
        page.clock.install()
        page.add_init_script(
            "Object.defineProperty(document, 'hidden', {get: () => window.isHidden === true})"
        )

    page = open_page(prepare=hide)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with page.expect_request(STATUS):
        page.clock.run_for(1500)
    page.evaluate("window.isHidden = true")
    # The pause that has begun ends in one more look.
    page.clock.run_for(3000)
    asked.clear()
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_request(STATUS):
        page.evaluate(
            "window.isHidden = false; document.dispatchEvent(new Event('visibilitychange'))"
        )


def test_dark_mode(open_page: OpenPage) -> None:
    page = open_page(color_scheme="light")
    lightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert page.evaluate(lightness) > 200
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(lightness) < 60


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_sticks_out(open_page: OpenPage, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 740})
    ask(page, f"{'long' * 200} {QUESTION}")
    expect(page.locator("#send")).to_have_text("Send", timeout=PATIENCE_MS)
    page.select_option("#policy", "wider")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for card in (".chat", ".live"):
        box = page.locator(card).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_with_keys_the_browser_asks_once(open_page: OpenPage, browser: Browser, url: str) -> None:
    config = ServerConfig(served_model_name=("demo",), api_key=(KEY,))
    with serving(demo_engine(), config) as locked:
        assert httpx.get(locked).status_code == 401
        page = open_page(locked, http_credentials={"username": "", "password": KEY})
        ask(page, QUESTION)
        expect(page.locator(".message.model .text")).to_have_text(ANSWER, timeout=PATIENCE_MS)
        page.context.close()
