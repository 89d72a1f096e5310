# SPDX-License-Identifier: Apache-2.0
"""Guards the paper figures: on a loop whose counts are known the program finds the inner loop, runs what active lanes run, takes the
cheaper of two branches and names what bounds it; and every matrix kernel of the code objects has a figure. 77 = nothing to read."""
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(os.environ["TD_SOURCE_DIR"]) / "tests/static"))
import paper_figures as paper

BUILD = pathlib.Path(os.environ["TD_BINARY_DIR"])


def code(*lines):
    """(name, index of a branch's target); 4 bytes each."""
    return [(4 * i, name, None if target is None else 4 * target) for i, (name, target) in enumerate(lines)]


def expect(what, got, want):
    if got != want:
        sys.exit(f"{what}: {got}, not {want}")


def known_loop():
    bf16 = "v_mfma_f32_16x16x32_bf16"
    lines = [("v_mov_b32_e32", None),           # before the loop: not counted
             ("global_load_dwordx4", None),     # 1: the loop
             ("s_cbranch_execz", 4),            # active lanes do not skip
             ("ds_write_b64", None),            # 3: 512 bytes of a wave
             ("s_cbranch_vccz", 8),             # the cheaper way: to 8
             ("v_exp_f32_e32", None), ("v_exp_f32_e32", None), ("v_add_f32_e32", None),
             ("ds_read_b128", None),            # 8: 1024 bytes
             ("v_add_f32_e32", None), (bf16, None), (bf16, None),
             ("s_cbranch_scc1", 1), ("v_mov_b32_e32", None), ("s_endpgm", None)]
    loop = paper.inner_loop(paper.blocks_of(code(*lines)))
    row = paper.figure("k", "gfx950", loop)
    want = {"mfma": 2, "mfma_cycles": 32, "valu": 1, "transcendental": 0, "lds": 2, "lds_bytes": 1536, "global": 1, "scalar": 3, "vector_cycles": 12,
            "lds_cycles": 24, "bound": "1.000", "bound_by": "matrix", "instruction": bf16}
    for key, value in want.items():
        expect(key, row[key], value)
    row = paper.figure("k", "gfx942", loop)  # half the LDS rate
    expect("gfx942", (row["lds_cycles"], row["bound"], row["bound_by"]), (48, "0.667", "lds"))
    row = paper.figure("gemm_few_bm", "gfx950", loop)  # 2 x 16 x 32 weights of 17 bits in 32 cycles of 1,024 SIMDs at 2.4 GHz
    expect("weights", (row["weight_bytes"], row["weights_tb_s"]), ("544", "41.78"))
    expect("no loop", paper.inner_loop(paper.blocks_of(code((bf16, None), ("s_endpgm", None)))), None)
    expect("no matrix", paper.inner_loop(paper.blocks_of(code(("v_add_f32_e32", None), ("s_branch", 0)))), None)


def code_objects():
    rows = paper.figures(BUILD)
    for arch in paper.ARCHS:
        found = {r["kernel"] for r in rows if r["arch"] == arch}
        for kernel in ("gemm_few_bb", "gemm_many_bb", "gemm_many_bm", "gemm_many_b8", "moe_up_many_bm", "moe_down_many_bm", "attend_bf16", "attend_f8",
                       "index_score_bf16") + (("gemm_many_xm", "moe_up_few_xm") if arch == "gfx950" else ()):
            if kernel not in found:
                sys.exit(f"{kernel} on {arch}: no figure")
    for r in rows:
        if not (0 < float(r["bound"]) <= 1 and r["mfma"] > 0):
            sys.exit(f"{r}")
    print(f"{len(rows)} figures")


known_loop()
if not all((BUILD / "gpu" / f"kernels.{a}.hsaco").is_file() for a in paper.ARCHS):
    print("SKIP test_paper_figures: no code objects were built (clang-22)")
    sys.exit(77)
code_objects()
