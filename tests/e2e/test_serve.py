# SPDX-License-Identifier: Apache-2.0
"""Three real processes answer a chat: shapes, streams, errors, limits. Promises 1, 2 and 5 at the edge."""
import json, pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

QUESTION = "What is 23 + 48?"


def three_processes():
    pids = srv.pids()
    check([len(pids[k]) for k in ("router", "prefill-worker", "decode-worker")] == [1, 1, 1], f"processes: {pids}")


def chat_answers():
    a = srv.chat(QUESTION, temperature=0)
    m = a["choices"][0]["message"]
    check(a["object"] == "chat.completion" and a["id"].startswith("chatcmpl-"), a)
    check(m["role"] == "assistant" and isinstance(m["content"], str) and m["content"], a)
    check(a["choices"][0]["finish_reason"] == "stop", a)
    u = a["usage"]
    check(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"], u)
    check(a["system_fingerprint"].startswith("td-") and len(a["system_fingerprint"]) == 19, a)


def answer_is_right():
    """The model's answer comes from its weights: a held-out style addition."""
    check("71" in srv.chat(QUESTION, temperature=0)["choices"][0]["message"]["content"], "23 + 48 is 71")


def stream_equals_whole():
    for more in ({"temperature": 0}, {"temperature": 1, "seed": 7}, {"temperature": 0.8, "seed": 9, "n": 3}):
        whole = srv.chat(QUESTION, **more)
        s = srv.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}],
                                                "stream_options": {"include_usage": True}, **more})
        check(s.status == 200 and s.headers["content-type"].startswith("text/event-stream"), s.headers)
        check(s.headers["cache-control"] == "no-cache" and s.headers["x-accel-buffering"] == "no", s.headers)
        out, usage, error = s.collect()
        check(error is None, error)
        for c in whole["choices"]:
            o = out[c["index"]]
            check(o["content"] == c["message"]["content"], (o, c))
            check(o["reasoning"] == c["message"].get("reasoning_content", ""), (o, c))
            check(o["finish"] == c["finish_reason"], (o, c))
        for k in ("prompt_tokens", "completion_tokens"):
            check(usage[k] == whole["usage"][k], (usage, whole["usage"]))
        first = s.events[0]["choices"][0]["delta"]
        check(first["role"] == "assistant", first)
        check(all("role" not in c["delta"] for e in s.events for c in e["choices"] if e is not s.events[0]) or more.get("n"),
              "role in a later chunk")
        check(len({(e["id"], e["created"]) for e in s.events}) == 1, "id or created changed")
        check(s.events[-1]["choices"] == [] and s.events[-1]["usage"], "last event is not the usage")
        check(all(e["usage"] is None for e in s.events[:-1]), "usage null in ordinary chunks")


def seeds():
    a, b, c = (srv.chat("Tell me a story.", temperature=1, seed=s, max_tokens=40)["choices"][0]["message"] for s in (1, 1, 2))
    check(a == b, "same seed, other answer")
    check(a != c, "another seed gave the same 40 tokens")
    r = srv.chat("Tell me a story.", temperature=1, max_tokens=20)
    check(0 <= r["seed"] < 2**53, "an unseeded request returns its seed")
    again = srv.chat("Tell me a story.", temperature=1, max_tokens=20, seed=r["seed"])
    check(again["choices"][0]["message"] == r["choices"][0]["message"], "the returned seed does not repeat the answer")


def thinking_switch():
    on = srv.chat(QUESTION, temperature=0)["choices"][0]["message"]
    check(on.get("reasoning_content"), "thinking is on by default")
    for more in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}):
        off = srv.chat("What is the capital of France?", temperature=0, **more)["choices"][0]["message"]
        check("reasoning_content" not in off and off["content"], (more, off))


def max_tokens_and_stop():
    a = srv.chat("Tell me a story.", temperature=0, max_tokens=5)
    check(a["choices"][0]["finish_reason"] == "length" and a["usage"]["completion_tokens"] == 5, a)
    one = srv.chat("Tell me a story.", temperature=0, max_tokens=1)
    check(one["usage"]["completion_tokens"] == 1 and one["choices"][0]["finish_reason"] == "length", one)
    base = srv.json("POST", "/v1/completions", {"prompt": "The capital of", "max_tokens": 30, "temperature": 0})["choices"][0]["text"]
    word = base.split()[3] if len(base.split()) > 3 else base[3:6]
    cut = srv.json("POST", "/v1/completions", {"prompt": "The capital of", "max_tokens": 30, "temperature": 0, "stop": [word]})
    check(cut["choices"][0]["text"] == base[:base.index(word)], (base, word, cut))
    check(cut["choices"][0]["finish_reason"] == "stop", cut)


def completions_forms():
    ids = srv.json("POST", "/tokenize", {"prompt": "The house is"})["tokens"]
    text = srv.json("POST", "/v1/completions", {"prompt": "The house is", "max_tokens": 8, "temperature": 0})
    by_ids = srv.json("POST", "/v1/completions", {"prompt": ids, "max_tokens": 8, "temperature": 0})
    check(text["choices"][0]["text"] == by_ids["choices"][0]["text"], (text, by_ids))
    many = srv.json("POST", "/v1/completions", {"prompt": ["The house is", "Water"], "max_tokens": 8, "temperature": 0, "n": 2})
    check([c["index"] for c in many["choices"]] == [0, 1, 2, 3], many)
    check(many["choices"][0]["text"] == text["choices"][0]["text"], many)
    default = srv.json("POST", "/v1/completions", {"prompt": "The house is", "temperature": 0, "ignore_eos": True})
    check(default["usage"]["completion_tokens"] == 16, "16 tokens by default")
    echo = srv.json("POST", "/v1/completions", {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1})
    lp = echo["choices"][0]["logprobs"]
    check(echo["choices"][0]["text"].startswith("The house is"), echo)
    check(lp["token_logprobs"][0] is None and len(lp["token_logprobs"]) == len(ids) + 1, lp)
    check(all(x <= 0 for x in lp["token_logprobs"][1:]), lp)
    zero = srv.json("POST", "/v1/completions", {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1})
    check(zero["choices"][0]["logprobs"]["token_logprobs"] == lp["token_logprobs"][:-1], "max_tokens 0 with echo")


def logprobs():
    a = srv.chat(QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=8)["choices"][0]["logprobs"]["content"]
    check(len(a) == 8 and all(len(t["top_logprobs"]) == 3 for t in a), a)
    check(all(t["logprob"] == t["top_logprobs"][0]["logprob"] for t in a), "greedy takes the most likely token")
    check(all(bytes(t["bytes"]).decode(errors="replace") == t["token"] for t in a), a)


def tokenize_round_trip():
    text = "Grüße, 世界! 🙂 <|user|> 12345"
    t = srv.json("POST", "/tokenize", {"prompt": text})
    check(t["count"] == len(t["tokens"]) and t["max_model_len"] >= 512, t)
    check(srv.json("POST", "/detokenize", {"tokens": t["tokens"]})["prompt"] == text, t)
    chat = srv.json("POST", "/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    check(chat["count"] == srv.chat("hi", max_tokens=1)["usage"]["prompt_tokens"], chat)


def models_and_health():
    m = srv.json("GET", "/v1/models")["data"][0]
    check(m["id"] == m["root"] == "glm-tiny" and m["max_model_len"] == m["meta"]["n_ctx"], m)
    check(srv.json("GET", "/v1/models/glm-tiny")["id"] == "glm-tiny", m)
    check(srv.json("GET", "/v1/models/other", expect=404)["error"]["code"] == "model_not_found", "model")
    check(srv.json("GET", "/health")["status"] == "ok", "health")
    check(len(srv.json("GET", "/version")["profile_id"]) == 32, "version")
    check(b"tandem_generation_tokens_total" in srv.request("GET", "/metrics")[2], "metrics")


def error_shapes():
    msg = [{"role": "user", "content": "hi"}]
    cases = [
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"", 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"[1]", 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"[" * 40, 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b'{"messages":"\xff\xfe"}', 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b'{"n":1,"n":2}', 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", {}, 400, "invalid_request", "messages"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "invalid_value", "messages"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "x", "content": "y"}]}, 400, "invalid_value", "messages"),
        ("POST", "/v1/chat/completions", {"messages": msg, "temperature": 9}, 400, "invalid_value", "temperature"),
        ("POST", "/v1/chat/completions", {"messages": msg, "temperature": "hot"}, 400, "invalid_value", "temperature"),
        ("POST", "/v1/chat/completions", {"messages": msg, "max_tokens": -1}, 400, "invalid_value", "max_tokens"),
        ("POST", "/v1/chat/completions", {"messages": msg, "n": 17}, 400, "invalid_value", "n"),
        ("POST", "/v1/chat/completions", {"messages": msg, "stop": [""]}, 400, "invalid_value", "stop"),
        ("POST", "/v1/chat/completions", {"messages": msg, "logit_bias": {"999999": 1}}, 400, "invalid_value", "logit_bias"),
        ("POST", "/v1/chat/completions", {"messages": msg, "model": "other"}, 404, "model_not_found", "model"),
        ("POST", "/v1/chat/completions", {"messages": msg, "tools": [{"type": "function"}]}, 501, "unsupported", "tools"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 20000}]}, 400, "context_length_exceeded", "messages"),
        ("POST", "/v1/chat/completions", {"messages": msg, "max_tokens": 10000000}, 400, "context_length_exceeded", "max_tokens"),
        ("POST", "/v1/completions", {"prompt": [3071999]}, 400, "invalid_value", "prompt"),
        ("POST", "/v1/completions", {"prompt": ""}, 400, "invalid_value", "prompt"),
        ("POST", "/detokenize", {"tokens": [-1]}, 400, "invalid_value", "tokens"),
        ("GET", "/nowhere", None, 404, "not_found", None),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed", None),
        ("POST", "/v1/completions", b"x" * (9 << 20), 413, "request_too_large", None),
    ]
    for method, path, body, status, code, param in cases:
        got, headers, data = srv.request(method, path, body)
        check(got == status, (path, str(body)[:80], got, data[:300]))
        e = json.loads(data)["error"]
        check(sorted(e) == ["code", "message", "param", "type"], e)
        check(e["code"] == code and e["param"] == param, (e, code, param))
        check(e["message"], e)
        check("x-request-id" in headers or status == 413, headers)
        if code == "context_length_exceeded":
            check("maximum context length is" in e["message"], e)
        if status == 405:
            check(headers["allow"] == "POST", headers)
        if status == 501:
            check(headers["x-should-retry"] == "false", headers)
    srv.chat("still there?", max_tokens=2)


def request_ids():
    """A client's id comes back; while it runs it is taken, afterwards it is free."""
    body = {"messages": [{"role": "user", "content": "hi"}], "request_id": "my-id", "max_tokens": 400, "ignore_eos": True}
    s = srv.stream("/v1/chat/completions", body)
    check(s.headers["x-request-id"] == "my-id", s.headers)
    status, _, data = srv.request("POST", "/v1/chat/completions", {**body, "max_tokens": 1})
    check(status == 409 and json.loads(data)["error"]["code"] == "conflict", (status, data))
    out, _, error = s.collect()
    check(error is None and s.events[0]["id"] == "my-id", error)
    end = time.monotonic() + 5 * SLOW
    while srv.request("POST", "/v1/chat/completions", {**body, "max_tokens": 1})[0] == 409:
        check(time.monotonic() < end, "the id is still taken")


def unknown_fields_are_named():
    status, headers, _ = srv.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}],
                                                                       "max_tokens": 1, "frobnicate": 3, "user": "u"})
    check(status == 200 and headers["x-tandem-ignored"] == "frobnicate", headers)


def prefix_cache_is_told():
    long = "Here is a text. " * 40
    a = srv.chat(long, temperature=0, max_tokens=4, cache_salt="one")
    b = srv.chat(long, temperature=0, max_tokens=4, cache_salt="one")
    c = srv.chat(long, temperature=0, max_tokens=4, cache_salt="two")
    cached = [x["usage"]["prompt_tokens_details"]["cached_tokens"] for x in (a, b, c)]
    check(cached[0] == 0 and cached[1] >= 64 and cached[1] % 64 == 0 and cached[2] == 0, cached)
    check(a["choices"][0]["message"] == b["choices"][0]["message"] == c["choices"][0]["message"], "cache changed the answer")


def disconnect_frees_everything():
    before = srv.metric("tandem_requests_cancelled_total")
    streams = [srv.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": f"Count {i}."}], "ignore_eos": True,
                                                   "max_tokens": 400}) for i in range(6)]
    for s in streams[:3]:
        next(iter(s))
    for s in streams:
        s.close()
    end = time.monotonic() + 10 * SLOW
    while srv.metric("tandem_requests_cancelled_total") < before + 6 and time.monotonic() < end:
        time.sleep(0.02)
    check(srv.metric("tandem_requests_cancelled_total") == before + 6, "not every disconnect was seen")
    while json.loads(srv.request("GET", "/health")[2])["running"] and time.monotonic() < end:
        time.sleep(0.02)
    check(json.loads(srv.request("GET", "/health")[2])["running"] == 0, "requests still run after their clients left")


if __name__ == "__main__":
    with Server() as srv:
        main(three_processes, chat_answers, stream_equals_whole, seeds, thinking_switch, max_tokens_and_stop, completions_forms,
             logprobs, tokenize_round_trip, models_and_health, error_shapes, request_ids, unknown_fields_are_named, prefix_cache_is_told,
             disconnect_frees_everything, answer_is_right)
    check(srv.proc.returncode == 0, f"exit status {srv.proc.returncode}")
