# SPDX-License-Identifier: Apache-2.0
"""Guards that every header compiles alone, twice. Arguments: the compiler, then flags for it. A *_body.h is code that a .c
file includes under several names, not a header."""
import concurrent.futures
import os
import subprocess
import sys

from house import FOLDERS, ROOT, files, finish


def compile_alone(compiler, flags, path):
    r = subprocess.run([*compiler, "-fsyntax-only", "-x", "c", "-std=gnu17", "-D_GNU_SOURCE", "-march=x86-64-v2", "-Wall",
                        "-Wextra", "-Wno-unused-parameter", "-Werror", f"-I{ROOT}", *flags, "-"],
                       input=f'#include "{path}"\n#include "{path}"\n', cwd=ROOT, capture_output=True, text=True)
    return f"{path}: does not compile alone\n{r.stderr}" if r.returncode else None


def main():
    compiler, flags = [sys.argv[1]], sys.argv[2:]
    paths = [p for p in files(".h") if p.parts[0] in FOLDERS and not p.name.endswith("_body.h")]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda p: compile_alone(compiler, flags, p), paths)
        finish([r for r in results if r], len(paths), "headers")


main()
