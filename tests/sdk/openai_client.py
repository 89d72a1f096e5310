# SPDX-License-Identifier: Apache-2.0
"""chat, streaming, usage, errors, cancellation through the official `openai` package."""
import pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *
import openai

ASK = [{"role": "user", "content": "What is 23 + 48?"}]


def chat():
    r = client.chat.completions.create(model="glm-tiny", messages=ASK, temperature=0)
    check(r.choices[0].message.content and r.choices[0].finish_reason == "stop", r)
    check(r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens, r.usage)
    check(r.usage.prompt_tokens_details.cached_tokens is not None, r.usage)


def streaming():
    whole = client.chat.completions.create(model="glm-tiny", messages=ASK, temperature=0).choices[0].message.content
    text, usage, finish = "", None, None
    for c in client.chat.completions.create(model="glm-tiny", messages=ASK, temperature=0, stream=True,
                                            stream_options={"include_usage": True}):
        if c.usage:
            usage = c.usage
        for ch in c.choices:
            text += ch.delta.content or ""
            finish = ch.finish_reason or finish
    check(text == whole and finish == "stop" and usage.completion_tokens > 0, (text, whole, finish, usage))


def completions_and_models():
    r = client.completions.create(model="glm-tiny", prompt="The house", max_tokens=5, temperature=0, logprobs=2)
    check(len(r.choices[0].logprobs.tokens) == 5, r)
    check(client.models.list().data[0].id == "glm-tiny", "models")
    check(client.models.retrieve("glm-tiny").id == "glm-tiny", "model")


def errors():
    cases = [(openai.BadRequestError, "invalid_value", dict(messages=ASK, temperature=5)),
             (openai.NotFoundError, "model_not_found", dict(messages=ASK, model="no")),
             (openai.BadRequestError, "context_length_exceeded", dict(messages=[{"role": "user", "content": "a " * 30000}]))]
    for kind, code, args in cases:
        try:
            client.chat.completions.create(**{"model": "glm-tiny", **args})
            raise AssertionError(f"no error for {code}")
        except kind as e:
            check(e.code == code, (e.code, code))


def cancellation():
    before = srv.metric("tandem_requests_cancelled_total")
    s = client.chat.completions.create(model="glm-tiny", messages=ASK, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(s))
    s.close()
    end = time.monotonic() + 10
    while srv.metric("tandem_requests_cancelled_total") == before and time.monotonic() < end:
        time.sleep(0.02)
    check(srv.metric("tandem_requests_cancelled_total") == before + 1, "the server did not see the cancellation")
    while srv.json("GET", "/health")["running"] and time.monotonic() < end:
        time.sleep(0.02)
    check(srv.json("GET", "/health")["running"] == 0, "still running")


if __name__ == "__main__":
    with Server() as srv:
        client = openai.OpenAI(base_url=f"http://{srv.host}:{srv.port}/v1", api_key="none", max_retries=0)
        main(chat, streaming, completions_and_models, errors, cancellation)
