# SPDX-License-Identifier: Apache-2.0
"""Guards what every text file must not hold: paths of one machine, unfinished business, broken lines."""
import re

from house import files, finish, text

BAD = (
    (re.compile(r"(?<![\w})])(/w[o]rk/(main|shared|\.)|/tmp/build-|/home/\w+/|/Users/\w+/|/root/\w)"), "a path of one machine"),
    (re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"), "unfinished business: do it or open an issue"),
    (re.compile(r"^(<{7}|>{7})( |$)"), "a merge left half way"),
    (re.compile(r"\bnot (yet )?implemented\b"), "a stub: refuse with a cause and a remedy"),
    (re.compile(r"[ \t]+$"), "blanks at the end of the line"),
    (re.compile(r"\r"), "a carriage return"),
)
# .md ends a line with two blanks to break it; the template generator holds templates whose white space is what is tested
BLANKS_ALLOWED = {".md"}
BLANKS_ALLOWED_IN = {"make_templates.py"}
DATA = {".json", ".jsonl", ".csv", ".hex", ".txt", ".patch"}


def is_ours(path):
    if "corpus" in path.parts or path.name in ("LICENSE", "check_text.py"):
        return False
    if path.parts[:2] in (("tests", "goldens"), ("tests", "fixtures")) or path.parts[0] == "models":
        return path.suffix in (".py", ".md", ".c")
    return path.suffix not in DATA or path.name == "CMakeLists.txt"


def main():
    problems, seen = [], 0
    for path in files():
        lines = text(path) if is_ours(path) else None
        if lines is None or lines == [""]:
            continue
        seen += 1
        if lines[-1] != "":
            problems.append(f"{path}:{len(lines)}: no newline at the end of the file")
        for n, line in enumerate(lines, 1):
            if path.suffix in (".c", ".h", ".py", ".proto") and "\t" in line:
                problems.append(f"{path}:{n}: a tab")
            for pattern, why in BAD:
                if pattern.search(line) and not (why.startswith("blanks") and (path.suffix in BLANKS_ALLOWED or path.name in BLANKS_ALLOWED_IN)):
                    problems.append(f"{path}:{n}: {why}")
    finish(problems, seen, "files")


main()
