# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of the unmodified transformers class (eager attention) to the held-out problems.

  answers.py CHECKPOINT OUT.json [--dtype float32|bfloat16] [--problems FILE] [--limit N] [--no-think]

Per problem: prompt ids, generated ids (up to the stop id, which is included), the text, whether it
is right, and every place where a comparison may differ for a reason of rounding: gaps between the
two largest logits ("logits": [token, gap]), index selections and expert choices ("index", "expert":
[layer, position, margin]) below 1e-4. Margins of choices are relative to the largest score.
"""
import argparse
import json
import os
import sys
import time

import torch
import transformers
from transformers import AutoTokenizer

import check
import probe
from data import P

LIMIT = 1e-4


@torch.no_grad()
def generate(model, prompts, max_tokens, stop):
    """Greedy, with the cache; all prompts have one length. Returns ids and smallest gaps."""
    ids = torch.tensor(prompts)
    n = len(prompts)
    out, gaps, done = [[] for _ in range(n)], [[] for _ in range(n)], [False] * n
    past, x = None, ids
    for _ in range(max(max_tokens)):
        r = model(x, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = r.past_key_values
        top = r.logits[:, -1].float().topk(2, -1)
        nxt = top.indices[:, 0]
        for i in range(n):
            if not done[i]:
                out[i].append(int(nxt[i]))
                gaps[i].append(float(top.values[i, 0] - top.values[i, 1]))
                done[i] = int(nxt[i]) in stop or len(out[i]) >= max_tokens[i]
        if all(done):
            break
        x = nxt[:, None]
    return out, gaps


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("checkpoint")
    ap.add_argument("out")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    ap.add_argument("--problems", default=os.path.join(os.path.dirname(P.__file__), "heldout.jsonl"))
    ap.add_argument("--limit", type=int)
    ap.add_argument("--no-think", action="store_true")
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    try:
        with open(a.problems) as f:
            todo = [json.loads(line) for line in f if line.strip()]
    except (OSError, ValueError) as e:
        sys.exit(f"answers.py: {a.problems}: {e}")
    if a.limit:
        count = {}
        kept = []
        for p in todo:
            count[p["skill"]] = count.get(p["skill"], 0) + 1
            if count[p["skill"]] <= a.limit:
                kept.append(p)
        todo = kept
    tok = AutoTokenizer.from_pretrained(a.checkpoint)
    model = check.hf(a.checkpoint, getattr(torch, a.dtype))
    cfg = model.config
    stop = set(cfg.eos_token_id)
    groups = {}
    for n, p in enumerate(todo):
        text = tok.apply_chat_template([{"role": "user", "content": p["question"]}], tokenize=False,
                                       add_generation_prompt=True, enable_thinking=not a.no_think)
        p["prompt"] = tok.encode(text, add_special_tokens=False)
        groups.setdefault(len(p["prompt"]), []).append(n)
    t0 = time.time()
    for length in sorted(groups):
        for at in range(0, len(groups[length]), 16):
            part = [todo[n] for n in groups[length][at:at + 16]]
            outs, gaps = generate(model, [p["prompt"] for p in part], [p["max_tokens"] for p in part], stop)
            for p, out, gap in zip(part, outs, gaps):
                p["ids"] = out
                text = tok.decode([i for i in out if i not in stop], skip_special_tokens=False)
                p["text"] = text
                p["right"] = P.extract(text.split("</think>")[-1]) == str(p["answer"])
                p["least_gap"] = round(min(gap), 6)
                close = {"logits": [[i, float(f"{g:.1e}")] for i, g in enumerate(gap) if g < LIMIT]}
                if a.dtype == "float32":
                    with probe.Probe(model) as pr, torch.no_grad():
                        model(torch.tensor([p["prompt"] + out[:-1]]))
                    for kind, margins in (("index", pr.index_margins(cfg.index_topk)),
                                          ("expert", pr.expert_margins(cfg.num_experts_per_tok))):
                        for layer, m in margins.items():
                            for pos in (m < LIMIT).nonzero()[:, 0].tolist():
                                close.setdefault(kind, []).append([layer, pos, float(f"{m[pos]:.1e}")])
                p["close"] = close
        print(f"\r{length} {time.time() - t0:.0f} s", end="", file=sys.stderr, flush=True)
    skills = {}
    for p in todo:
        s = skills.setdefault(p["skill"], [0, 0])
        s[0] += p["right"]
        s[1] += 1
    result = {
        "transformers": transformers.__version__, "torch": torch.__version__, "dtype": a.dtype, "attention": "eager",
        "thinking": not a.no_think, "margin_limit": LIMIT,
        "accuracy": {k: v for k, v in skills.items()},
        "answers": [{"id": p["id"], "prompt": p["prompt"], "ids": p["ids"], "text": p["text"], "right": p["right"],
                     "least_gap": p["least_gap"], "close": p["close"]} for p in todo],
    }
    with open(a.out, "w") as f:
        f.write("{" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in result.items() if k != "answers")
                + ',\n"answers": [\n' + ",\n".join(json.dumps(x, separators=(",", ":")) for x in result["answers"]) + "\n]}\n")
    print(file=sys.stderr)
    for k, (r, n) in skills.items():
        print(f"{k:<16}{r:>4} of {n}")
    for kind in ("logits", "index", "expert"):
        n = [len(p["close"].get(kind, ())) for p in todo]
        print(f"margins below {LIMIT}: {kind}: {sum(n)} in {sum(x > 0 for x in n)} problems")


if __name__ == "__main__":
    main()
