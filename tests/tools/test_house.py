# SPDX-License-Identifier: Apache-2.0
"""Guards the guards: each house check must refuse a tree that breaks its rule, and accept the same tree mended."""
import pathlib
import shutil
import subprocess
import sys
import tempfile

TOOLS = pathlib.Path(__file__).resolve().parent
SPDX = "/* SPDX-License-Identifier: Apache-2.0 */\n"
BANNED = '#include "base/banned.h"\n'
GOOD = {"base/banned.h": SPDX, "base/err.h": SPDX, "base/log.h": SPDX, "net/loop.h": SPDX, "engine/kv.h": SPDX, "engine/model.h": SPDX,
        "engine/kv.c": SPDX + '#include "engine/kv.h"\n' + BANNED, "kernels/kernels.h": SPDX}
# check, file, text that breaks the rule
CASES = [
    ("includes", "base/x.c", SPDX + '#include "net/loop.h"\n' + BANNED),
    ("includes", "net/x.c", SPDX + "#include <zmq.h>\n" + BANNED),
    ("includes", "rpc/x.c", SPDX + "#include <event2/event.h>\n" + BANNED),
    ("includes", "engine/x.c", SPDX + "#include <sys/socket.h>\n" + BANNED),
    ("includes", "engine/x.c", SPDX + '#include "base/log.h"\n' + BANNED),
    ("includes", "handoff/x.c", SPDX + '#include "engine/model.h"\n' + BANNED),
    ("includes", "router/x.c", SPDX + '#include "engine/kv.h"\n' + BANNED),
    ("includes", "kernels/x.c", SPDX + '#include "../base/err.h"\n' + BANNED),
    ("includes", "base/x.c", SPDX + '#include "base/gone.h"\n' + BANNED),
    ("includes", "base/x.c", SPDX + BANNED + '#include "base/err.h"\n'),
    ("includes", "base/err.c", SPDX + "#include <errno.h>\n" + '#include "base/err.h"\n' + BANNED),
    ("includes", "text/x.c", SPDX + "#include <immintrin.h>\n" + BANNED),
    ("headers", "base/x.h", SPDX + "int td_x(size_t n);\n"),
    ("headers", "base/x.h", SPDX + "enum { TD_X = 1 };\n"),  # no guard
    ("spdx", "base/x.c", "int x;\n"),
    ("spdx", "tests/tools/x", "#!/bin/sh\ntrue\n"),
    ("text", "base/x.c", SPDX + "int x; // TO" + "DO later\n"),
    ("text", "docs/x.md", "See /ho" + "me/joe/notes.\n"),
    ("text", "base/x.c", SPDX + "\tint x;\n"),
    ("text", "base/x.c", SPDX + "int x; \n"),
    ("text", "base/x.c", SPDX + "int x;"),
    ("format", "base/x.c", SPDX + "int  x ;\n"),
]


def run(tree, check, *args):
    r = subprocess.run([sys.executable, "-B", tree / "tests/tools" / f"check_{check}.py", *args], capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr


def write(tree, name, text):
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def symbols(tree):
    """A library with a stray global is refused, a static one is not seen."""
    for text, want in (("int td_a(void) { return 1; } static int b(void) { return 2; } int (*td_p)(void) = b;\n", 0), ("int stray;\n", 1)):
        write(tree, "s.c", text)
        subprocess.run(["cc", "-c", "s.c", "-o", "s.o"], cwd=tree, check=True)
        (tree / "s.a").unlink(missing_ok=True)
        subprocess.run(["ar", "rc", "s.a", "s.o"], cwd=tree, check=True)
        code, out = run(tree, "symbols", tree / "s.a")
        assert code == want, (text, code, out)


def main():
    with tempfile.TemporaryDirectory() as tmp:
        tree = pathlib.Path(tmp)
        (tree / "tests/tools").mkdir(parents=True)
        for p in TOOLS.glob("*.py"):
            shutil.copy(p, tree / "tests/tools")
        shutil.copy(TOOLS.parents[1] / ".clang-format", tree)
        subprocess.run(["git", "init", "-q", tree], check=True)
        for name, text in GOOD.items():
            write(tree, name, text)
        arguments = {"headers": ["cc"]}
        for check in sorted({c for c, _, _ in CASES}):
            code, out = run(tree, check, *arguments.get(check, []))
            assert code in (0, 77), (check, out)
        for check, name, text in CASES:
            before = (tree / name).read_text() if (tree / name).exists() else None
            write(tree, name, text)
            code, out = run(tree, check, *arguments.get(check, []))
            assert code == 1 or (code == 77 and check == "format"), (check, name, text, code, out)
            assert code == 77 or name in out, (check, name, out)
            (tree / name).unlink()
            if before is not None:
                write(tree, name, before)
        symbols(tree)
    print(f"{len(CASES) + 2} broken rules were seen")


main()
