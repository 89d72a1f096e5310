# SPDX-License-Identifier: Apache-2.0
"""What the checks of the house share: the list of our files, and how a check ends."""
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("base", "proto", "net", "rpc", "kernels", "text", "engine", "handoff", "router", "worker", "prefill-worker",
           "decode-worker", "cli")
SKIP = 77


def files(*suffixes):
    """Paths relative to the root: tracked, and new ones that git does not ignore; without git (a source archive), all."""
    try:
        out = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                             check=True, capture_output=True).stdout
        names = [pathlib.Path(n) for n in out.decode().split("\0") if n]
    except (OSError, subprocess.CalledProcessError):
        names = [p.relative_to(ROOT) for p in ROOT.rglob("*")]
        names = [p for p in names if p.parts[0] != "build" and "__pycache__" not in p.parts]
    names = sorted({p for p in names if (ROOT / p).is_file()})
    return [p for p in names if not suffixes or p.suffix in suffixes]


def text(path):
    """Lines of a text file; None for a binary one."""
    data = (ROOT / path).read_bytes()
    if b"\0" in data[:8192]:
        return None
    try:
        return data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return None


def finish(problems, seen, what):
    """Print the problems and exit; a check that saw nothing has failed too."""
    for p in problems:
        print(p)
    print(f"{seen} {what}, {len(problems)} problems")
    sys.exit(1 if problems or not seen else 0)


def skip(reason):
    print(f"SKIP {pathlib.Path(sys.argv[0]).stem}: {reason}")
    sys.exit(SKIP)
