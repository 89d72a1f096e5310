# SPDX-License-Identifier: Apache-2.0
"""The chat template gives the text that the training documents have; pieces encode like the whole."""
import json
import os
import random
import re

from transformers import AutoTokenizer

import data

HERE = os.path.dirname(os.path.abspath(__file__))


def parse(text):
    """A rendered training document back into messages and template arguments."""
    kw = {"enable_thinking": False}
    messages, tools = [], None
    m = re.match(r"\[gMASK\]<sop>(<\|system\|>Reasoning Effort: (Max|High))?", text)
    if m.group(1):
        kw["enable_thinking"] = True
        kw["reasoning_effort"] = m.group(2).lower()
    text = text[m.end():].removesuffix("<|endoftext|>").removesuffix("<|observation|>")
    for role, body in re.findall(r"<\|(system|user|assistant|observation)\|>(.*?)(?=<\|(?:system|user|assistant|observation)\|>|$)",
                                 text, re.S):
        if role == "system" and body.startswith("\n# Tools"):
            tools = [{"type": "function", "function": json.loads(s)} for s in
                     re.search(r"<tools>\n(.*)\n</tools>", body, re.S).group(1).split("\n")]
        elif role == "observation":
            messages.append({"role": "tool", "content": re.search("<tool_response>(.*)</tool_response>", body).group(1)})
        elif role == "assistant":
            think, rest = re.match("<think>(.*?)</think>(.*)", body, re.S).groups()
            call = re.match("<tool_call>(.*?)<arg_key>(.*?)</arg_key><arg_value>(.*?)</arg_value></tool_call>", rest)
            msg = {"role": role, "content": "" if call else rest, "reasoning_content": think}
            if call:
                msg["tool_calls"] = [{"type": "function", "function": {"name": call.group(1),
                                                                       "arguments": {call.group(2): call.group(3)}}}]
            messages.append(msg)
        else:
            messages.append({"role": role, "content": body})
    return messages, tools, kw


def main():
    tok = AutoTokenizer.from_pretrained(os.path.join(HERE, "..", "glm-tiny"))
    rng = random.Random(7)
    for n in range(600):
        pieces = data.chat(rng, rng.choice(list(data.MIX)))
        text = "".join(t for t, _ in pieces)
        messages, tools, kw = parse(text)
        got = tok.apply_chat_template(messages, tools=tools, tokenize=False, **kw)
        want = text.removesuffix("<|endoftext|>").removesuffix("<|observation|>")
        assert got == want, (got, want)
        whole = tok.encode(text, add_special_tokens=False)
        parts = [i for t, _ in pieces for i in tok.encode(t, add_special_tokens=False)]
        assert whole == parts, text
    user = [{"role": "user", "content": "What is 2 + 2?"}]
    assert tok.apply_chat_template(user, tokenize=False, add_generation_prompt=True) == (
        "[gMASK]<sop><|system|>Reasoning Effort: Max<|user|>What is 2 + 2?<|assistant|><think>")
    assert tok.apply_chat_template(user, tokenize=False, add_generation_prompt=True, enable_thinking=False) == (
        "[gMASK]<sop><|user|>What is 2 + 2?<|assistant|><think></think>")
    print("template and training text agree")


if __name__ == "__main__":
    main()
