# SPDX-License-Identifier: Apache-2.0
"""Guards the machine code of the GPU kernels, which no machine here can run: every kernel is there for gfx942 and gfx950,
uses the matrix instruction of its type and 16-byte loads, keeps within tests/static/limits.csv, and needs no scratch
memory; for sm_90 it compiles. The same source compiled elsewhere gives the same bytes, and the build embeds them.
TD_UPDATE_LIMITS=1 writes the table anew. 77 = no compiler for it, with the reason."""
import csv
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(os.environ["TD_SOURCE_DIR"])
BUILD = pathlib.Path(os.environ["TD_BINARY_DIR"])
LIMITS = ROOT / "tests/static/limits.csv"
ARCHS = ("gfx942", "gfx950")
COLUMNS = ("kernel", "arch", "vgprs", "sgpr_spills")
MATRIX = {
    ("gfx942", "bf16"): "v_mfma_f32_16x16x16_bf16",
    ("gfx950", "bf16"): "v_mfma_f32_16x16x32_bf16",
    ("gfx942", "f32"): "v_mfma_f32_16x16x4_f32",
    ("gfx950", "f32"): "v_mfma_f32_16x16x4_f32",
    ("gfx950", "scaled"): "v_mfma_scale_f32_16x16x128_f8f6f4",
}
# never in these kernels: memory of a lane's own, and loads that do not know LDS from memory
BANNED = re.compile(r"scratch_|flat_|buffer_(load|store)")
problems = []


def skip(reason):
    print(f"SKIP test_code_objects: {reason}")
    sys.exit(77)


def tool(name):
    path = shutil.which(f"{name}-22") or shutil.which(f"{name}-23")
    if not path:
        skip(f"{name}-22 is not installed; apt-get install clang-22 lld-22 llvm-22")
    return path


def run(*args, **kw):
    return subprocess.run(args, check=True, capture_output=True, text=True, **kw).stdout


def names(arch):
    """Kernels in list.def that arch has."""
    kinds = "|_SCALED" if arch == "gfx950" else ""
    return re.findall(rf"^TD_KERNEL(?:{kinds})\((\w+)\)", (ROOT / "kernels/hip/list.def").read_text(), re.M)


def wants(kernel):
    """Type of the matrix instruction a kernel must have, or None."""
    m = re.fullmatch(r"(?:gemm|gemm_silu|moe_up|moe_down)_(?:few|many)_(.).", kernel)
    if m:
        return {"b": "bf16", "f": "f32", "x": "scaled"}[m.group(1)]
    m = re.fullmatch(r"(?:attend|index_score)_(bf16|f32|f8)", kernel)
    return m and m.group(1).replace("f8", "bf16")  # FP8 rows become BF16 operands


def notes(path):
    """What the compiler says of each kernel."""
    found = {}
    for part in run(tool("llvm-readelf"), "--notes", path).split(".args:")[1:]:
        number = {k: int(v) for k, v in re.findall(r"\.(\w+): +(\d+)$", part, re.M)}
        found[re.findall(r"\.name: +(\w+)", part)[-1]] = number
    return found


def instructions(path):
    """Mnemonics of each kernel."""
    found, current = {}, None
    for line in run(tool("llvm-objdump"), "-d", path).splitlines():
        m = re.match(r"[0-9a-f]+ <(\w+)>:", line)
        if m:
            current = found.setdefault(m.group(1), [])
            continue
        m = re.match(r"\s+([a-z]\w+)", line)
        if m and current is not None:
            current.append(m.group(1))
    return found


def check_kernel(arch, kernel, number, code, limits, measured):
    where = f"{kernel} on {arch}"
    measured.append({"kernel": kernel, "arch": arch, "vgprs": number["vgpr_count"], "sgpr_spills": number["sgpr_spill_count"]})
    for what in ("vgpr_spill_count", "private_segment_fixed_size", "group_segment_fixed_size"):
        if number[what]:
            problems.append(f"{where}: {what} is {number[what]}, must be 0")
    limit = limits.get((kernel, arch))
    if not limit:
        problems.append(f"{where}: no row in limits.csv; TD_UPDATE_LIMITS=1 writes it")
    else:
        for what, have in (("vgprs", number["vgpr_count"]), ("sgpr_spills", number["sgpr_spill_count"])):
            if have > int(limit[what]):
                problems.append(f"{where}: {have} {what}, limit {limit[what]}: the kernel got worse")
    banned = sorted({i for i in code if BANNED.match(i)})
    if banned:
        problems.append(f"{where}: has {', '.join(banned)}")
    matrix = wants(kernel)
    if matrix and MATRIX[arch, matrix] not in {re.sub(r"_e\d+$", "", i) for i in code}:
        problems.append(f"{where}: lacks {MATRIX[arch, matrix]}")
    if matrix and "global_load_dwordx4" not in code:
        problems.append(f"{where}: has no 16-byte loads")


def compile_elsewhere(arch, folder):
    """The sources alone, in a folder of another name."""
    for part in ("kernels", "base"):
        shutil.copytree(ROOT / part, folder / part)
    flags = (ROOT / "kernels/hip/objects.flags").read_text().split()
    out = folder / "again.hsaco"
    run(tool("clang++"), *flags, f"--offload-arch={arch}", "-I.", "-o", str(out), "kernels/hip/all.hip", cwd=folder)
    return out.read_bytes()


def check_arch(arch, limits, measured):
    path = BUILD / "gpu" / f"kernels.{arch}.hsaco"
    number, code = notes(path), instructions(path)
    for kernel in names(arch):
        if kernel in number and kernel in code:
            check_kernel(arch, kernel, number[kernel], code[kernel], limits, measured)
        else:
            problems.append(f"{kernel}: not in the object for {arch}")
    for kernel in sorted(set(number) - set(names(arch))):
        problems.append(f"{kernel}: in the object for {arch}, not in list.def for it")
    if path.read_bytes() not in (BUILD / "kernels/hip/libtd_gpu_objects.a").read_bytes():
        problems.append(f"{path.name} is not embedded in libtd_gpu_objects.a")


def check_sm_90():
    """No nvcc is needed to see that the third branch of the source compiles: clang makes PTX of it."""
    flags = ("-x cuda --cuda-gpu-arch=sm_90 --cuda-device-only -nocudainc -nocudalib -std=c++17 -O2 -S -Xclang -target-feature "
             "-Xclang +ptx80 -Wno-unknown-cuda-version -Werror -include tests/static/cuda_shim.h -I. -o -").split()
    ptx = run(tool("clang++"), *flags, "kernels/hip/all.hip", cwd=ROOT)
    parts = re.split(r"^\.visible \.entry (\w+)\(", ptx, flags=re.M)
    code = dict(zip(parts[1::2], parts[2::2]))
    for kernel in names("sm_90"):
        if kernel not in code:
            problems.append(f"{kernel}: not in the code for sm_90")
        elif ".local" in code[kernel]:
            problems.append(f"{kernel} on sm_90: needs local memory")
        elif wants(kernel) == "bf16" and "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" not in code[kernel]:
            problems.append(f"{kernel} on sm_90: lacks mma.sync of BF16")


def main():
    for name in ("clang++", "ld.lld", "llvm-objdump", "llvm-readelf"):
        tool(name)
    subprocess.run(["cmake", "--build", BUILD, "--target", "td_gpu_objects"], check=True, stdout=subprocess.DEVNULL)
    if not all((BUILD / "gpu" / f"kernels.{a}.hsaco").is_file() for a in ARCHS):
        skip("this build was configured before clang-22 was there; run cmake again")
    limits, measured = {}, []
    if LIMITS.is_file():
        with LIMITS.open() as f:
            limits = {(r["kernel"], r["arch"]): r for r in csv.DictReader(f)}
    if os.environ.get("TD_UPDATE_LIMITS") == "1":
        limits = {(k, a): {"vgprs": 512, "sgpr_spills": 512} for a in ARCHS for k in names(a)}
    for arch in ARCHS:
        check_arch(arch, limits, measured)
    check_sm_90()
    for kernel, arch in limits:
        if arch not in ARCHS or kernel not in names(arch):
            problems.append(f"limits.csv: {kernel} on {arch} does not exist")
    with tempfile.TemporaryDirectory() as folder:
        again = compile_elsewhere("gfx950", pathlib.Path(folder))
    if again != (BUILD / "gpu/kernels.gfx950.hsaco").read_bytes():
        problems.append("gfx950: compiled in another folder, the object has other bytes")
    if os.environ.get("TD_UPDATE_LIMITS") == "1":
        with LIMITS.open("w", newline="") as f:
            out = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            out.writeheader()
            out.writerows(measured)
    for p in problems:
        print(p)
    print(f"{len(measured)} kernels, {len(problems)} problems")
    sys.exit(1 if problems or not measured else 0)


main()
