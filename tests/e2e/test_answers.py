# SPDX-License-Identifier: Apache-2.0
"""models/glm-tiny through Tandem answers as through unmodified transformers: in float32 token by token on every held-out
problem (except where a logit gap or a selection margin of the reference is below 1e-4: listed), in BF16 with an accuracy
within one point. The reference answers are models/eval/answers-*.json."""
import pathlib, sys, threading
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

EVAL = ROOT / "models/eval"
PROBLEMS = {p["id"]: p for p in map(json.loads, open(EVAL / "heldout.jsonl"))}
JOBS = 8


def ask(s, prompt, limit):
    r = s.json("POST", "/v1/completions", {"prompt": prompt, "max_tokens": limit, "temperature": 0, "return_token_ids": True,
                                           "skip_special_tokens": False})
    return r["choices"][0]


def run(s, answers):
    out, waiting, lock, problems = {}, list(answers), threading.Lock(), []

    def work():
        while not problems:
            with lock:
                if not waiting:
                    return
                a = waiting.pop()
            try:
                out[a["id"]] = ask(s, a["prompt"], PROBLEMS[a["id"]]["max_tokens"])
            except Exception as e:
                problems.append(f"{a['id']}: {e!r}")

    threads = [threading.Thread(target=work) for _ in range(JOBS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    check(not problems, problems[:2])
    return out


def stripped(ids, stop):
    return ids[:-1] if ids and ids[-1] in stop else ids


def float32_is_equal():
    ref = json.loads((EVAL / "answers-f32.json").read_text())
    stop = json.loads((pathlib.Path(MODEL) / "generation_config.json").read_text())["eos_token_id"]
    with Server("--act", "f32", "--kv", "f32", "--index", "f32") as s:
        got = run(s, ref["answers"])
    differ = [a for a in ref["answers"] if got[a["id"]]["token_ids"] != a["ids"]
              and stripped(got[a["id"]]["token_ids"], stop) != stripped(a["ids"], stop)]
    for a in differ:
        n = sum(map(len, a["close"].values()))
        print(f"   differs: {a['id']}, {n} places within {ref['margin_limit']} in the reference")
    print(f"   {len(ref['answers']) - len(differ)} of {len(ref['answers'])} answers are equal id by id")
    surprising = [a["id"] for a in differ if not any(a["close"].values())]
    check(not surprising, f"differ without a close place: {surprising}")
    check(len(differ) <= len(ref["answers"]) // 50, "more than 2 % differ")


def answer_of(text):
    m = re.findall(r"[Tt]he answer is (.*?)\.?\s*(?:<\||$)", text.rsplit("</think>", 1)[-1].strip())
    return m[-1].strip() if m else None


def bf16_is_as_good():
    ref = json.loads((EVAL / "answers-bf16.json").read_text())
    with Server() as s:
        got = run(s, ref["answers"])
    right = sum(answer_of(c["text"]) == str(PROBLEMS[i]["answer"]) for i, c in got.items())
    theirs = sum(a for a, _ in ref["accuracy"].values())
    n = len(got)
    print(f"   right: {right} of {n}, transformers {theirs}")
    check(abs(right - theirs) <= 0.01 * n, "accuracies differ by more than one point")


if __name__ == "__main__":
    main(float32_is_equal, bf16_is_as_good)
