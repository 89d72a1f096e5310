# SPDX-License-Identifier: Apache-2.0
"""Ask the held-out problems through an OpenAI-compatible API; print accuracy per skill.

  ask.py --url http://127.0.0.1:8080/v1 [--model NAME] [--problems heldout.jsonl] [--skill add,word1]
         [--limit N] [--jobs 4] [--no-think] [--out answers.jsonl] [--key KEY] [--timeout 120]

Greedy (temperature 0). A reply counts when its text says 'The answer is X.' with the right X. The
range in brackets is the 95 % Wilson interval. Exit status: 0 all asked, 1 any request failed, 2 bad use.
"""
import argparse
import concurrent.futures
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request

import problems


def fail(text):
    print(f"ask.py: {text}", file=sys.stderr)
    sys.exit(2)


def wilson(k, n, z=1.96):
    if n == 0:
        return 0.0, 1.0
    p = k / n
    mid = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, mid - half), min(1.0, mid + half)


def read_problems(path):
    out = []
    try:
        with open(path, encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    p = json.loads(line)
                except ValueError as e:
                    fail(f"{path}:{n}: not JSON: {e}")
                missing = [k for k in ("id", "skill", "question", "answer") if not isinstance(p, dict) or k not in p]
                if missing:
                    fail(f"{path}:{n}: no field {', '.join(missing)}")
                out.append(p)
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{path}: {e}")
    if not out:
        fail(f"{path}: no problems in it")
    return out


def post(a, body):
    req = urllib.request.Request(a.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
    if a.key:
        req.add_header("Authorization", "Bearer " + a.key)
    with urllib.request.urlopen(req, timeout=a.timeout) as r:
        return json.load(r)


def ask(a, p):
    body = {"model": a.model, "messages": [{"role": "user", "content": p["question"]}], "temperature": 0,
            "max_tokens": int(p.get("max_tokens", 160))}
    if a.no_think:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    start = time.time()
    try:
        reply = post(a, body)
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
    except urllib.error.HTTPError as e:
        detail = e.read(300).decode("utf-8", "replace")
        return dict(p, error=f"HTTP {e.code}: {detail}")
    except (OSError, ValueError) as e:
        return dict(p, error=f"{type(e).__name__}: {e}")
    except (KeyError, IndexError, TypeError, AttributeError):
        return dict(p, error="the reply has not the form of a chat completion")
    got = problems.extract(text)
    return dict(p, content=text, reasoning=message.get("reasoning_content"), finish=choice.get("finish_reason"),
                got=got, right=got == str(p["answer"]), seconds=round(time.time() - start, 3))


def table(results):
    skills = []
    for r in results:
        if r["skill"] not in skills:
            skills.append(r["skill"])
    rows = [(s, [r for r in results if r["skill"] == s]) for s in skills] + [("all", results)]
    print(f"{'skill':<16}{'right':>6}{'of':>6}{'':>3}accuracy (95 % interval)")
    for name, rs in rows:
        k, n = sum(bool(r.get("right")) for r in rs), len(rs)
        lo, hi = wilson(k, n)
        print(f"{name:<16}{k:>6}{n:>6}   {100 * k / n:5.1f} % ({100 * lo:.1f} to {100 * hi:.1f})")


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    ap = argparse.ArgumentParser(description="Ask held-out problems through an OpenAI-compatible API.")
    ap.add_argument("--url", required=True, help="base address, with /v1")
    ap.add_argument("--model", default="glm-tiny")
    ap.add_argument("--problems", default=os.path.join(here, "heldout.jsonl"))
    ap.add_argument("--skill", help="these skills only, separated by commas")
    ap.add_argument("--limit", type=int, help="at most so many problems of each skill")
    ap.add_argument("--jobs", type=int, default=4)
    ap.add_argument("--no-think", action="store_true")
    ap.add_argument("--out", help="write every answer here, JSON lines")
    ap.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""))
    ap.add_argument("--timeout", type=float, default=120)
    a = ap.parse_args()
    if not a.url.startswith(("http://", "https://")):
        fail("--url must begin with http:// or https://")
    if not 1 <= a.jobs <= 256:
        fail("--jobs must be 1 to 256")
    if a.limit is not None and a.limit < 1:
        fail("--limit must be at least 1")
    if a.timeout <= 0:
        fail("--timeout must be above 0")
    todo = read_problems(a.problems)
    if a.skill:
        want = a.skill.split(",")
        known = {p["skill"] for p in todo}
        bad = [s for s in want if s not in known]
        if bad:
            fail(f"no skill {', '.join(bad)}; there are {', '.join(sorted(known))}")
        todo = [p for p in todo if p["skill"] in want]
    if a.limit:
        seen = {}
        kept = []
        for p in todo:
            seen[p["skill"]] = seen.get(p["skill"], 0) + 1
            if seen[p["skill"]] <= a.limit:
                kept.append(p)
        todo = kept
    first = ask(a, todo[0])
    if "error" in first:
        fail(f"{a.url}: {first['error']}")
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        results = [first] + list(pool.map(lambda p: ask(a, p), todo[1:]))
    if a.out:
        try:
            with open(a.out, "w", encoding="utf-8") as f:
                for r in results:
                    f.write(json.dumps(r) + "\n")
        except OSError as e:
            fail(f"--out: {e}")
    errors = [r for r in results if "error" in r]
    table([r for r in results if "error" not in r])
    for r in errors[:5]:
        print(f"ask.py: {r['id']}: {r['error']}", file=sys.stderr)
    if errors:
        print(f"ask.py: {len(errors)} of {len(results)} requests failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
