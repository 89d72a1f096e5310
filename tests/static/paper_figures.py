# SPDX-License-Identifier: Apache-2.0
"""Paper figures of the matrix kernels for gfx942 and gfx950: NOTHING OF THIS RAN ON A GPU. From the disassembly of the code objects:
what the inner loop of a kernel issues for each matrix instruction, and the share of the matrix peak that a SIMD could reach if
nothing but issue and LDS bandwidth stood in its way. An upper bound, no forecast.

usage: python3 tests/static/paper_figures.py BUILD [OUT.csv]     BUILD/gpu holds kernels.<arch>.hsaco; llvm-objdump of LLVM 22

The inner loop is the cycle of the control flow with the most matrix cycles for what else it issues. Assumed, each for one SIMD
with enough waves to hide every latency, and each in favour of the kernel:
  * a matrix instruction occupies the matrix pipe for the cycles below (4 a pass): those at which the chips' stated peaks are reached;
  * the port that vector and matrix instructions share issues one in 4 cycles, transcendental ones in 16;
  * LDS gives a SIMD 32 bytes a cycle on gfx942, 64 on gfx950 (a quarter of the unit's), without bank conflicts;
  * scalar instructions, waits, barriers, global loads and their latency cost nothing;
  * branches go the cheapest way, but what active lanes run (behind s_cbranch_execz) and what loads or stores (a branch that only
    steps over it) is always run; a loop inside without matrix instructions runs once.
bound = matrix cycles / the largest of matrix, vector and LDS cycles. A kernel for few rows must rather keep up with the memory that
its weights come from: weights_tb_s is the rate at which the whole chip could take them at the same cycles (stated clock and units)."""
import csv
import pathlib
import re
import shutil
import subprocess
import sys

ARCHS = ("gfx942", "gfx950")
COLUMNS = ("kernel", "arch", "instruction", "mfma", "mfma_cycles", "valu", "transcendental", "lds", "lds_bytes", "global", "scalar", "vector_cycles",
           "lds_cycles", "bound", "bound_by", "weight_bytes", "weights_tb_s")
CYCLES = {"v_mfma_f32_16x16x16_bf16": 16, "v_mfma_f32_16x16x32_bf16": 16, "v_mfma_f32_16x16x4_f32": 32,
          "v_mfma_scale_f32_16x16x128_f8f6f4": 32}  # the last with FP8 on one side; 16 were both FP4
SIMDS_GHZ = {"gfx942": (4 * 304, 2.1), "gfx950": (4 * 256, 2.4)}  # MI300X, MI355X
WEIGHT_BYTES = {"b": 2.0, "m": 17 / 32, "8": 1.0, "f": 4.0}  # by the last letter of a kernel's name: BF16, MXFP4, FP8, f32
LDS_RATE = {"gfx942": 32, "gfx950": 64}  # bytes a cycle and SIMD
TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
WIDTH = {"b8": 1, "u8": 1, "i8": 1, "b16": 2, "u16": 2, "i16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
KINDS = ("mfma", "valu", "transcendental", "lds", "global", "scalar")
WAVE = 64


def tool():
    path = shutil.which("llvm-objdump-22") or shutil.which("llvm-objdump-23")
    if not path:
        print("SKIP paper_figures: llvm-objdump-22 is not installed; apt-get install llvm-22")
        sys.exit(77)
    return path


def disassemble(path):
    """Kernel: [(offset, mnemonic, offset of a branch's target or None)]."""
    found, code, base = {}, None, 0
    for line in subprocess.run([tool(), "-d", path], check=True, capture_output=True, text=True).stdout.splitlines():
        m = re.match(r"([0-9a-f]+) <(\w+)>:", line)
        if m:
            base, code = int(m[1], 16), found.setdefault(m[2], [])
            continue
        m = re.match(r"\s+([a-z]\w+).*// ([0-9A-F]+):", line)
        if m and code is not None:
            target = re.search(r"<\w+\+0x([0-9a-f]+)>$", line)
            code.append((int(m[2], 16) - base, m[1], int(target[1], 16) if target else None))
    return found


def plain(name):
    return re.sub(r"_(e32|e64|sdwa|dpp|e64_dpp)$", "", name)


def kind(name):
    if name.startswith("v_mfma"):
        return "mfma"
    if name.startswith("v_"):
        return "transcendental" if TRANSCENDENTAL.match(name) else "valu"
    return "lds" if name.startswith("ds_") else "global" if name.startswith("global_") else "scalar"


def lds_bytes(name):
    """What a wave moves; what moves nothing through memory (swizzles, permutes) counts a word of each lane."""
    m = re.match(r"ds_(?:read|write|load|store)(2)?(?:st64)?(?:_tr)?_(?:\w+_)?([bui]\d+)", name)
    return WAVE * (WIDTH.get(m[2], 4) * (2 if m[1] else 1) if m else 4)


class Block:
    def __init__(self):
        self.count, self.lds_bytes, self.next, self.names = dict.fromkeys(KINDS, 0), 0, [], set()

    def add(self, name):
        self.count[kind(name)] += 1
        self.lds_bytes += lds_bytes(name) if name.startswith("ds_") else 0
        if name.startswith("v_mfma"):
            self.names.add(plain(name))


def matrix_cycles(b):
    return sum(CYCLES[n] for n in b.names) * b.count["mfma"] if len(b.names) < 2 else sys.exit(f"two matrix instructions: {b.names}")


def vector_cycles(b):
    return 4 * (b.count["mfma"] + b.count["valu"]) + 16 * b.count["transcendental"]


def is_run(code, i, target):
    """Does the branch at i only step over what the figure counts: work of active lanes, loads and stores?"""
    if code[i][1] == "s_cbranch_execz":
        return True
    if code[i][1] == "s_branch" or target is None or target <= i:
        return False
    inside = code[i + 1:target]
    leaves = any(t is not None and not i < t_at < target + 1 for t, t_at in ((t, position(code, t)) for _, _, t in inside))
    return not leaves and any(name.startswith(("global_", "ds_")) for _, name, _ in inside)


def position(code, at):
    """Index of the instruction at an offset."""
    low, high = 0, len(code)
    while at is not None and low < high:
        mid = (low + high) // 2
        low, high = (mid + 1, high) if code[mid][0] < at else (low, mid)
    return low


def blocks_of(code):
    starts = {code[0][0]} | {t for _, _, t in code if t is not None}
    starts |= {code[i + 1][0] for i, (_, name, _) in enumerate(code[:-1]) if "branch" in name or name == "s_endpgm"}
    blocks, current, index = {}, None, {at: i for i, (at, _, _) in enumerate(code)}
    for i, (at, name, target) in enumerate(code):
        if at in starts:
            current = blocks.setdefault(at, Block())
        current.add(name)
        after = code[i + 1][0] if i + 1 < len(code) else None
        if "branch" in name:
            taken = None if is_run(code, i, index.get(target)) else target
            current.next = [t for t in (taken, None if name == "s_branch" else after) if t is not None]
        elif name != "s_endpgm" and after in starts:
            current.next = [after]
    return blocks


def positive_cycle(blocks, weight):
    """Blocks of a cycle whose weights sum to more than 0, or None (Bellman-Ford for the longest way)."""
    best, before, last = dict.fromkeys(blocks, 0.0), {}, None
    for _ in range(len(blocks) + 1):
        last = None
        for at, b in blocks.items():
            value = best[at] + weight[at]
            for n in b.next:
                if value > best[n] + 1e-9:
                    best[n], before[n], last = value, at, n
        if last is None:
            return None
        seen, at = {}, last  # a cycle of predecessors is one of positive weight
        while at in before and at not in seen:
            seen[at] = None
            at = before[at]
        if at in seen:
            cycle, first = [at], before[at]
            while first != at:
                cycle.append(first)
                first = before[first]
            return cycle
    return None


def inner_loop(blocks):
    """The cycle with the most matrix cycles for its vector cycles; None where there is no matrix instruction."""
    ratio, found = 0.0, None
    while True:
        weight = {at: matrix_cycles(b) - ratio * vector_cycles(b) - (1e-6 if found is None else 0) for at, b in blocks.items()}
        cycle = positive_cycle(blocks, weight)
        if not cycle:
            return found
        found = [blocks[at] for at in cycle]
        ratio = sum(map(matrix_cycles, found)) / max(1, sum(map(vector_cycles, found)))


def weights(kernel, arch, total, instruction, cycles):
    """Bytes of weights in a loop of a kernel for few rows, where each matrix instruction meets 16 new rows of them; TB/s of the chip."""
    m = re.search(r"_few_\w([bm8f])$", kernel)
    if not m:
        return {"weight_bytes": "", "weights_tb_s": ""}
    k = int(re.search(r"16x16x(\d+)_", instruction)[1])
    size = total["mfma"] * 16 * k * WEIGHT_BYTES[m[1]]
    simds, ghz = SIMDS_GHZ[arch]
    return {"weight_bytes": f"{size:.0f}", "weights_tb_s": f"{size / cycles * simds * ghz / 1e3:.2f}"}


def figure(kernel, arch, loop):
    total = {k: sum(b.count[k] for b in loop) for k in KINDS}
    times = {"matrix": sum(map(matrix_cycles, loop)), "vector": sum(map(vector_cycles, loop)),
             "lds": sum(b.lds_bytes for b in loop) // LDS_RATE[arch]}
    slowest = max(times, key=lambda k: (times[k], k == "matrix"))
    instruction = ",".join(sorted(set().union(*(b.names for b in loop))))
    return {"kernel": kernel, "arch": arch, "instruction": instruction, **weights(kernel, arch, total, instruction, times[slowest]),
            "mfma_cycles": times["matrix"], "vector_cycles": times["vector"], "lds_cycles": times["lds"],
            "lds_bytes": sum(b.lds_bytes for b in loop), "bound": f"{times['matrix'] / times[slowest]:.3f}", "bound_by": slowest, **total}


def figures(build):
    rows = []
    for arch in ARCHS:
        for kernel, code in disassemble(pathlib.Path(build) / "gpu" / f"kernels.{arch}.hsaco").items():
            loop = inner_loop(blocks_of(code))
            if loop:
                rows.append(figure(kernel, arch, loop))
    return rows


def write(rows, file):
    version = re.search(r"LLVM version (\S+)", subprocess.run([tool(), "--version"], check=True, capture_output=True, text=True).stdout)
    print(f"# paper figure: nothing ran on a GPU (tests/static/paper_figures.py says what is assumed); LLVM {version[1]}", file=file)
    out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    out.writeheader()
    out.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    if len(sys.argv) == 3:
        with open(sys.argv[2], "w") as out:
            write(figures(sys.argv[1]), out)
    else:
        write(figures(sys.argv[1]), sys.stdout)
