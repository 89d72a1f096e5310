# SPDX-License-Identifier: Apache-2.0
"""Guards the prefix: what a library exports begins with td_ (generated messages: tandem__). Arguments: archives."""
import re
import subprocess
import sys

from house import finish

PREFIX = re.compile(r"td_|tandem__")


def main():
    problems, seen = [], 0
    for archive in sys.argv[1:]:
        member = archive
        out = subprocess.run(["nm", "--defined-only", "--extern-only", archive], capture_output=True, text=True, check=True).stdout
        for line in out.splitlines():
            if line.endswith(":"):
                member = line[:-1]
                continue
            words = line.split()
            if len(words) != 3:
                continue
            seen += 1
            if not PREFIX.match(words[2]):
                problems.append(f"{member}: {words[2]}: make it static or give it the prefix td_")
    finish(problems, seen, "symbols")


main()
