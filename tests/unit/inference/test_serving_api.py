"""The serving API: what the official client gets, what is refused and how, and that a slot is freed in any case."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from contextlib import suppress

import httpx
import openai
import pytest
import torch
from pydantic import ValidationError
from support.serving import LIMIT_S, make_assistant, running, wait_until

from megatrain.config import ServeGroup
from megatrain.errors import ConfigError
from megatrain.inference import http_protocol
from megatrain.inference.api_errors import ApiError
from megatrain.inference.api_requests import ChatRequest, CompletionRequest
from megatrain.inference.batch_generator import BatchGenerator
from megatrain.inference.check_process import ContentChecks
from megatrain.inference.draw import SamplingSettings
from megatrain.inference.server import bind, networks

torch.set_num_threads(1)

ASK = [{"role": "user", "content": "What is number 5?"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def assistant():
    return make_assistant()


@pytest.fixture(scope="module")
def served(assistant):
    with running(assistant) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[1]}/v1", api_key="any", max_retries=0, timeout=LIMIT_S)


def body(**changes):
    return {"model": "toy", "messages": ASK, "max_tokens": 20, **changes}


def get(url):
    return httpx.get(url, timeout=LIMIT_S)


def post(url, content, path=CHAT, **headers):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"content-type": "application/json", **headers}
    return httpx.post(url + path, content=content, headers=headers, timeout=LIMIT_S)


def expected(assistant, **settings):
    """The ids and the text of a reply, by the generator itself."""
    ids = assistant.template.encode(ASK, asks=True).ids
    stop_ids = frozenset([*assistant.template.ends(), *assistant.end_tokens])
    reply = BatchGenerator(assistant.model, 1, 160).run([ids], SamplingSettings(stop_ids=stop_ids, **settings))[0]
    return reply, assistant.tokenizer.decode(reply.ids)


def test_the_official_client_gets_the_model_and_the_greedy_reply(assistant, client):
    reply, text = expected(assistant, max_new_tokens=30, temperature=0)
    assert [model.id for model in client.models.list()] == ["toy"] and client.models.retrieve("toy").id == "toy"
    found = client.chat.completions.create(model="toy", messages=ASK, max_tokens=30, temperature=0)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (text, reply.finish)
    prompt = len(assistant.template.encode(ASK, asks=True).ids)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, len(reply.ids))


def test_a_stream_says_the_same_and_ends_with_the_usage_if_asked(assistant, client):
    options = {"model": "toy", "messages": ASK, "max_tokens": 40, "seed": 3, "temperature": 1.2, "n": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert own[0].delta.role == "assistant" and len(own) > 5
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert chunks[-1].usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])


def test_a_seed_repeats_a_reply_beside_others_and_no_seed_does_not(assistant, client):
    _, text = expected(assistant, max_new_tokens=30, temperature=0.9, seed=11)
    options = {"model": "toy", "messages": ASK, "max_tokens": 30, "temperature": 0.9}
    others = [threading.Thread(target=client.chat.completions.create, kwargs=options) for _ in range(4)]
    for thread in others:
        thread.start()
    assert client.chat.completions.create(**options, seed=11).choices[0].message.content == text
    for thread in others:
        thread.join(LIMIT_S)
    assert len({client.chat.completions.create(**options).choices[0].message.content for _ in range(3)}) > 1


def test_log_probabilities_are_the_generators(assistant, client):
    reply, _ = expected(assistant, max_new_tokens=12, temperature=0)
    options = {"model": "toy", "messages": ASK, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx(reply.logprobs, abs=1e-5)
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob for one in content)
    streamed = [
        one
        for chunk in client.chat.completions.create(**options, stream=True)
        for choice in chunk.choices
        for one in (choice.logprobs.content if choice.logprobs else [])
    ]
    assert [one.logprob for one in streamed] == [one.logprob for one in content]
    legacy = client.completions.create(model="toy", prompt="What is", max_tokens=4, temperature=0, logprobs=2)
    found = legacy.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 4 and found.text_offset[0] == 0


def test_completions_continue_texts_and_ids(assistant, client):
    ids = assistant.tokenizer.encode("What is number")
    by_text = client.completions.create(model="toy", prompt="What is number", temperature=0, max_tokens=9)
    by_ids = client.completions.create(model="toy", prompt=[ids, ids[:2]], temperature=0, max_tokens=9)
    assert by_text.choices[0].text == by_ids.choices[0].text and len(by_ids.choices) == 2
    alone = BatchGenerator(assistant.model, 1, 160).run([ids], SamplingSettings(9, temperature=0))[0]
    decoder = assistant.tokenizer.stream_decoder()
    assert by_text.choices[0].text == "".join(map(decoder.push, alone.ids)) + decoder.finish()


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_a_reply_before_it_even_across_tokens(assistant, client, stream):
    _, text = expected(assistant, max_new_tokens=60, temperature=0.8, seed=1)
    stop = text[8:12]
    options = {"model": "toy", "messages": ASK, "max_tokens": 60, "temperature": 0.8, "seed": 1, "stop": ["☃", stop]}
    if stream:
        chunks = [one.choices[0] for one in client.chat.completions.create(**options, stream=True)]
        found, finish = "".join(one.delta.content or "" for one in chunks), chunks[-1].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        found, finish = choice.message.content, choice.finish_reason
    assert (found, finish) == (text[: text.index(stop)], "stop")


REFUSED = {
    "not JSON": (b"{", 400, "not valid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "UTF-8"),
    "deep JSON": (b"[" * 100_000, 400, "cannot be read"),
    "deep field": (b'{"model": "toy", "messages": ' + b"[" * 400 + b"]" * 400 + b"}", 400, "messages"),
    "huge number": (json.dumps(body()).encode()[:-1] + b', "seed": ' + b"9" * 6000 + b"}", 400, "cannot be read"),
    "no object": (b"[]", 400, ""),
    "NaN": (json.dumps(body(temperature=float("nan"))).encode(), 400, "temperature"),
    "half a surrogate pair": (body(messages=[{"role": "user", "content": "a\ud800"}]), 400, "messages.0.content: "),
    "half a pair in a name": (body(**{"\ud800": 1}), 400, ""),
    "no messages": (body(messages=[]), 400, "messages"),
    "unknown role": (body(messages=[{"role": "robot", "content": "a"}]), 400, "messages.0.role"),
    "an image": (body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "content"),
    "a tool's call": (
        body(messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}, *ASK]), 400, "tool_calls",
    ),
    "tools": (body(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools: not supported"),
    "a penalty": (body(presence_penalty=0.5), 400, "presence_penalty"),
    "JSON mode": (body(response_format={"type": "json_object"}), 400, "response_format"),
    "a typing error": (body(temprature=1), 400, "did you mean temperature"),
    "number as text": (body(temperature="1"), 400, "temperature"),
    "top_logprobs alone": (body(top_logprobs=2), 400, "logprobs=true"),
    "stream_options alone": (body(stream_options={"include_usage": True}), 400, "stream=true"),
    "another model": (body(model="gpt-4"), 404, "use 'toy'"),
    "too long": (body(messages=[{"role": "user", "content": "1 " * 200}]), 400, "context of 160"),
    "too long together": (body(messages=[{"role": "user", "content": "☃" * 30}], max_tokens=80), 400, "context"),
    "too many new tokens": (body(max_tokens=101), 400, "at most 100"),
    "too many replies": (body(n=13), 400, "12"),
    "too many parts": (body(messages=[{"role": "user", "content": [{}] * 200_000}]), 400, "messages.0.content.0.type"),
    "too many messages": (body(messages=[{}] * 200_000), 400, "messages.0.role"),
    "too many stops": (body(stop=["a"] * 5), 400, "4 items"),
    "an empty stop": (body(stop=""), 400, "stop"),
    "too long a model": (body(model="a" * 10_000), 400, "model: String should have at most"),
    "a number beyond all": (body(max_tokens=10**100), 400, "max_tokens"),
    "negative tokens": (body(max_tokens=-1), 400, "max_tokens"),
    "a user of any size": (body(user="a" * 10_000), 400, "user: expected a text of at most 512"),
    "metadata without end": (body(metadata={str(n): "" for n in range(17)}), 400, "metadata: expected"),
    "fields without end": (body(**{f"f{n}": None for n in range(1000)}), 400, "more than 64 fields"),
    "too large": (b" " * (2**20 + 1), 413, "1048576"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_in_the_form_that_clients_read(served, name):
    content, status, words = REFUSED[name]
    found = post(served[1], content)
    assert found.status_code == status and words in found.json()["error"]["message"]
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert served[0].service.thread.num_open == 0


def test_a_list_of_mistakes_ends_with_the_first():
    """All errors of a body of a million bytes would take the server seconds to collect."""
    for schema, changes in (
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}] * 300}),
        (CompletionRequest, {"prompt": ["a"] * 250_000}),
        (CompletionRequest, {"prompt": [[1.5] * 1000] * 100}),
        (CompletionRequest, {"prompt": [1.5] * 250_000}),
    ):
        with pytest.raises(ValidationError) as raised:
            schema.model_validate({"model": "toy", **changes})
        assert raised.value.error_count() < 10


def test_a_key_and_the_limits_are_asked_for_before_a_body_is_read(assistant):
    """The body never comes."""
    with running(assistant, keys=["secret"], requests_per_minute=1) as (_, url):
        for path, key, status in (
            (CHAT, "wrong", b"401"), ("/v1/nothing", "wrong", b"401"), (CHAT, "secret", b""), (CHAT, "secret", b"429"),
        ):  # fmt: skip
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
                connection.settimeout(LIMIT_S if status else 0.5)
                head = f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-length: 1000\r\n\r\n"
                connection.sendall(head.encode())
                if status:
                    assert status in connection.recv(1000).splitlines()[0]
                else:
                    with pytest.raises(TimeoutError):
                        connection.recv(1000)
        found = get(f"{url}/metrics").text
        assert 'megatrain_requests_total{path="/v1/chat/completions",status="401"} 1.0' in found
        assert 'megatrain_requests_total{path="other",status="401"} 1.0' in found


def test_headers_that_are_slow_or_long_end_their_connection(assistant, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_LIMIT_S", 0.5)
    with running(assistant) as (_, url):

        def answer(sent):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=LIMIT_S) as connection:
                found = b""
                with suppress(ConnectionError):  # the server leaves before it has read all
                    connection.sendall(sent)
                    while data := connection.recv(1000):
                        found += data
                return found

        long = b"a" * 2**16
        ready = b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n"
        assert answer(b"") == answer(b"GET /ready HTTP/1.1\r\nhost:") == b"", "nothing more comes"
        assert answer(ready + b"GET /rea").count(b"200 OK") == 1, "nothing more of the second"
        assert b"400 Bad Request" in answer(b"GET /%b HTTP/1.1\r\n\r\n" % long)
        assert b"200 OK" not in answer(b"GET /ready HTTP/1.1\r\nx: %b\r\nconnection: close\r\n\r\n" % long)
        assert b"200 OK" not in answer(b"GET /ready HTTP/1.1\r\n" + b"x: a\r\n" * 2**15 + b"connection: close\r\n\r\n")
        monkeypatch.setattr(http_protocol, "HEAD_LIMIT_S", 2 * LIMIT_S)
        answer(b"GET / HTTP/1.1\r\nx: " + long * 5)  # its end has not come


def test_neutral_values_of_unsupported_fields_are_taken(served):
    fields = {"tools": [], "presence_penalty": 0, "logit_bias": {}, "user": "me", "response_format": {"type": "text"}}
    assert post(served[1], body(**fields)).status_code == 200
    said = [*ASK, {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}, *ASK]
    assert post(served[1], body(messages=said, max_tokens=None)).status_code == 200


def test_other_paths_methods_and_chunked_bodies(served):
    url = served[1]
    assert get(f"{url}/v1/nothing").json()["error"]["message"] == "there is no such address"
    assert get(url + CHAT).status_code == 405
    chunks = (b" " * 2**16 for _ in range(40))
    headers = {"content-type": "application/json"}
    found = httpx.post(url + CHAT, content=chunks, headers=headers, timeout=LIMIT_S)
    assert found.status_code == 413 and found.json()["error"]["code"] == "body_too_large"


def test_the_client_raises_its_own_errors(client):
    for error, options in (
        (openai.NotFoundError, {"model": "gpt-4", "messages": ASK}),
        (openai.BadRequestError, {"model": "toy", "messages": []}),
    ):
        with pytest.raises(error) as raised:
            client.chat.completions.create(**options)
        assert raised.value.message and raised.value.body["code"]


def test_clients_that_leave_free_their_slots(served):
    """In a stream, while waiting for a whole reply, and in the middle of the request's body."""
    server, url = served
    thread = server.service.thread
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    step, calls = thread.generator.step, []

    def a_few():  # no reply ends by itself
        calls.append(1)
        return step() if len(calls) < 6 else []

    thread.generator.step = a_few
    for stream in (True, False):
        content = json.dumps(body(max_tokens=100, stream=stream, n=4)).encode()
        headers = f"host: a\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        head = f"POST {CHAT} HTTP/1.1\r\n{headers}\r\n\r\n"
        for cut in (len(content), len(content) // 2):
            with socket.create_connection(address) as connection:
                connection.sendall(head.encode() + content[:cut])
                if cut == len(content):
                    wait_until(lambda: thread.num_open == 4, "the replies have begun")
                    assert not stream or connection.recv(10)
            wait_until(lambda: thread.num_open == 0, "the slots are still taken")
    with socket.create_connection(address) as connection:
        connection.sendall((head.encode() + content) * 2)  # the second waits for the first
        wait_until(lambda: thread.num_open == 4, "the replies have begun")
    wait_until(lambda: thread.num_open == 0, "the slots of the first are still taken")
    assert 'status="504"' not in get(f"{url}/metrics").text, "freed since the client left, not by the time limit"
    del thread.generator.step
    assert post(url, body()).status_code == 200


def test_a_full_queue_answers_429_and_recovers(assistant):
    with running(assistant, max_concurrent=1, max_queue=2, max_new_tokens=140) as (server, url):
        server.service.thread.generator.step = lambda: []  # nothing moves
        done = []
        waiting = [threading.Thread(target=lambda: done.append(post(url, body()).status_code)) for _ in range(3)]
        for thread in waiting:
            thread.start()
        wait_until(lambda: server.service.thread.num_open == 3, "three requests are taken")
        refused = post(url, body())
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        # 429 is an answer. Were it not ready, Kubernetes would take all servers of a busy service out of it at once.
        assert get(f"{url}/ready").status_code == 200 and get(f"{url}/health").status_code == 200
        assert "megatrain_replies_waiting 3.0" in get(f"{url}/metrics").text
        del server.service.thread.generator.step
        for thread in waiting:
            thread.join(LIMIT_S)
        assert done == [200] * 3 and get(f"{url}/ready").status_code == 200
        server.service.is_draining = True
        assert get(f"{url}/ready").status_code == 503


def test_keys_are_asked_for_and_limits_are_a_keys_own(assistant):
    with running(assistant, keys=["first", "second"], requests_per_minute=2, tokens_per_minute=100) as (_, url):
        assert post(url, body()).status_code == 401
        assert post(url, body(), authorization="Bearer wrong").json()["error"]["code"] == "invalid_api_key"
        assert get(f"{url}/v1/models").status_code == 401 and get(f"{url}/health").status_code == 200
        found = [post(url, body(), authorization="Bearer first") for _ in range(3)]
        assert [one.status_code for one in found] == [200, 200, 429]
        assert 1 <= int(found[2].headers["retry-after"]) <= 60
        long = {"model": "toy", "prompt": "☃" * 30, "max_tokens": 40}
        found = [post(url, long, COMPLETE, authorization="Bearer second") for _ in range(2)]
        assert [one.status_code for one in found] == [200, 429] and "tokens per minute" in found[1].text


def test_only_a_trusted_proxy_names_the_clients_address(assistant):
    def statuses(url):
        forged = [{"x-forwarded-for": address} for address in ("1.1.1.1", "2.2.2.2, 127.0.0.1", "2.2.2.2")]
        return [post(url, body(max_tokens=1), **one).status_code for one in forged]

    with running(assistant, requests_per_minute=1) as (_, url):
        assert statuses(url) == [200, 429, 429]
    with running(assistant, requests_per_minute=1, trusted_proxies=["127.0.0.0/8"]) as (_, url):
        assert statuses(url) == [200, 200, 429]
    for wrong in ("proxy.example", "10.0.0.1/8", "*"):
        with pytest.raises(ConfigError, match=r"serve\.trusted_proxies: .*10\.0\.0\.0/8"):
            networks([wrong])


def test_a_request_that_takes_too_long_ends_with_504_or_with_an_error_in_its_stream(assistant):
    with running(assistant, timeout_s=3) as (server, url):
        thread = server.service.thread
        step, counts = thread.generator.step, []

        def first_only():
            counts.append(1)
            return step() if len(counts) == 1 else []

        thread.generator.step = first_only
        stream = post(url, body(stream=True)).text
        assert '"code": "timeout"' in stream.rstrip().splitlines()[-1] and "[DONE]" not in stream
        assert post(url, body()).status_code == 504
        wait_until(lambda: thread.num_open == 0, "the slots are freed")


def test_a_step_that_fails_ends_its_requests_with_500_and_the_server_goes_on(assistant):
    with running(assistant) as (server, url):
        generator = server.service.thread.generator
        generator.step = lambda: 1 / 0
        assert post(url, body()).status_code == 500
        assert post(url, body(stream=True)).status_code == 500
        del generator.step
        assert post(url, body()).status_code == 200 and get(f"{url}/health").status_code == 200


def test_a_text_that_cannot_fit_is_refused_unencoded_and_a_long_one_is_encoded_apart(assistant, monkeypatch):
    """While the long one is encoded, others are answered."""
    tokenizer, goes_on, lengths = assistant.tokenizer, threading.Event(), []
    encode = type(tokenizer).encode

    def slow(self, text):
        lengths.append(len(text))
        assert len(text) < 1000 or goes_on.wait(LIMIT_S)
        return encode(self, text)

    monkeypatch.setattr(type(tokenizer), "encode", slow)
    with running(assistant) as (server, url):
        most = server.service._prompts.max_characters
        assert 160 * 3 < most < 160 * 40, "the longest token, times the context"
        for prompt in ("a" * (most + 1), [1] * 161):
            found = post(url, {"model": "toy", "prompt": prompt}, COMPLETE)
            assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert not lengths
        server.service._prompts.max_characters = 10_000
        found = []
        long = {"model": "toy", "prompt": "a" * 5000}
        asking = threading.Thread(target=lambda: found.append(post(url, long, COMPLETE).status_code))
        asking.start()
        wait_until(lambda: lengths, "the long text is being encoded")
        assert post(url, {"model": "toy", "prompt": "What"}, COMPLETE).status_code == 200
        goes_on.set()
        asking.join(LIMIT_S)
        assert found == [400]


def test_a_step_that_hangs_fails_the_health_check_and_its_requests_until_it_returns(assistant):
    returns = threading.Event()
    with running(assistant, step_timeout_s=0.3) as (server, url):
        generator = server.service.thread.generator
        step = generator.step
        generator.step = lambda: returns.wait(LIMIT_S) and step()
        found = post(url, body())
        assert (found.status_code, found.json()["error"]["code"]) == (500, "generation_failed")
        assert (
            get(f"{url}/health").status_code == get(f"{url}/ready").status_code == post(url, body()).status_code == 503
        )
        assert server.service.thread.num_open == 0
        returns.set()
        wait_until(lambda: get(f"{url}/health").status_code == 200, "the step returns")
        assert post(url, body()).status_code == 200


def test_blocked_words_and_functions_of_ones_own_refuse_prompts_and_cut_replies(assistant, tmp_path):
    _, text = expected(assistant, max_new_tokens=60, temperature=0.8, seed=1)
    (tmp_path / "words.txt").write_text("bad\n坏\n", encoding="utf-8")
    (tmp_path / "own.py").write_text(
        f"def short(text):\n    return 'too long' if {text[10]!r} in text else None\n"
        "def wrong(text):\n    raise ValueError\n"
    )
    with running(assistant, blocked_words=str(tmp_path / "words.txt")) as (_, url):
        for said, status in (("BAD!", 400), ("很坏", 400), ("badge", 200)):
            found = post(url, body(messages=[{"role": "user", "content": said}]))
            assert found.status_code == status and (status == 200 or found.json()["error"]["code"] == "content_filter")
        refused = post(url, body(logprobs=True, stream=True))  # they would tell the tokens that wait for the check
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "logprobs"
    with running(assistant, check_reply=f"{tmp_path}/own.py:short", hold_back=8) as (_, url):
        options = body(max_tokens=60, temperature=0.8, seed=1)
        choice = post(url, options).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter" and text[10] not in choice["message"]["content"]
        stream = post(url, {**options, "stream": True}).text
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        assert text[10] not in said and events[-1]["choices"][0]["finish_reason"] == "content_filter"
    with running(assistant, check_prompt=f"{tmp_path}/own.py:wrong") as (_, url):
        assert post(url, body()).status_code == 500 and get(f"{url}/health").status_code == 200


def test_a_check_that_hangs_or_dies_costs_its_request_and_nothing_else(assistant, tmp_path):
    """Also if it holds the interpreter, ignores signals, and left a process of its own behind."""
    (tmp_path / "own.py").write_text(
        "import os, re, signal, subprocess\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "def check(text):\n"
        "    if 'hang' in text:\n"
        f"        open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))\n"
        "        re.match('(a+)+$', 'a' * 100 + 'b')\n"
        "    if 'die' in text:\n"
        "        os._exit(3)\n"
    )
    own = {"check_prompt": f"{tmp_path}/own.py:check", "check_timeout_s": 1.5, "check_processes": 1}

    def said(text):
        return post(url, body(messages=[{"role": "user", "content": text}], max_tokens=1))

    with running(assistant, **own) as (_, url):
        for _ in range(2):
            found = said("hang")
            assert found.status_code == 504 and "check of the prompt" in found.json()["error"]["message"]
        assert said("die").status_code == 500
        assert said("well").status_code == 200
        with pytest.raises(ProcessLookupError):
            wait_until(lambda: os.kill(int((tmp_path / "pid").read_text()), 0), "the check's own process ends")
    own = {"check_reply": f"{tmp_path}/own.py:hang", "check_timeout_s": LIMIT_S}
    (tmp_path / "own.py").write_text("def hang(text):\n    while True:\n        pass\n")
    with running(assistant, **own, grace_s=1) as (server, url):
        asking = threading.Thread(target=post, args=(url, body()))
        asking.start()
        wait_until(lambda: server.service.thread.generator.counts.generated_tokens > 0, "a reply has begun")
        begin = time.monotonic()
    asking.join(LIMIT_S)
    assert time.monotonic() - begin < LIMIT_S / 2, "the server ends though a check hangs"


def test_a_request_that_waits_no_more_costs_no_check_its_process(tmp_path):
    (tmp_path / "own.py").write_text("import os\n\n\ndef check(text):\n    return str(os.getpid())\n")
    config = ServeGroup(check_prompt=f"{tmp_path}/own.py:check", check_processes=1, check_timeout_s=LIMIT_S)
    with contextlib.closing(ContentChecks(config)) as checks:
        first = asyncio.run(checks.refusal("prompt", "text", True, LIMIT_S))
        with pytest.raises(ApiError) as late:
            asyncio.run(checks.refusal("prompt", "text", True, 0.0))
        assert late.value.status == 504
        assert asyncio.run(checks.refusal("prompt", "text", True, LIMIT_S)) == first


def test_the_log_has_a_line_for_each_request_and_nothing_of_what_was_said(assistant, capfd):
    secret = "Popocatepetl"
    with running(assistant) as (_, url):
        reply = post(url, body(messages=[{"role": "user", "content": secret}])).json()
        post(url, body(stream=True))
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert [(line["event"], line["status"], line["stream"]) for line in lines] == [
        ("request", 200, False),
        ("request", 200, True),
    ]
    assert secret not in json.dumps(lines)
    assert lines[0]["completion_tokens"] == reply["usage"]["completion_tokens"] > 0


def test_addresses_and_checks_that_cannot_be_used_are_refused_before_the_model_is_loaded(tmp_path):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"serve.port: cannot listen on 127.0.0.1 port {port} .*in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"serve\.host: cannot listen on no\.such\.host"):
        bind("no.such.host.invalid", 0)
    (tmp_path / "broken.py").write_text("1 / 0")
    for name, words in (
        ("nowhere:check", "there is no module nowhere"), ("json:nothing", "has no function nothing"),
        ("json", "expected module:function"), (f"{tmp_path}/no.py:check", "there is no file"),
        (f"{tmp_path}/broken.py:check", "ZeroDivisionError"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            ContentChecks(ServeGroup(check_reply=name))
    with pytest.raises(ConfigError, match=r"serve.blocked_words: .* cannot be read"):
        ContentChecks(ServeGroup(blocked_words=str(tmp_path / "none.txt")))
