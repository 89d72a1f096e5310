# SPDX-License-Identifier: Apache-2.0
"""Guards that each source, script and build file names its licence in its first three lines."""
from house import files, finish, text

SUFFIXES = {".c", ".h", ".def", ".proto", ".py", ".sh", ".cmake", ".mjs", ".js", ".hip", ".S", ".ld", ".supp", ".service",
            ".socket", ".target", ".conf", ".yml", ".yaml", ".toml"}
NAMES = {"CMakeLists.txt", "Containerfile"}
LINE = "SPDX-License-Identifier: Apache-2.0"


def is_ours(path, lines):
    if path.parts[:2] == ("tests", "goldens") and path.suffix not in (".py", ".c"):
        return False
    return path.suffix in SUFFIXES or path.name in NAMES or (not path.suffix and lines[0].startswith("#!"))


def main():
    problems, seen = [], 0
    for path in files():
        if "corpus" in path.parts:
            continue
        lines = text(path)
        if not lines or not is_ours(path, lines):
            continue
        seen += 1
        if not any(LINE in line for line in lines[:3]):
            problems.append(f"{path}:1: no line '{LINE}' among the first three")
    finish(problems, seen, "files")


main()
