"""The chat page in a real browser: it streams, stops, asks again, in two languages, and never takes text for HTML."""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import expect, sync_playwright
from support.pages import BROWSER, needs_browser
from support.serving import LIMIT_S, make_assistant, running, wait_until

torch.set_num_threads(1)
expect.set_options(timeout=LIMIT_S * 1000)

ATTACK = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
EVENT = 'data: {"choices": [{"index": 0, "delta": {"content": %s}, "finish_reason": %s}]}\n\n'


@pytest.fixture(scope="module")
def browser():
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments, timeout=LIMIT_S * 1000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    with running(make_assistant(), max_new_tokens=60) as found:
        yield found


@pytest.fixture
def page(browser, server):
    """The page, opened; at the end nothing was asked of another server, and the console has no error but refusals."""
    context = browser.new_context(viewport={"width": 360, "height": 640}, locale="en-GB")
    context.set_default_timeout(LIMIT_S * 1000)
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"{server[1]}/")
    yield page
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {urlsplit(server[1]).netloc}
    assert not [text for text in said if "Failed to load resource" not in text], said
    context.close()


@needs_browser
def test_a_conversation_by_keyboard_on_a_telephone(page, server):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest reply").fill("12")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_role("button", name="Settings").click()
    box = page.get_by_label("Message", exact=True)
    box.focus()
    page.keyboard.type("What is number 5?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type(ATTACK)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    turns = page.get_by_role("article")
    expect(turns).to_have_count(2)
    assert turns.nth(0).locator(".text").inner_text() == f"What is number 5?\n{ATTACK}"
    reply = turns.nth(1).locator(".text").text_content()
    assert reply and page.get_by_text("cut off: longest reply reached").is_visible()
    messages = page.evaluate("request().messages")
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    expect(turns).to_have_count(2)
    assert turns.nth(1).locator(".text").text_content() == reply, "temperature 0"
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1] == 360, "nothing is wider than the telephone"
    page.get_by_label("Language").select_option("zh")
    expect(page.get_by_role("button", name="重新生成")).to_be_visible()
    assert (
        page.get_by_role("button", name="发送").is_visible()
        and page.evaluate("document.documentElement.lang") == "zh-CN"
    )
    page.get_by_role("button", name="新对话").click()
    expect(turns).to_have_count(0)
    assert page.title() == "megatrain"


@needs_browser
def test_esc_stops_a_reply_and_frees_its_slot(page, server):
    thread = server[0].service.thread
    step, calls = thread.generator.step, []

    def a_few():
        calls.append(1)
        return step() if len(calls) < 12 else []

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")  # a drawn reply may end before it is stopped
    page.get_by_role("button", name="Settings").click()
    thread.generator.step = a_few
    try:
        page.get_by_label("Message", exact=True).fill("hello")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_hidden()
        has_begun = "messages.at(-1).role === 'assistant' && messages.at(-1).content.length > 0"
        wait_until(lambda: page.evaluate(has_begun), "the reply has begun")  # the page forbids wait_for_function's eval
        page.keyboard.press("Escape")
        expect(page.get_by_text("stopped")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    finally:
        del thread.generator.step
    wait_until(lambda: thread.num_open == 0, "the slot is freed")


@needs_browser
def test_replies_with_markup_stay_text_and_errors_are_shown(page):
    """The server's words are replaced on their way."""
    stream = EVENT % (json.dumps(ATTACK + " 你好"), "null") + EVENT % ('"."', '"stop"') + "data: [DONE]\n\n"
    chats = re.compile("chat/completions")
    page.route(chats, lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    expect(page.get_by_text("Type a message below to begin.")).to_be_visible()
    page.get_by_label("Message", exact=True).fill("hello")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Type a message below to begin.")).to_have_count(0)
    expect(page.get_by_role("article").nth(1).locator(".text")).to_have_text(f"{ATTACK} 你好.")
    assert page.locator("#log img, #log b").count() == 0 and page.title() == "megatrain"
    assert page.locator(".note").count() == 0, "it ended by itself"
    page.unroute(chats)
    refusal = json.dumps({"error": {"message": "<b>too many</b>", "type": "", "param": None, "code": None}})
    page.route(chats, lambda route: route.fulfill(status=429, body=refusal, content_type="application/json"))
    page.get_by_label("Message", exact=True).fill("again")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("<b>too many</b>")
    expect(page.get_by_label("Message", exact=True)).to_have_value("again")
    expect(page.get_by_role("article")).to_have_count(2)
