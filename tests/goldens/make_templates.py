#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Template goldens: what Python's jinja2, set up as transformers sets it up, makes of the fixtures and of random snippets.
Run from anywhere; writes beside itself."""
import copy
import json
import os
import random
import sys
from datetime import datetime, timezone

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")
NOW = 1721900000  # 2024-07-25, UTC


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_support"), [], [], body).set_lineno(line)

    def _support(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda fmt: datetime.fromtimestamp(NOW, timezone.utc).strftime(fmt)
    return env


ENV = environment()


def render(source, variables):
    """The text, or None when jinja2 raises anything."""
    try:
        return ENV.from_string(source).render(**copy.deepcopy(variables))
    except Exception:  # any failure is one outcome
        return None


WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather at a place, \"now\" <b>&</b> später",
           "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "東京"]},
                          "days": {"type": "integer", "minimum": 1, "default": 3}, "unit": {"type": ["string", "null"]}}, "required": ["city"]}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}}


def call(name, arguments, i=None):
    c = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if i is not None:
        c["id"] = f"call{i:05d}"
    return c


def conversations():
    user = {"role": "user", "content": "Hello  there\n"}
    system = {"role": "system", "content": " You are helpful. "}
    out = [[user], [system, user],
           [system, user, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Grüße, 世界 👋"}],
           [user, {"role": "assistant", "content": "<think>\nlet me\nsee\n</think>\n\nAnswer."}, {"role": "user", "content": "And?"}],
           [user, {"role": "assistant", "content": "Two", "reasoning_content": "One plus one\n"}, {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes", "reasoning_content": "Checked."}],
           [{"role": "user", "content": [{"type": "text", "text": "part one "}, {"type": "text", "text": "part two"}]}]]
    tools = [user, {"role": "assistant", "content": "", "reasoning_content": "need it", "tool_calls": [call("get_weather", {"city": "Köln", "days": 2, "x": [1, 2.5, None, True]}, 1)]},
             {"role": "tool", "content": "12 °C", "tool_call_id": "call00001", "name": "get_weather"}]
    out += [tools, tools + [{"role": "assistant", "content": "It is cold."}, {"role": "user", "content": "thanks"}],
            [system] + tools + [{"role": "tool", "content": "{\"t\": 1}", "tool_call_id": "call00002"}],
            [system, user, {"role": "assistant", "content": None, "tool_calls": [call("clock", {}, 3), call("get_weather", {"city": "a\"b"}, 4)]},
             {"role": "tool", "content": "x", "tool_call_id": "call00003"}, {"role": "tool", "content": "y", "tool_call_id": "call00004"}, {"role": "user", "content": "<tool_response>\nno\n</tool_response>"}],
            [user, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": "{\"a\": 1}"}}]}],
            [{"role": "assistant", "content": "first"}, user], [user, user], [system, system, user], [{"role": "system", "content": ""}, user], []]
    return out


def option_sets():
    tools = [WEATHER, CLOCK]
    yield {}
    yield {"add_generation_prompt": True}
    yield {"add_generation_prompt": True, "enable_thinking": False}
    yield {"tools": tools, "add_generation_prompt": True}
    yield {"tools": tools, "enable_thinking": True, "reasoning_effort": "high", "clear_thinking": False}
    yield {"tools": [WEATHER["function"]], "add_generation_prompt": True, "tools_in_user_message": False, "date_string": "26 Jul 2024", "thinking": True}
    yield {"tools": None, "documents": None, "add_generation_prompt": False, "custom_tools": tools, "builtin_tools": ["code_interpreter", "search"]}


def fixtures():
    for name in sorted(os.listdir(HERE)):
        if name.endswith(".jinja"):
            source = open(os.path.join(HERE, name), encoding="utf-8").read()
            cases = []
            for messages in conversations():
                for options in option_sets():
                    variables = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>", **options}
                    cases.append([variables, render(source, variables)])
            yield name, cases


class Random:
    """Expressions over a few variables; many of them fail, which is an outcome too."""
    NAMES = ["s", "t", "n", "m", "f", "b", "z", "l", "d", "q", "u", "e", "x"]
    VARS = {"s": "Hello, World", "t": "  α beta\tΓ \n", "n": 7, "m": -3, "f": 2.5, "b": True, "z": None, "l": [3, 1, 2, "a", None],
            "d": {"k": "v", "n": 1, "items": [1], "l": [1, [2]]}, "q": [{"a": 1, "b": "x"}, {"a": 3, "b": "Y"}, {"b": "y"}], "e": [], "x": "äÖß'\"\\n"}
    CONSTS = ["1", "0", "-2", "3.5", "1e3", "'a'", "\"b'c\"", "'l'", "''", "true", "False", "none", "[]", "[1, 2]", "(1,)", "()", "{}", "{'k': 1}", "'é'", "10", "100000000000000000000.0", "0.1"]
    FILTERS = ["upper", "lower", "trim", "length", "first", "last", "list", "string", "int", "float", "abs", "round", "reverse|list", "sort", "unique|list", "join(',')", "join", "tojson",
               "tojson(indent=2)", "default('D')", "d(1, true)", "capitalize", "title", "items|list", "map('string')|list", "map(attribute='a')|list", "selectattr('a')|list", "rejectattr('a', 'defined')|list",
               "select('number')|list", "reject('none')|list", "replace('l', 'L')", "replace('', '-', 3)", "indent", "indent(2, true)", "dictsort", "sum", "min", "max", "count", "trim('H')",
               "round(1)", "round(2, 'floor')", "selectattr('b', 'equalto', 'x')|list", "map(attribute='a', default=0)|list", "batch(2)|list", "sort(reverse=true)", "sort(attribute='b')", "tojson(ensure_ascii=true)",
               "tojson(separators=(',', ':'), sort_keys=true)", "map('upper')|join", "float|int", "format(1, 2)"]
    TESTS = ["defined", "undefined", "none", "string", "number", "integer", "float", "boolean", "mapping", "sequence", "iterable", "true", "false", "odd", "even", "eq(7)", "in [1, 7]", "divisibleby 2",
             "equalto 'a'", "gt 2", "lower", "upper", "callable", "ne(1)"]
    METHODS = ["split()", "split(' ', 1)", "split('l')", "rsplit('l', 1)", "strip()", "lstrip('H ')", "rstrip()", "upper()", "lower()", "title()", "capitalize()", "startswith('He')", "endswith(('d', 'x'))",
               "replace('o', '0', 1)", "find('o')", "rfind('o')", "count('l')", "splitlines()", "items()|list", "keys()|list", "values()|list", "get('k')", "get('zz', 5)", "isdigit()", "isalpha()", "index('l')",
               "join(['a', 'b'])", "format(1)", "partition(',')", "rpartition('l')", "removeprefix('He')", "removesuffix('ld')", "append(1)", "copy()", "isupper()", "k", "items", "nope"]
    BINARY = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"]

    def __init__(self, seed):
        self.r = random.Random(seed)

    def pick(self, items):
        return self.r.choice(items)

    def expr(self, depth):
        if depth == 0:
            return self.pick(self.NAMES) if self.r.random() < 0.6 else self.pick(self.CONSTS)
        e = lambda: self.expr(depth - 1 if self.r.random() < 0.7 else 0)
        kind = self.r.randrange(12)
        if kind < 2:
            return f"{e()} {self.pick(self.BINARY)} {e()}"
        if kind < 5:
            return f"{e()}|{self.pick(self.FILTERS)}"
        if kind == 5:
            return f"({e()} is {self.pick(['', 'not '])}{self.pick(self.TESTS)})"
        if kind == 6:
            return f"({e()}).{self.pick(self.METHODS)}"
        if kind == 7:
            if self.r.random() < 0.5:  # of names only: constants are folded, and then 1[::2] is undefined rather than an error
                return f"{self.pick(self.NAMES)}[{self.pick(['1:', ':2', '::-1', '1:-1', '-2:', '::2', '1:1', '-1:0:-1'])}]"
            return f"({e()})[{self.pick(['0', '-1', '5', chr(39) + 'k' + chr(39)])}]"
        if kind == 8:
            return f"({e()} if {e()} else {e()})"
        if kind == 9:
            return f"not {e()}" if self.r.random() < 0.5 else f"-({e()})"
        if kind == 10:
            return self.pick([f"[{e()}, {e()}]", f"({e()}, {e()})", f"{{'k': {e()}, 'j': {e()}}}"])
        return f"({e()})"


SNIPPETS = r"""
{% for c in s %}{{ loop.index }}{{ c }}{% if not loop.last %},{% endif %}{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% else %}none{% endfor %}
{% for x in e %}x{% else %}empty{% endfor %}
{% for a in l if a is number %}{{ loop.index0 }}/{{ loop.length }}:{{ a }} {{ loop.previtem }} {{ loop.nextitem }} {% endfor %}
{% for a in l %}{% if loop.index == 2 %}{% continue %}{% endif %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}
{% set a = 1 %}{% for i in [1, 2] %}{% set a = a + i %}{{ a }}{% endfor %}{{ a }}
{% set ns = namespace(a=1, b='x') %}{% for i in range(4) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c }}
{% macro m(a, b=2, c='z') %}[{{ a }}|{{ b }}|{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=5, a=4) }}{{ m() }}
{% macro f(n) %}{% if n > 0 %}{{ n }},{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}
{% macro f(n) %}{{ g }}{% endmacro %}{% set g = 9 %}{{ f(1) }}
{% set x = 5 %}{% macro f() %}{% set x = 6 %}{{ x }}{% endmacro %}{{ f() }}{{ x }}
{% set block %} text {{ n }} {% endset %}[{{ block }}]
{% set block | trim | upper %} text {{ n }} {% endset %}[{{ block }}]
{% filter upper %}abc {{ s }}{% endfilter %}
{% with a = 1, b = n %}{{ a }}{{ b }}{% set n = 3 %}{{ n }}{% endwith %}{{ n }}
{% raw %}{{ not this }} {% if %}{% endraw %}!
{# comment #}a{#- b -#} c {#+ d #} e
  {% if true %}  
  indented
  {% endif %}  
end
{%- if true -%}   x   {%- endif %}  y
a   {%- if true %} b {% endif -%}   c
    {%+ if true %}keep{% endif %}
x {{- ' y ' -}} z
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set t = 1, 2 %}{{ t }}
{% if a.b is defined %}1{% else %}0{% endif %}
{{ a.b.c }}
{{ d.zz }}[{{ d.zz is defined }}]{{ d['k'] }}{{ d.k }}
{{ undefined_thing }}|{{ undefined_thing|default('d') }}|{{ undefined_thing|length }}
{{ q|map(attribute='b')|join('-') }}{{ q|selectattr('a', 'gt', 2)|map(attribute='b')|list }}
{{ q[::-1]|map(attribute='b')|list }}{{ l[1:3] }}{{ s[-5:] }}{{ s[::-1] }}{{ l[::2] }}
{{ range(3)|list }}{{ range(5, 0, -2)|list }}{{ dict(a=1, b=[2])}}{{ dict(d, z=1) }}
{{ '%s is %d' % ('a', 3) }}{{ '%s' % 5 }}{{ '{} {1}'.format(1, 2) }}{{ '{} {}'.format(1, 2) }}{{ '{a}'.format(a=3) }}
{{ 1 if false }}|{{ 'x' if n == 7 else 'y' }}
{{ n is odd and n is not none }}{{ n is divisibleby 7 }}{{ not n is odd }}
{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 'a' in s }}{{ 'H' in s and 'k' in d }}
{{ -n ** 2 }}{{ 2 ** -1 }}{{ 7 // 2 }}{{ -7 // 2 }}{{ -7 % 3 }}{{ 7 / 2 }}{{ 1e100 }}{{ 0.1 + 0.2 }}{{ 1e16 }}{{ 123456789012345.0 }}
{{ [1, 'a', none, true, 1.0, {'x': (1,)}] }}{{ {'a': "it's"} }}{{ ['\n\t\\', '"', "'", '\'"'] }}
{{ d|tojson }}{{ d|tojson(indent=4) }}{{ x|tojson }}{{ [x, t, none, 1.5]|tojson(ensure_ascii=True) }}
{{ q|tojson(indent=2) }}{{ []|tojson(indent=2) }}{{ {}|tojson(indent=2) }}{{ {1: 2, none: 3, true: 4}|tojson }}
{{ raise_exception('stop ' ~ n) }}
{% if raise_exception is defined %}yes{% endif %}{{ strftime_now('%d %b %Y %H:%M') }}
{% generation %}inside {{ n }}{% set g = 1 %}{% endgeneration %}{{ g }}
{% for m in q %}{% generation %}{{ m.b }}{% endgeneration %}{% endfor %}
{{ "a" "b" 'c' }}{{ 'tab\there\x41\u00e9\\n' }}{{ '\d' }}
{{ l.append(4) }}
{% set ns = namespace() %}{% set ns.l = ['a'] %}{% set ns.l = ns.l + ['b'] %}{{ ns.l }}
{% set n.x = 1 %}
{% for i in n %}{% endfor %}
{{ s.nope() }}
{{ s|nosuchfilter }}
{{ s is nosuchtest }}
{% nosuchtag %}
{% if true %}
{{ 'unclosed }}
{{ (1, 2 }}
{% for i in [1,2] %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i) }}{{ loop.first }}{{ loop.revindex }}{% endfor %}
{% for i in [[1, 2], [3, 4]] %}{% for j in i %}{{ loop.index }}{{ j }}{% set inner = j %}{% endfor %}{{ inner }}{% endfor %}
{% for (a, b) in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}{% for a, b in [(1, 2, 3)] %}{% endfor %}
{{ d.items() }}
{{ d.items()|list }}{{ d|items|list }}{{ d|length }}{{ d|list }}{{ d.keys()|list }}{{ 'k' in d.keys() }}{{ d|dictsort }}
{{ 'a,b,c'.split(',')[-1].strip() }}{{ 'x</think>y'.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}
{{ (s ~ n ~ f ~ z ~ b) }}{{ s + 'x' }}{{ 'ab' * 3 }}{{ [1] * 2 + [3] }}{{ (1,) + (2,) }}
{{ s + n }}
{{ n + true }}{{ true + true }}{{ true }}{{ 1 == true }}{{ 1 == 1.0 }}{{ '1' == 1 }}{{ none == undefined_x }}{{ [1] == [1.0] }}
{{ 9223372036854775807 }}{{ 1_000 }}{{ 0x1f }}{{ 0b101 }}{{ 1.5e3 }}
{{ ''|first }}{{ []|last }}{{ s|first }}{{ s|last }}{{ none|string }}{{ none|default('x') }}{{ none|default('x', true) }}
{{ '42'|int }}{{ '4.9'|int }}{{ 'x'|int(7) }}{{ ' 12 '|int }}{{ '0x1A'|int(0, 16) }}{{ '1_0'|int }}{{ 'nan'|int }}{{ '1.5'|float }}{{ 2.5|round }}{{ 3.5|round|int }}{{ 2.675|round(2) }}
{{ 'straße ǆ ﬁ İ ΑΣ'|upper }}{{ 'STRASSE ΑΣ İ'|lower }}{{ 'hello wORLD-foo'|title }}{{ "they're bill's".title() }}{{ 'ßa'|capitalize }}
{{ 'a\nb\n\nc'|indent }}|{{ 'a\nb'|indent('> ', true) }}|{{ 'a\n\nb'|indent(2, blank=true) }}
{{ '<a href="x">&\'</a>'|escape }}{{ '<b>'|safe }}{{ '<b>' }}
{{ ['b', 'A', 'c']|sort }}{{ ['b', 'A', 'c']|sort(case_sensitive=true) }}{{ [3, 1, 2]|sort(reverse=true) }}{{ q|sort(attribute='b')|map(attribute='b')|list }}
{{ ['a', 'A', 'b']|unique|list }}{{ [1, 2, 3]|sum }}{{ q|map(attribute='a', default=0)|sum }}{{ [3, 1]|min }}{{ []|max }}
{{ q|map(attribute='a')|list }}{{ q|groupby('a') }}
{% if l|select('string') %}gen is true{% endif %}{{ l|select('string')|list|length }}{{ l|select('string')|length }}
{% set g = l|map('string') %}{{ g|list }}{{ g|list }}
{{ loop }}
{{ 1 is string }}{{ 'a' is string }}{{ d is mapping }}{{ l is sequence }}{{ z is none }}{{ f is float }}{{ b is boolean }}{{ n is number and b is number }}{{ s is iterable }}{{ n is iterable }}
{{ (n, s)[0] }}{{ [[1, 2], [3]][0][1] }}{{ {'a': {'b': 1}}.a.b }}{{ l.0 }}{{ q.0.b }}
{{ 'a' 'b' if true }}{{ n if n > 5 and n < 10 or false }}
{{- '  lead' }}{{ 'trail  ' -}}   
{% set content = '<tool_response>x</tool_response>' %}{% if content.startswith('<tool_response>') and content.endswith('</tool_response>') %}T{% endif %}
{% set ns = namespace(multi_step_tool=true, last_query_index=q|length - 1) %}{% for m in q[::-1] %}{% set index = (q|length - 1) - loop.index0 %}{% if ns.multi_step_tool and m.a is defined %}{% set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}{% endif %}{% endfor %}{{ ns.last_query_index }}
{{ caller }}{% call f() %}{% endcall %}
{% set x %}{% for i in [1,2] %}{{ i }}{% endfor %}{% endset %}{{ x|length }}{{ x }}
{{ 'x' ~ (['a', 'b']|join(', ')) }}{{ ['a', 'b', 3]|join }}{{ 'abc'|join('-') }}{{ q|join(',', attribute='b') }}
{{ 'a\\b' }}{{ "a\"b" }}{{ 'é'|length }}{{ '👍🏽'|length }}{{ '👍🏽'[0] }}{{ 'naïve'[2:4] }}{{ 'naïve'.find('v') }}
{{ {'a':1,}.a }}{{ [1,2,][1] }}{{ (1,)|length }}{{ {}|length }}{{ (())|length }}
{{ [1,2]|tojson|length }}{{ (1,2)|tojson }}{{ undefined_x|tojson }}
{{ namespace(a=1).a }}{{ namespace({'b': 2}).b }}{{ lipsum }}
{{ not undefined_x }}{{ undefined_x == undefined_y }}{{ undefined_x + 1 }}
{{ undefined_x.foo }}
{{ z.foo }}|{{ n.foo }}|{{ z['foo'] }}|{{ n['foo'] }}
{{ z.foo.bar }}
{% for i in z %}{% endfor %}
{% for i in undefined_x %}x{% else %}none{% endfor %}
{{ 'abc' is in 'xabcx' }}{{ 1 is in [1] }}{{ 'a' not in 'b' }}
{{ [1, 2, 3][-1:] }}{{ [1, 2, 3][5:] }}{{ [1, 2, 3][:-5] }}{{ 'abc'[1:100] }}{{ [1,2,3][2:0:-1] }}{{ (1,2,3)[::-1] }}
{{ 5 // 0 }}
{{ 5.0 // 2 }}{{ -5.5 % 2 }}{{ 5 % -3 }}{{ 1 / 3 }}{{ 2 ** 0.5 }}{{ 10 ** 3 }}{{ 7.0 }}{{ 1e22 }}{{ 1.5e-7 }}{{ 0.0001 }}{{ 1e15 + 0.5 }}
"""


def snippets():
    out = []
    current = []
    for line in SNIPPETS.strip("\n").split("\n"):
        if line.startswith("  {%") or line == "  indented" or (current and line.startswith("  ")) or line == "end":
            current.append(line)
            if line == "end":
                out.append("\n".join(current))
                current = []
        else:
            out.append(line)
    out += ["a\r\nb\rc\n", "x\n", "x\n\n", "{% if true %}\n\nx\n{% endif %}\n\n", "{{ 1 }}\n{{ 2 }}\n", " {% set a = 1 %}\n {{ a }}\n", "{% for i in [1, 2] %}\n- {{ i }}\n{% endfor %}\n.",
            "{#- x -#}\n  y", "  {# c #}\n  z", "{%- raw -%}\n  {{ a }}\n{%- endraw -%}\n b", "{% raw %}\n x\n  {% endraw %}\n y", "{{ 'a\nb' }}", "{{\n1\n}}\n", "}} %} #}", "{ { % }", "{{", "{%", "{{ }}", "{% %}", ""]
    rnd = Random(11)
    for depth, n in ((1, 250), (2, 500), (3, 350)):
        for _ in range(n):
            out.append("{{ " + rnd.expr(depth) + " }}")
    return out


def main():
    versions = {"jinja2": jinja2.__version__, "python": sys.version.split()[0], "now_s": NOW}
    for name, cases in fixtures():
        with open(os.path.join(HERE, name.replace(".jinja", ".json")), "w", encoding="utf-8") as f:
            json.dump({**versions, "cases": cases}, f, ensure_ascii=False, separators=(",", ":"))
            f.write("\n")
        print(name, len(cases), "cases,", sum(c[1] is None for c in cases), "refused")
    kept = []
    for source in snippets():
        got = render(source, Random.VARS)
        if got is not None and (" at 0x" in got or len(got) > 2000):
            continue
        kept.append([source, got])
    with open(os.path.join(HERE, "snippets.json"), "w", encoding="utf-8") as f:
        json.dump({**versions, "vars": Random.VARS, "cases": kept}, f, ensure_ascii=False, indent=0)
        f.write("\n")
    print(len(kept), "snippets,", sum(c[1] is None for c in kept), "refused")


if __name__ == "__main__":
    main()
