# SPDX-License-Identifier: Apache-2.0
"""Conditional split (--local-prefill-tokens): what a decode worker prefills itself changes no token (promise 1), is counted, named
once in the log and told in the answer's usage, and an error under --strict (promise 4)."""
import pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

LIMIT = 100


def body(words, **more):
    return {"messages": [{"role": "user", "content": "What is 44 plus 17? " * words}], "temperature": 1.0, "seed": 5, "max_tokens": 24,
            "ignore_eos": True, **more}


def ask(s, b):
    status, _, data = s.request("POST", "/v1/chat/completions", b)
    check(status == 200, (status, data))
    return json.loads(data)


def local_of(answer):
    return answer["usage"]["prompt_tokens_details"].get("local_prefill_tokens", 0)


def main():
    bodies = [body(1), body(1, n=3), body(60), body(60), body(60)]
    with Server() as s:
        expected = [ask(s, b) for b in bodies]
        check(all(local_of(a) == 0 for a in expected), "prefilled locally without --local-prefill-tokens")
        check(s.metric("tandem_local_prefills_total") == 0, "counted")
    with Server("--local-prefill-tokens", str(LIMIT), "--log-level", "info") as s:
        got = [ask(s, b) for b in bodies]
        for a, e in zip(got, expected):
            check([c["message"] for c in a["choices"]] == [c["message"] for c in e["choices"]], (a, e))
        short = got[0]["usage"]["prompt_tokens"]
        long = got[2]["usage"]["prompt_tokens"]
        check(short <= LIMIT < long, (short, long))
        # the second time the decode worker has all but the last block of the long one
        locals_ = [local_of(a) for a in got]
        want = [short, short - (short - 1) // 64 * 64, 0, long - (long - 1) // 64 * 64, long - (long - 1) // 64 * 64]
        check(locals_ == want, (locals_, want))
        check(got[3]["usage"]["prompt_tokens_details"]["cached_tokens"] == (long - 1) // 64 * 64, got[3]["usage"])
        check(s.metric("tandem_local_prefills_total") == 4, "attempts")
        check(s.metric("tandem_local_prefill_tokens_total") == sum(want), "tokens")
        out = s.stream("/v1/chat/completions", {**bodies[0], "stream_options": {"include_usage": True}})
        text, _, error = out.collect()
        check(error is None and out.events[-1]["usage"]["prompt_tokens_details"]["local_prefill_tokens"] == want[1], out.events[-1])
        check(s.messages().count("event=local_prefill") == 1, s.messages())
    p = subprocess.run([TANDEM, "router", "--model", MODEL, "--strict", "--local-prefill-tokens", "8", "--control",
                        "tcp://127.0.0.1:0", "--listen", "127.0.0.1:0"], capture_output=True, text=True, timeout=60 * SLOW)
    check(p.returncode != 0 and "--local-prefill-tokens" in p.stderr and "--strict" in p.stderr, p.stderr)


main()
