"""Compile every Triton kernel for one compute capability, without a GPU: `python gpu_compile.py 75`. See test_gpu.py."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bklm.bk_core.gpu import backward as gpu_backward
from bklm.bk_core.gpu import forward as gpu_forward
from bklm.bk_core.gpu import scan as gpu_scan
from bklm.bk_core.gpu import solve_sweep as gpu_solve_sweep

SIZES = {"N", "T", "C", "D", "S", "NB", "blocks", "k_row", "e_row"}
ALIGNED = {"N", "T", "k_row"}  # Triton specialises a kernel on sizes divisible by 16


def build(kernel, capability, warps=1, real="fp32", maps="fp32", **constants):
    """PTX of a kernel, after ptxas has accepted it."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in SIZES else "*" + (maps if name in ("maps", "totals") else real)
        if name not in SIZES or name in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"], kernel
    return compiled.asm["ptx"]


def main(capability):
    real = {"A_COMPLEX": False, "K_COMPLEX": False}
    mixed = {"A_COMPLEX": False, "K_COMPLEX": True}
    lane, block = {"LANES": 32}, {"LANES": 128, "warps": 4}
    wanted = {"NEEDS_K": True, "NEEDS_Z": True}
    f = gpu_forward.resolvent_sweep
    ptx = build(f, capability, CAUSAL=False, CHUNKED=True, POLISH=True, **real, **lane)
    # what keeps memory busy: aligned rows are read and written 16 bytes at a time
    assert ptx.count("ld.global.v4") >= 4, "loads of aligned rows are no longer 16 bytes wide"
    assert ptx.count("st.global.v4") >= 4, "stores of aligned rows are no longer 16 bytes wide"
    build(f, capability, CAUSAL=True, CHUNKED=False, POLISH=False, **mixed, **lane)
    build(gpu_forward.moebius_maps, capability, PERIOD=8, MANY=True, maps="fp64", **real, **block)
    build(gpu_scan.scan_carries, capability, ORDER=256, maps="fp64", **block)
    build(gpu_scan.scan_affine, capability, FIRST=0, ORDER=256, **block)
    build(gpu_backward.adjoint_maps, capability, CAUSAL=False, MANY=True, **real, **block)
    build(gpu_backward.adjoint_sweep, capability, CHUNKED=True, **wanted, **real, **lane)
    build(gpu_backward.adjoint_sweep_causal, capability, CHUNKED=True, **wanted, **real, **lane)
    solve = gpu_solve_sweep.linear_sweep
    whole, maps = {"CHUNKED": False, "MAPS": False}, {"CHUNKED": True, "MAPS": True}
    build(solve, capability, REVERSE=False, SCALED=True, X_COMPLEX=False, E_COMPLEX=False, **whole, **lane)
    build(solve, capability, REVERSE=True, SCALED=False, X_COMPLEX=True, E_COMPLEX=True, **maps, **lane)
    if capability >= 80:  # the rarer kinds, once: the same source, other branches
        everything = {"A_COMPLEX": True, "K_COMPLEX": True}
        double = {"real": "fp64", "maps": "fp64"}
        build(f, capability, CAUSAL=False, CHUNKED=True, POLISH=True, **everything, **double, **lane)
        build(gpu_backward.adjoint_maps, capability, CAUSAL=True, MANY=True, **everything, **block)
        build(gpu_backward.adjoint_sweep, capability, CHUNKED=True, **wanted, **everything, **double, **lane)
        build(gpu_scan.scan_carries, capability, ORDER=1, **block)
    print(f"compiled for compute capability {capability / 10}")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except RuntimeError as e:  # Triton's word for a missing assembler
        if "ptxas" not in str(e) or "Cannot find" not in str(e):
            raise
        print(f"cannot compile here: {e}")
