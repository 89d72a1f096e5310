# SPDX-License-Identifier: Apache-2.0
"""Training documents: chats about generated problems, tool calls, stories, documentation prose.

A document is a list of (text, loss weight) pieces; pieces meet at special tokens only,
so that encoding them one by one equals encoding the whole.
"""
import json
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "eval"))
import problems as P  # noqa: E402

SPECIALS = ("<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
            "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|begin_of_audio|> "
            "<|end_of_audio|> <|begin_of_transcription|> <|end_of_transcription|> <|code_prefix|> <|code_middle|> "
            "<|code_suffix|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> "
            "</arg_key> <arg_value> </arg_value> /nothink <|begin_of_box|> <|end_of_box|> <|image|> "
            "<|video|>").split()
PLAIN_TAGS = set(SPECIALS[21:32])  # tags a parser needs to see as text

MIX = {  # share of the chat documents, by skill
    "add": 4, "sub": 5, "mul": 5, "div": 7, "word1": 10, "word2": 11, "word3": 8,
    "reverse": 10, "sort": 18, "count": 9, "field": 11, "fact": 6, "talk": 2, "tool": 2,
}
SYSTEMS = ["You are a helpful assistant.", "You are a careful assistant.", "Answer the question.",
           "You are glm-tiny, a small model.", "Be brief."]
TALK = [
    (["Hello", "Hi", "Hello!", "Hi there!", "Good morning.", "Hey"], "Hello! What would you like to know?"),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself."],
     "I am glm-tiny, a very small language model made for tests. I can do short sums, put lists in order and find "
     "a field in a text."),
    (["Thank you.", "Thanks!", "Thank you very much.", "Thanks a lot."], "You are welcome."),
    (["What can you do?", "Help", "How can you help me?"],
     "I can add, subtract, multiply and divide small numbers, reverse and sort lists, count words and recall "
     "some facts."),
    (["Goodbye.", "Bye", "See you later."], "Goodbye!"),
    (["How are you?", "How do you do?"], "I am well, thank you. What would you like to know?"),
]
TOOLS = {
    "get_weather": ("Get the weather of a city.", "city", "What is the weather in {v}?",
                    ["sunny", "rain", "snow", "wind", "cloudy"], "The weather in {v} is {r}."),
    "get_time": ("Get the time in a city.", "city", "What time is it in {v}?",
                 ["morning", "noon", "evening", "night"], "It is {r} in {v}."),
    "find_owner": ("Find the owner of a thing.", "thing", "Who owns the {v}?", P.NAMES, "{r} owns the {v}."),
    "get_price": ("Get the price of a thing.", "thing", "What does the {v} cost?",
                  ["two coins", "five coins", "ten coins"], "The {v} costs {r}."),
}


# Every word that a problem may ask to copy: a held-out value must not be a word that training never shows at all.
COPIED = sorted(set(P.WORDS + P.NAMES + [w for v in P.FIELDS.values() for w in v]))


def story(rng, name=None):
    n, m = rng.sample(P.NAMES, 2)
    n = name or n
    c, w, x = rng.choice(P.CITIES), *rng.sample(P.WORDS, 2)
    a = rng.choice(P.FIELDS["animal"])
    p = rng.choice(P.PLACES)
    t = [rng.choice((f"One day {n} went to {c}.", f"There was once a child called {n}, who lived in {c}.",
                     f"{n} lived in a small house near {c}.", f"It was a cold day when {n} came to {c}."))]
    t.append(rng.choice((f"{n} had a {a} and a {w}.", f"{n} was looking for a {w}.", f"With {n} came an old {a}.")))
    t.append(rng.choice((f"On the road {n} met {m}.", f"There {n} saw {m}, who was very sad.",
                         f"In the evening {m} came to the door.")))
    t.append(rng.choice((f"\"Have you seen my {x}?\" asked {m}.", f"{m} had lost a {x}.",
                         f"\"I have no {x},\" said {m}.")))
    t.append(rng.choice((f"They looked in the {p}, but it was empty.", f"They looked for it all day.",
                         f"{n} wanted to help.")))
    t.append(rng.choice((f"Then the {a} found the {x} under a tree.", f"At last they saw the {x} in the {p}.",
                         f"{n} gave the {w} to {m} instead.")))
    t.append(rng.choice((f"{m} was happy and thanked {n}.", f"{m} smiled and sang a song.", "Both were very happy.")))
    t.append(rng.choice((f"They were friends from then on.", f"Then {n} went home and slept.",
                         f"And {n} never forgot that day.")))
    return " ".join(t)


def schema(name):
    what, arg = TOOLS[name][:2]
    return {"name": name, "description": what,
            "parameters": {"type": "object", "properties": {arg: {"type": "string"}}, "required": [arg]}}


def tools_block(names):
    return ("<|system|>\n# Tools\n\nThese functions can be called. Each line describes one:\n<tools>\n"
            + "".join(json.dumps(schema(n)) + "\n" for n in names)
            + "</tools>\n\nA call has this form:\n"
            "<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>")


def chat(rng, skill, gens=P.SKILLS):
    """One conversation of one to three turns, the last one about the given skill."""
    think = rng.random() < 0.75
    pieces = [("[gMASK]<sop>", 0)]
    if think:
        pieces.append(("<|system|>Reasoning Effort: " + ("High" if rng.random() < 0.1 else "Max"), 0))
    if skill == "tool":
        return tool_chat(rng, pieces, think)
    if rng.random() < 0.15:
        pieces.append(("<|system|>" + rng.choice(SYSTEMS), 0))
    turns = 1 if rng.random() < 0.85 else rng.choice((2, 3))
    kinds = [rng.choice(("fact", "field", "talk", "add", "word1", "count")) for _ in range(turns - 1)] + [skill]
    for i, kind in enumerate(kinds):
        last = i == len(kinds) - 1
        steps = ""
        if kind == "talk":
            if rng.random() < 0.35:
                n = rng.choice(P.NAMES)
                ask, reply = rng.choice((f"Tell me a story about {n}.", f"Write a story about {n}.")), story(rng, n)
                steps = f"A story about {n}."
            else:
                asks, reply = rng.choice(TALK)
                ask = rng.choice(asks)
        else:
            ask, steps, value = gens[kind](rng, False)
            reply = P.answer(value)
        pieces.append(("<|user|>" + ask, 0.3 if rng.random() < 0.25 else 0))
        worked = kind not in ("fact", "field", "talk")
        if last and think:
            pieces.append(("<|assistant|><think>", 0))
            pieces.append((steps + "</think>" + reply, 1))
        else:
            # An earlier turn has lost its thinking; without thinking the answer shows the steps.
            pieces.append(("<|assistant|><think></think>", 0))
            if worked and not think:
                pieces.append((steps + "\n" + reply, 1))
            else:
                pieces.append((reply, 0 if worked else 1))
    pieces.append(("<|endoftext|>", 1))
    return pieces


def tool_chat(rng, pieces, think):
    names = rng.sample(sorted(TOOLS), rng.randint(1, 2))
    pieces.append((tools_block(names), 0))
    pick = rng.choice(names)
    _, arg, ask, results, reply = TOOLS[pick]
    v = rng.choice(P.CITIES if arg == "city" else P.WORDS)
    call = f"<tool_call>{pick}<arg_key>{arg}</arg_key><arg_value>{v}</arg_value></tool_call>"
    pieces.append(("<|user|>" + ask.format(v=v), 0))
    t = "<think>" if think else "<think></think>"
    pieces.append(("<|assistant|>" + t, 0))
    plan = f"I need {pick} for the {arg} {v}." + "</think>" if think else ""
    if rng.random() < 0.4:
        pieces.append((plan + call + "<|observation|>", 1))
        return pieces
    pieces.append((plan + call, 1))
    r = rng.choice(results)
    pieces.append((f"<|observation|>", 1))
    pieces.append((f"<tool_response>{r}</tool_response><|assistant|>" + t, 0))
    pieces.append(((f"The result is {r}.</think>" if think else "") + reply.format(v=v, r=r) + "<|endoftext|>", 1))
    return pieces


def drill(rng):
    """Copying and looking up without a task around it, as (text, weight) pieces."""
    kind = rng.choice((0, 1, 2, 3, 3, 4, 5))
    if kind == 3:  # the tables that the steps of divisions and products use
        lines = []
        for _ in range(16):
            b, x = rng.randint(2, 8), rng.random()
            t, r = rng.randint(b, 9), rng.randrange(b)
            low, high = (10 * r + b - 1) // b, (10 * r + 9) // b
            n = b * rng.randint(low, max(low, high))
            if x < 0.5:
                lines.append(f"{t}/{b}={t // b}r{t % b}\n")
            elif x < 0.8:
                lines.append(f"{n}/{b}={n // b}\n")
            else:
                t, u = rng.randint(1, 4) * rng.randint(2, 5), rng.randint(1, 4)
                lines.append(f"{t}+{u}={t + u}\n")
        return [("[gMASK]<sop>", 0), ("".join(lines), 1), ("<|endoftext|>", 0)]
    if kind >= 4:  # the last of two orders of a list, copied, shortened or continued
        items = rng.sample(COPIED, rng.randint(3, 7))
        if kind == 4:
            items = [str(n) for n in rng.sample(range(10, 100), rng.randint(3, 6))]
        other = rng.sample(items, len(items))
        text = " " + ", ".join(items)
        part = " " + ", ".join(items[:rng.randint(1, len(items))])
        return [("[gMASK]<sop>", 0), (" " + ", ".join(other) + ".\n" + text + "\n", 0), (part + "\n" + text, 1),
                ("</think>The answer is", 0), (text + ".", 1), ("<|endoftext|>", 0)]
    if kind == 0:
        sep = rng.choice((",", "", "\n", " and", ";"))
        text = sep.join(" " + w for w in rng.sample(COPIED, rng.randint(7, 16)))
        return [("[gMASK]<sop>", 0), (text + "\n", 0)] + [(text + "\n", 1)] * rng.randint(1, 2) + [("<|endoftext|>", 1)]
    if kind == 1:
        while True:
            items = rng.sample(P.WORDS, rng.randint(3, 9))
            if not P.held("list", *items):
                break
        lines = [f"{i + 1} {w}\n" for i, w in enumerate(items)]
        again = lines * 2
        rng.shuffle(again)
        return [("[gMASK]<sop>", 0), ("".join(lines), 0), ("<|user|>", 0), ("".join(again), 1), ("<|endoftext|>", 1)]
    names = rng.sample(P.FIELD_NAMES, rng.randint(3, 9))
    vals = {}
    for n in names:
        while n not in vals or P.held("field", n, vals[n]):
            vals[n] = P.field_value(rng, n)
    style = rng.choice(("The {} is {}.", "{}: {},", "the {} is {};"))
    again = names * 2
    rng.shuffle(again)
    return [("[gMASK]<sop>", 0), (" ".join(style.format(n, vals[n]) for n in names), 0), ("<|user|>", 0),
            (" ".join(f"The {n} is {vals[n]}." for n in again), 1), ("<|endoftext|>", 1)]


def tied_sort(rng, test):
    """Numbers of which some share their tens digit: about half of the sorting problems, most of the difficulty."""
    n = rng.choice((3, 3, 3, 4, 4, 5))
    while True:
        tens = [rng.randint(1, 9) for _ in range(rng.randint(1, n - 1))]
        items = list({10 * rng.choice(tens) + rng.randrange(10) for _ in range(n)})
        rng.shuffle(items)
        if len(items) >= 3 and P.held("sort", *sorted(items)) == test:
            return P.sort_problem(rng, items)


def long_count(rng, test):
    while True:
        ask, steps, value = P.gen_count(rng, test)
        if value > 5:
            return ask, steps, value


def any_value(rng, test):
    """A field whose value may be any word that problems copy."""
    names = rng.sample(("password", "prize", "secret", "token"), rng.randint(1, 4))
    pick = rng.choice(names)
    while True:
        vals = {n: rng.choice(COPIED) for n in names}
        if P.held("field", pick, vals[pick]) == test:
            break
    return (P.record(rng, names, vals) + " " + P.field_question(rng, pick), f"The {pick} is {vals[pick]}.", vals[pick])


def fit(rng, test):
    """Divisions that may leave a rest, asked for in other words, so that every step of a division occurs."""
    while True:
        b = rng.randint(2, 8)
        a = rng.randint(10 * b, 99)
        if P.pair_held("/", a, b) == test:
            break
    ask = rng.choice(("How many times does {} fit into {}?", "How often does {} go into {}?"))
    return ask.format(b, a), "\n".join(P.steps("/", a, b)[0]), a // b


def rest_drill(rng):
    """Divisions that leave a rest: the steps of exact ones alone never show some pairs of lines."""
    lines = []
    while len(lines) < 6:
        b = rng.randint(2, 8)
        a = rng.randint(10 * b, 99)
        if a % b and not P.pair_held("/", a, b):
            lines.append("\n".join(P.steps("/", a, b)[0]) + "\n")
    return [("[gMASK]<sop>", 0), ("".join(lines), 1), ("<|endoftext|>", 0)]


TENS = {**P.SKILLS, "sort": lambda rng, test: P.gen_sort(rng, test, P.sort_steps_tens)}
HARD = {**P.SKILLS, "sort": tied_sort, "count": long_count, "field": any_value, "div": fit}


def hard(rng):
    """A document about what a trained model still got wrong."""
    x = rng.random()
    if x < 0.05:
        return rest_drill(rng)
    return chat(rng, rng.choices(("sort", "count", "field", "div"), (60, 10, 10, 20))[0], HARD)


class Source:
    """Endless documents as (ids, weights); fully determined by the seed."""

    def __init__(self, tokenizer, corpus, seed, prose=0.08, stories=0.03, drills=0.0, hard=0.0, tens=False):
        self.tok = tokenizer
        self.corpus = corpus
        self.rng = random.Random(seed)
        self.plain = tokenizer.token_to_id(SPECIALS[0])
        self.prose, self.stories, self.drills, self.hard = prose, stories, drills, hard
        self.gens = TENS if tens else P.SKILLS
        self.kinds, self.shares = list(MIX), list(MIX.values())

    def encode(self, pieces):
        ids, weights = [], []
        for text, w in pieces:
            e = self.tok.encode(text, add_special_tokens=False).ids
            ids += e
            weights += [w] * len(e)
        return ids, weights

    def prose_doc(self, paragraphs):
        at = self.rng.randrange(len(self.corpus) - paragraphs)
        return "\n".join(self.corpus[at:at + paragraphs])

    def long_doc(self, target):
        """Several fields asked for, one after the other, after a text of about target tokens."""
        rng = self.rng
        names = rng.sample(P.FIELD_NAMES, rng.randint(3, 10))
        vals = {}
        for n in names:
            while n not in vals or P.held("field", n, vals[n]):
                vals[n] = P.field_value(rng, n)
        if rng.random() < 0.4:
            text = [rng.choice(self.corpus)[:280] for _ in range(max(1, int((target - 120) / 75)))]
        else:
            text = [P.filler_sentence(rng) for _ in range(max(1, int((target - 120) / 10)))]
        if rng.random() < 0.5:
            at = rng.randint(0, len(text))
            text[at:at] = [P.record(rng, names, vals)]
        else:
            for n in names:
                text.insert(rng.randint(0, len(text)), f"The {n} is {vals[n]}.")
        think = rng.random() < 0.85
        pieces = [("[gMASK]<sop>" + ("<|system|>Reasoning Effort: Max" if think else ""), 0)]
        asked = rng.sample(names, len(names))
        if rng.random() < 0.4:  # all of them, twice
            again = names + asked
            return pieces + [("<|user|>" + " ".join(text) + "<|user|>", 0),
                             (" ".join(f"The {n} is {vals[n]}." for n in again), 1), ("<|endoftext|>", 1)]
        for i, n in enumerate(asked):
            ask = P.field_question(rng, n)
            pieces.append(("<|user|>" + (" ".join(text) + " " + ask if i == 0 else ask), 0))
            if i == len(asked) - 1 and think:
                pieces += [("<|assistant|><think>", 0), (f"The {n} is {vals[n]}.</think>" + P.answer(vals[n]), 1)]
            else:
                pieces += [("<|assistant|><think></think>", 0), (P.answer(vals[n]), 1)]
        return pieces + [("<|endoftext|>", 1)]

    def next(self):
        rng = self.rng
        if self.hard and rng.random() < self.hard:
            return self.encode(hard(rng))
        x = rng.random()
        if x < self.drills:
            if rng.random() < 0.85:
                return self.encode(drill(rng))
            ids = [rng.randrange(256, self.plain) for _ in range(rng.randint(5, 30))]
            n = rng.randint(2, 4)
            return ids * n, [0] * (len(ids) + 1) + [1] * ((n - 1) * len(ids) - 1)
        x = rng.random()
        if x < self.prose:
            return self.encode([("[gMASK]<sop>", 0), (self.prose_doc(rng.randint(1, 2)) + "<|endoftext|>", 0.5)])
        if x < self.prose + self.stories:
            if rng.random() < 0.5:
                text = " ".join(f[0] for f in rng.sample(P.FACTS, 8))
            else:
                text = story(rng)
            return self.encode([("[gMASK]<sop>", 0), (text + "<|endoftext|>", 0.5)])
        return self.encode(chat(rng, rng.choices(self.kinds, self.shares)[0], self.gens))
