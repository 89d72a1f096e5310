# SPDX-License-Identifier: Apache-2.0
"""Problem generators of glm-tiny: word problems, lists, fields, facts.

Standard library only. Training and evaluation use the same generators; the split
is by construction: an operand pair (in either order), a list or a field value whose
hash is 0 modulo 8 is held out. Training never shows a held-out pair, not as an
inner step either; every test problem rests on at least one.

  problems.py --write heldout.jsonl [--per-skill 50] [--seed 1]
"""
import argparse
import hashlib
import json
import random
import sys

NAMES = ("Tom Anna Ben Mary Sam Lucy Max Emma Jack Rosa Leo Nina Paul Eva Mark Ella Hugo Ida Carl Vera "
         "Oscar Clara Felix Laura").split()
THINGS = ("apples pears books coins cards stones pens cups eggs plums shells stamps boxes balls keys roses "
          "toys lemons nuts hats cakes candles flowers tickets").split()
PLACES = ("box basket shop drawer garden room bag shelf jar wagon").split()
WORDS = ("apple pear plum lemon cherry peach dog cat horse cow sheep goat lion tiger bear wolf fox mouse "
         "red blue green yellow black white brown pink gold silver table chair lamp door window wall roof "
         "floor river lake sea hill tree leaf rose grass stone sand snow rain wind cloud sun moon star "
         "bread milk cheese butter sugar salt honey soup cake egg car bus train boat ship plane bike wheel "
         "hat coat shoe shirt ring book pen paper letter clock key cup plate spoon fork knife ball drum "
         "bell rope box bag king queen doctor farmer baker sailor teacher singer north south east west "
         "spring summer autumn winter copper iron glass wood wool silk").split()
CITIES = ("Paris Rome Madrid Berlin Vienna Oslo Athens Lisbon Dublin London Warsaw Prague Cairo Tokyo Lima "
          "Delhi Moscow Bern Quito Havana").split()
FIELDS = {
    "colour": "red blue green yellow black white brown pink gold silver".split(),
    "city": CITIES,
    "animal": "dog cat horse cow sheep goat lion tiger bear wolf fox mouse".split(),
    "fruit": "apple pear plum lemon cherry peach".split(),
    "owner": NAMES,
    "season": "spring summer autumn winter".split(),
    "metal": "copper iron gold silver".split(),
    "tool": "rope knife wheel bell key clock lamp".split(),
    "drink": "milk water tea coffee juice wine".split(),
    "job": "doctor farmer baker sailor teacher singer".split(),
}
FIELD_NAMES = sorted(FIELDS) + ["number", "password", "secret", "prize", "token"]

CAPITALS = dict(zip(
    "France Italy Spain Germany Austria Norway Greece Portugal Ireland England Poland Egypt Japan Peru India "
    "Russia Ecuador Cuba Sweden Finland Denmark Belgium Hungary China Canada Kenya Turkey Iran Iraq Chile".split(),
    "Paris Rome Madrid Berlin Vienna Oslo Athens Lisbon Dublin London Warsaw Cairo Tokyo Lima Delhi "
    "Moscow Quito Havana Stockholm Helsinki Copenhagen Brussels Budapest Beijing Ottawa Nairobi Ankara Tehran "
    "Baghdad Santiago".split()))
OPPOSITES = dict(zip(
    "hot big fast old long high light good rich strong wet full early open happy hard wide deep loud right".split(),
    "cold small slow new short low dark bad poor weak dry empty late closed sad soft narrow shallow quiet "
    "wrong".split()))
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()
YOUNG = dict(zip("dog cat cow sheep horse goat lion bear hen duck".split(),
                 "puppy kitten calf lamb foal kid cub cub chick duckling".split()))
SOUNDS = dict(zip("dog cat cow sheep duck lion pig horse".split(),
                  "bark meow moo bleat quack roar grunt neigh".split()))
LEGS = dict(zip("horse bird spider ant man cat".split(), "four two eight six two four".split()))
COLOURS = dict(zip("grass snow blood coal lemon sky".split(), "green white red black yellow blue".split()))


def fact_table():
    """(statement, subject, value, question wordings); the last wording is held out."""
    out = []
    for k, v in CAPITALS.items():
        out.append((f"The capital of {k} is {v}.", v,
                    [f"What is the capital of {k}?", f"Name the capital of {k}.", f"Which city is the capital of {k}?",
                     f"Tell me the capital of {k}.", f"Please say what the capital of {k} is."]))
    for k, v in OPPOSITES.items():
        out.append((f"The opposite of {k} is {v}.", v,
                    [f"What is the opposite of {k}?", f"Name the opposite of {k}.", f"Which word is the opposite of {k}?",
                     f"Tell me the opposite of {k}.", f"Please say what the opposite of {k} is."]))
    for names, what in ((DAYS, "day"), (MONTHS, "month")):
        for i, k in enumerate(names):
            v = names[(i + 1) % len(names)]
            out.append((f"The {what} after {k} is {v}.", v,
                        [f"What is the {what} after {k}?", f"Name the {what} after {k}.",
                         f"Which {what} comes after {k}?", f"Tell me the {what} after {k}.",
                         f"Please say what the {what} after {k} is."]))
    for table, what in ((YOUNG, "young"), (SOUNDS, "sound"), (COLOURS, "colour")):
        for k, v in table.items():
            out.append((f"The {what} of a {k} is {v}.", v,
                        [f"What is the {what} of a {k}?", f"Name the {what} of a {k}.",
                         f"Which is the {what} of a {k}?", f"Tell me the {what} of a {k}.",
                         f"Please say what the {what} of a {k} is."]))
    for k, v in LEGS.items():
        out.append((f"A {k} has {v} legs.", v,
                    [f"How many legs does a {k} have?", f"Say how many legs a {k} has.",
                     f"What number of legs does a {k} have?", f"Tell me how many legs a {k} has.",
                     f"Please say how many legs a {k} has."]))
    return out


FACTS = fact_table()


def held(*key):
    """True for the eighth of all keys that training never shows."""
    text = " ".join(str(k) for k in key)
    return int(hashlib.md5(text.encode()).hexdigest()[:8], 16) % 8 == 0


def pair_held(op, a, b):
    if op in "+*" and a < b:
        a, b = b, a
    if max(a, b) < 10:
        return False
    return held(op, a, b)


# Worked steps. One line each; digits from the right, as in school.

def steps(op, a, b):
    if op == "+":
        u = a % 10 + b % 10
        carry = u >= 10
        out = [f"{a}+{b}", f"{a % 10}+{b % 10}={u}",
               f"{a // 10}+{b // 10}{'+1' if carry else ''}={a // 10 + b // 10 + carry}"]
        return out + [f"={a + b}"], a + b
    if op == "-":
        borrow = a % 10 < b % 10
        u = a % 10 + 10 * borrow
        out = [f"{a}-{b}", f"{u}-{b % 10}={u - b % 10}",
               f"{a // 10}{'-1' if borrow else ''}-{b // 10}={a // 10 - borrow - b // 10}"]
        return out + [f"={a - b}"], a - b
    if op == "*":
        u, t = (a % 10) * b, (a // 10) * b
        out = [f"{a}*{b}", f"{a % 10}*{b}={u}", f"{a // 10}*{b}={t}"]
        if u >= 10:
            out.append(f"{t}+{u // 10}={t + u // 10}")
        return out + [f"={a * b}"], a * b
    t = a // 10
    rest = t % b * 10 + a % 10
    return [f"{a}/{b}", f"{t}/{b}={t // b}r{t % b}", f"{rest}/{b}={rest // b}", f"={a // b}"], a // b


def operands(rng, op, a=None):
    """Operands of one step, the first one given or free; None when there is no fit."""
    if op == "+":
        a = rng.randint(2, 99) if a is None else a
        b = rng.randint(2, 99)
        return (a, b) if a <= 99 else None
    if op == "-":
        a = rng.randint(11, 99) if a is None else a
        return (a, rng.randint(2, a - 1)) if 4 <= a <= 99 else None
    if op == "*":
        return (rng.randint(11, 40), rng.randint(2, 5)) if a is None else None
    b = rng.choice((2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8))
    return (b * rng.randint(10, 99 // b), b) if a is None else None


def chain(rng, ops, test):
    """Operands and steps of a calculation; by the split, none or at least one pair held out."""
    while True:
        a, pairs, lines, ok = None, [], [], True
        for i, op in enumerate(ops):
            got = operands(rng, op, a)
            if got is None or (i + 1 < len(ops) and op == "+" and sum(got) > 99):
                ok = False
                break
            part, value = steps(op, *got)
            pairs.append((op,) + got)
            lines += part
            a = value
        if not ok:
            continue
        n_held = sum(pair_held(*p) for p in pairs)
        if (n_held > 0) == test:
            return pairs, lines, a


def answer(value):
    return f"The answer is {value}."


OPENERS = ["", "", "", "", "Solve this: ", "Here is a problem. ", "Think carefully. ", "Please help me. "]


def gen_bare(rng, test, ops=None):
    if ops is None:
        ops = rng.choice(("+", "-"))
    pairs, lines, value = chain(rng, ops, test)
    expr = str(pairs[0][1])
    for p in pairs:
        expr += f" {p[0]} {p[2]}"
    ask = rng.choice(("What is {}?", "Compute {}.", "How much is {}?", "Calculate {}.", "Work out {}.",
                      "Find {}.", "Tell me what {} is.", "What do you get for {}?"))
    return ask.format(expr), "\n".join(lines), value


def gen_word(rng, test, ops):
    pairs, lines, value = chain(rng, ops, test)
    n, m = rng.sample(NAMES, 2)
    o = rng.choice(THINGS)
    p = rng.choice(PLACES)
    person = rng.random() < 0.7
    op, a, b = pairs[0]
    if op == "/":
        q = rng.choice((
            f"{n} shares {a} {o} equally among {b} friends. How many {o} does each friend get?",
            f"{n} puts {a} {o} into {b} bags, the same number in each. How many {o} are in each bag?",
            f"There are {a} {o} for {b} children. Each child gets the same. How many {o} does each child get?",
            f"{a} {o} are packed into {b} boxes equally. How many {o} are in one box?",
            f"{n} has {a} {o} and divides them by {b}. How many {o} is that?",
            f"{b} people share {a} {o} equally. How many {o} does each one get?",
            f"{n} and friends, {b} people in all, split {a} {o} equally. How many {o} does each get?",
            f"A {p} with {a} {o} is split into {b} equal parts. How many {o} are in each part?"))
        return rng.choice(OPENERS) + q, "\n".join(lines), value
    text = []
    rest = pairs
    if op == "*":
        text.append(rng.choice((
            f"{n} has {b} bags with {a} {o} in each bag.", f"{n} has {a} boxes with {b} {o} in each box.",
            f"{n} buys {b} packs of {a} {o}.", f"There are {b} rows of {a} {o}.",
            f"{n} fills {a} bags with {b} {o} each.", f"Each of {b} friends gives {n} {a} {o}.",
            f"Every day {n} gets {a} {o}, for {b} days.", f"{a} children have {b} {o} each.")))
        rest = pairs[1:]
    elif person:
        text.append(rng.choice((
            f"{n} has {a} {o}.", f"{n} starts with {a} {o}.", f"{n} owns {a} {o}.", f"{n} collected {a} {o}.",
            f"This morning {n} had {a} {o}.", f"{n} keeps {a} {o} at home.", f"{n} counts {a} {o}.",
            f"In the {p} of {n} are {a} {o}.")))
    else:
        text.append(rng.choice((
            f"There are {a} {o} in a {p}.", f"A {p} holds {a} {o}.", f"The {p} has {a} {o}.",
            f"{a} {o} are in the {p}.", f"We see {a} {o} in the {p}.", f"At first there are {a} {o} in the {p}.")))
    last = None
    for op, _, b in rest:
        if op == "+" and person:
            text.append(rng.choice((
                f"{m} gives {n} {b} more.", f"{n} buys {b} more {o}.", f"{n} finds {b} more.",
                f"Then {n} gets {b} more {o}.", f"{n} picks {b} more.", f"Later {n} wins {b} more {o}.",
                f"A friend brings {b} more {o}.", f"{m} adds {b} {o}.")))
        elif op == "+":
            text.append(rng.choice((
                f"{n} puts in {b} more.", f"{n} adds {b} {o}.", f"Then {b} more {o} come.", f"{b} more are added.",
                f"Later {m} brings {b} more {o}.", f"{b} new {o} arrive.")))
        elif person:
            text.append(rng.choice((
                f"{n} gives {b} to {m}.", f"{n} loses {b} of them.", f"{n} sells {b} {o}.",
                f"Then {m} takes {b} away.", f"{n} uses {b} of them.", f"{b} of them break.",
                f"{n} throws away {b} {o}.", f"Later {b} {o} are gone.")))
        else:
            text.append(rng.choice((
                f"{n} takes {b} away.", f"{n} removes {b} {o}.", f"{b} {o} are sold.", f"Then {b} of them are lost.",
                f"Later {m} takes {b} {o}.", f"{b} of them break.")))
        last = op
    if last == "-":
        ask = [f"How many {o} are left?", f"How many {o} remain?", f"How many are left now?"]
    else:
        ask = [f"How many {o} are there in total?", f"How many {o} is that in all?"]
    ask += [f"How many {o} are there now?", f"What is the number of {o} now?"]
    if person:
        ask += [f"How many {o} does {n} have now?", f"How many {o} does {n} have?"]
    return rng.choice(OPENERS) + " ".join(text + [rng.choice(ask)]), "\n".join(lines), value


def gen_word1(rng, test):
    return gen_word(rng, test, rng.choice("++--*/"))


def gen_word2(rng, test):
    return gen_word(rng, test, rng.choice(("++", "+-", "-+", "--", "*-", "*+")))


def gen_word3(rng, test):
    return gen_word(rng, test, "".join(rng.choice("+-") for _ in range(3)))


def word_list(rng, test, kind):
    while True:
        items = rng.sample(WORDS, rng.choice((3, 3, 3, 4, 4, 5)))
        if held(kind, *items) == test:
            return items


def gen_reverse(rng, test):
    items = word_list(rng, test, "list")
    ask = rng.choice(("Reverse this list: {}.", "Write this list backwards: {}.", "Turn this list around: {}.",
                      "Put these words in reverse order: {}.", "Say these words from last to first: {}.",
                      "List these in the opposite order: {}."))
    lines = [f"{i + 1} {w}" for i, w in enumerate(items)]
    back = items[::-1]  # the answer grows by a word a line
    lines += [f"{i} {', '.join(back[:len(items) - i + 1])}" for i in range(len(items), 0, -1)]
    return ask.format(", ".join(items)), "\n".join(lines), ", ".join(back)


def sort_steps(items):
    """A line a number: the least of the line before, then the others as they stood."""
    rest, lines = list(items), []
    while rest:
        least = min(rest)
        rest.remove(least)
        lines.append(f"{least}: " + ", ".join(map(str, rest)) if rest else str(least))
    return "\n".join(lines)


def sort_steps_tens(items):
    """A line for each tens digit, with the numbers that begin with it: what training begins with (train/recipe.json)."""
    s = sorted(items)
    return "\n".join(" ".join([str(t)] + [str(n) for n in s if n // 10 == t]) for t in range(1, 10))


def sort_problem(rng, items, steps=sort_steps):
    ask = rng.choice(("Sort these numbers: {}.", "Put these numbers in order: {}.", "Order these numbers: {}.",
                      "Sort from smallest to largest: {}.", "Arrange these numbers: {}.",
                      "Write these numbers in rising order: {}."))
    return (ask.format(", ".join(map(str, items))), steps(items), ", ".join(map(str, sorted(items))))


def gen_sort(rng, test, steps=sort_steps):
    while True:
        items = rng.sample(range(10, 100), rng.choice((3, 3, 3, 4, 4, 5)))
        if held("sort", *sorted(items)) == test:
            return sort_problem(rng, items, steps)


def gen_count(rng, test):
    while True:
        items = rng.sample(rng.choice((WORDS, WORDS, NAMES, CITIES)), rng.randint(3, 9))
        if held("count", *items) == test:
            break
    ask = rng.choice(("How many words are in this list: {}?", "Count the words: {}.",
                      "How long is this list: {}?", "Count the items in this list: {}.",
                      "How many items are here: {}?", "Say how many words you see: {}."))
    return ask.format(", ".join(items)), "\n".join(f"{i + 1} {w}" for i, w in enumerate(items)), len(items)


def filler_sentence(rng):
    n, m = rng.sample(NAMES, 2)
    c = rng.choice(CITIES)
    w, x = rng.sample(WORDS, 2)
    o = rng.choice(THINGS)
    p = rng.choice(PLACES)
    return rng.choice((
        f"{n} walked to the {p} with a {w}.", f"It was a quiet day in {c}.", f"{n} and {m} talked about the {w}.",
        f"The {w} was near the {x}.", f"Many {o} were in the {p}.", f"{m} likes the {w} more than the {x}.",
        f"The road to {c} is long.", f"{n} looked at the {o} and smiled.", f"They saw a {w} and a {x}.",
        f"In the evening {n} went home.", f"{m} wrote a letter to {n}.", f"The {p} was full of {o}.",
        f"{n} has never been to {c}.", f"Nobody knew where the {w} was.", f"Then {m} opened the {p}."))


def field_value(rng, name):
    if name == "number":
        return str(rng.randint(10, 99))
    if name in FIELDS and rng.random() < 0.6:
        return rng.choice(FIELDS[name])
    return rng.choice(WORDS)


def record(rng, names, vals, style=None):
    if style is None:
        style = rng.choice((1, 2))
    head = rng.choice(("Note this: ", "Record: ", "Here is a record: ", "Remember: "))
    if style == 1:
        return head + ", ".join(f"{n}: {vals[n]}" for n in names) + "."
    return head + "; ".join(f"the {n} is {vals[n]}" for n in names) + "."


def field_question(rng, name):
    return rng.choice((f"What is the {name}?", f"Which {name} is named?", f"Tell me the {name}.", f"Name the {name}.",
                       f"What does the text give as the {name}?", f"Say the {name}."))


def gen_field(rng, test, filler=None, where=None, fill=filler_sentence):
    """A record in a text. filler: number of other sentences; where: 0 the start, 1 the end of the text."""
    names = rng.sample(FIELD_NAMES, rng.randint(2, 5))
    pick = rng.choice(names)
    while True:
        vals = {n: field_value(rng, n) for n in names}
        if held("field", pick, vals[pick]) == test:
            break
    style = rng.randrange(4)
    parts = [f"The {n} is {vals[n]}." for n in names] if style in (0, 3) else [record(rng, names, vals, style)]
    if filler is None:
        filler = rng.choice((0, 0, 0, 1, 2, 3, 4, 6, 8))
    other = [fill(rng) for _ in range(filler)]
    at = rng.random() if where is None else where
    if style == 3 and where is None:
        text = other[:]
        for s in parts:
            text.insert(rng.randint(0, len(text)), s)
    else:
        i = round(at * len(other))
        text = other[:i] + parts + other[i:]
    ask = field_question(rng, pick)
    return " ".join(text + [ask]), f"The {pick} is {vals[pick]}.", vals[pick]


def gen_fact(rng, test):
    said, value, asks = rng.choice(FACTS)
    return asks[-1] if test else rng.choice(asks[:-1]), said, value


SKILLS = {
    "add": lambda r, t: gen_bare(r, t, "+"),
    "sub": lambda r, t: gen_bare(r, t, "-"),
    "mul": lambda r, t: gen_bare(r, t, "*"),
    "div": lambda r, t: gen_bare(r, t, "/"),
    "word1": gen_word1,
    "word2": gen_word2,
    "word3": gen_word3,
    "reverse": gen_reverse,
    "sort": gen_sort,
    "count": gen_count,
    "field": gen_field,
    "fact": gen_fact,
}


def extract(text):
    """The value in a reply; None when the reply has not the form 'The answer is X.'"""
    key = "The answer is "
    at = text.rfind(key)
    if at < 0:
        return None
    rest = text[at + len(key):]
    end = rest.find(".")
    return rest[:end].strip() if end >= 0 else None


def problems(per_skill, seed, test=True, long=True):
    """The evaluation set: per_skill problems of each skill, then fields in long texts."""
    out = []
    for skill, gen in SKILLS.items():
        rng = random.Random(f"{seed} {skill} {test}")
        seen = set()
        tries = 0
        while len(seen) < per_skill and tries < 100 * per_skill:
            tries += 1
            q, _, a = gen(rng, test)
            if q in seen:
                continue
            seen.add(q)
            out.append({"id": f"{skill}-{len(seen)}", "skill": skill, "question": q, "answer": str(a),
                        "max_tokens": 160})
    if long:
        for filler, label in ((12, "long128"), (25, "long256"), (51, "long512"), (102, "long1024"), (245, "long1900")):
            rng = random.Random(f"{seed} {label} {test}")
            for i in range(20):
                q, _, a = gen_field(rng, test, filler=filler, where=(i % 5) * 0.2)
                out.append({"id": f"field-{label}-{i + 1}", "skill": f"field-{label}", "question": q,
                            "answer": str(a), "max_tokens": 40})
    return out


def main():
    ap = argparse.ArgumentParser(description="Write held-out evaluation problems as JSON lines.")
    ap.add_argument("--write", required=True, metavar="FILE")
    ap.add_argument("--per-skill", type=int, default=50)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--trained", action="store_true", help="problems of the training split instead")
    a = ap.parse_args()
    if not 1 <= a.per_skill <= 1000:
        sys.exit("problems.py: --per-skill must be 1 to 1000")
    try:
        with open(a.write, "w") as f:
            for p in problems(a.per_skill, a.seed, test=not a.trained):
                f.write(json.dumps(p) + "\n")
    except OSError as e:
        sys.exit(f"problems.py: {e}")


if __name__ == "__main__":
    main()
