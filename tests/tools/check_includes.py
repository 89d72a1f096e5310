# SPDX-License-Identifier: Apache-2.0
"""Guards the floors of the house: a folder includes only what its row names, and a library shows in one folder only."""
import re

from house import FOLDERS, ROOT, files, finish, text

# folder: folders (or single headers) below it
MAY = {
    "base": (),
    "proto": (),
    "net": ("base",),
    "rpc": ("base", "proto", "net"),
    "kernels": ("base",),
    "text": ("base",),
    "engine": ("base", "kernels"),
    "handoff": ("base", "proto", "rpc", "engine/kv.h"),
    "router": ("base", "proto", "net", "rpc", "text"),
    "worker": ("base", "proto", "net", "rpc", "engine", "handoff", "text/grammar.h"),
    "prefill-worker": ("base", "proto", "net", "rpc", "engine", "handoff", "text/grammar.h", "worker"),
    "decode-worker": ("base", "proto", "net", "rpc", "engine", "handoff", "text/grammar.h", "worker"),
    "cli": tuple(f for f in FOLDERS if f != "cli"),
}
# system headers that are not libc: who may name them. jansson and protobuf-c show in the headers of base and proto, so
# whoever may include those may name them.
LIBRARY = {
    r"sodium(/.*)?\.h|xxhash\.h": {"base"},
    r"jansson\.h": {f for f, below in MAY.items() if "base" in below} | {"base"},
    r"protobuf-c/.*": {f for f, below in MAY.items() if "proto" in below} | {"proto"},
    r"event2/.*|evhttp\.h|event\.h|systemd/.*|openssl/(ssl|err|x509.*)\.h": {"net"},
    r"openssl/.*": {"net", "rpc"},
    r"zmq.*\.h": {"rpc"},
    r"pcre2.*\.h|unicode/.*": {"text"},
    r".*intrin\.h|cpuid\.h|hip/.*|cuda.*": {"kernels"},
    r"cmocka\.h": set(),
}
# one exception, by file: CRC32C is a processor instruction
EXCEPT = {("base/crc32c.c", "nmmintrin.h")}
# the engine and what lies under it own no socket, and libraries do not log
NEVER = {
    r"sys/socket\.h|netinet/.*|arpa/.*|netdb\.h": {"base", "proto", "kernels", "text", "engine"},
    r"base/log\.h": {"proto", "kernels", "text", "engine", "handoff"},
}
# generated headers, and headers with rows instead of declarations
MADE = re.compile(r"proto/\w+\.pb-c\.h")
INCLUDE = re.compile(r'\s*#\s*include\s*([<"])([^">]+)[">]')


def includes(path):
    for n, line in enumerate(text(path) or [], 1):
        m = INCLUDE.match(line)
        if m:
            yield n, m.group(1) == "<", m.group(2)


def folder_rule(path, name):
    own = path.parts[0]
    target = name.split("/")[0]
    if target == own:
        return None if (ROOT / name).is_file() or MADE.fullmatch(name) else "no such file; write the path from the root"
    if target not in FOLDERS:
        return "not a folder of the house; write the path from the root"
    if not (target in MAY[own] or name in MAY[own]):
        return f"{own} may include only {', '.join(MAY[own]) or 'itself'}"
    return None if (ROOT / name).is_file() or MADE.fullmatch(name) else "no such file"


def library_rule(path, name):
    own = path.parts[0]
    if (str(path), name) in EXCEPT:
        return None
    for pattern, who in LIBRARY.items():
        if re.fullmatch(pattern, name):
            return None if own in who else f"only {', '.join(sorted(who)) or 'tests'} may know this library"
    return None


def never_rule(path, name):
    for pattern, who in NEVER.items():
        if path.parts[0] in who and re.fullmatch(pattern, name):
            return f"{path.parts[0]} must not need this"
    return None


def order_rule(path, found):
    """A .c file: its own header first if there is one, base/banned.h last. A thin main.c calls one function."""
    names = [name for _, _, name in found if not name.endswith((".def", ".inc"))]
    own = str(path.with_suffix(".h"))
    if path.name == "main.c" and len(names) == 1:
        return None
    if not names or names[-1] != "base/banned.h":
        return "base/banned.h must be the last include"
    if (ROOT / own).is_file() and names[0] != own:
        return f"the first include must be {own}"
    return None


def main():
    problems, seen = [], 0
    for path in files(".c", ".h", ".def"):
        if path.parts[0] not in FOLDERS:
            continue
        found = list(includes(path))
        seen += 1
        for n, system, name in found:
            why = (library_rule if system else folder_rule)(path, name) or never_rule(path, name)
            if why:
                problems.append(f"{path}:{n}: {name}: {why}")
        if path.suffix == ".c":
            why = order_rule(path, found)
            if why:
                problems.append(f"{path}:1: {why}")
    finish(problems, seen, "files")


main()
