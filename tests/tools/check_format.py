# SPDX-License-Identifier: Apache-2.0
"""Guards .clang-format. With --fix, write the files anew instead."""
import shutil
import subprocess
import sys

from house import ROOT, files, finish, skip

BATCH = 40


def main():
    tool = shutil.which("clang-format-14")
    if not tool:
        skip("clang-format-14 is not installed")
    fix = "--fix" in sys.argv[1:]
    paths = [str(p) for p in files(".c", ".h") if "corpus" not in p.parts]
    problems = set()
    for i in range(0, len(paths), BATCH):
        how = ["-i"] if fix else ["--dry-run", "-Werror", "--ferror-limit=1"]
        r = subprocess.run([tool, *how, *paths[i:i + BATCH]], cwd=ROOT, capture_output=True, text=True)
        problems |= {line.split(":")[0] for line in r.stderr.splitlines() if ": error:" in line}
    finish([f"{p}: not formatted: run python3 tests/tools/check_format.py --fix" for p in sorted(problems)], len(paths), "files")


main()
