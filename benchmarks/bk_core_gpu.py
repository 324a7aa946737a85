"""The BK-core's Triton backend on this GPU: right, how many launches, how near to the memory's speed?

    python benchmarks/bk_core_gpu.py                       # the sizes below, both modes, float32
    python benchmarks/bk_core_gpu.py --quick               # small ones
    python benchmarks/bk_core_gpu.py --size 64 65536 --size 1 4000000

Per size and mode, forward + exact backward of a, k and z, 32 bits, every row with its own k:

error G, grad   largest error against the torch path in 64 bits, relative to the largest entry (Im z = --eta)
launches        kernels started, forward + backward
device us       without Python: the calls recorded in a CUDA graph and replayed
call us         from Python, one call after the other
of copy         52 bytes per element over device us, as a part of the speed of a large copy measured here (bytes read +
                bytes written); 52 is what reading a, b, c, gbar and writing G and three gradients takes at least
torch/ours      call time of the vectorised torch path (which computes in 64 bits) over ours

Times are medians over rounds in which the arms take turns, with the spread between quartiles. The target is a third of
copy speed at N >= 65536 with enough rows to fill the GPU, and at most 4 launches at (32, 128).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bklm.bk_core import torch_backend
from bklm.bk_core.gpu import backend as gpu

SIZES = [
    (32, 128),
    (4096, 128),
    (8, 4096),
    (8, 65536),
    (64, 65536),
    (1, 1_000_000),
    (1, 4_000_000),
    (65536, 1024),
]
QUICK = [(32, 128), (8, 65536), (1, 1_000_000)]
BYTES = 52  # per element, the least that forward + backward must move; see the docstring
HELD = 120  # bytes per element that our arm allocates at most, inputs and outputs included
HELD_BY_TORCH = 1200  # the torch path keeps 2 x 2 matrices in complex128 for every level of its scan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three sizes, few rounds")
    parser.add_argument(
        "--size", type=int, nargs=2, action="append", metavar=("ROWS", "N"), help="may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=None, help="rounds per size (default 15, quick 5)")
    parser.add_argument("--eta", type=float, default=1.0, help="Im z, not 0 (default 1)")
    options = parser.parse_args()
    sizes = options.size or (QUICK if options.quick else SIZES)
    rounds = options.rounds or (5 if options.quick else 15)
    if any(rows < 1 or n < 1 for rows, n in sizes):
        parser.error(f"--size {sizes}: rows and N must be at least 1.")
    if rounds < 2 or options.eta == 0:
        parser.error(f"--rounds {rounds} --eta {options.eta}: at least 2 rounds and Im z != 0 are needed.")
    if not torch.cuda.is_available() or not gpu.is_available():
        print("No GPU that Triton can use was found: the GPU column of the benchmarks is empty.")
        return

    copy = copy_speed()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    print(
        f"{torch.cuda.get_device_name()}, compute capability {capability}, torch {torch.__version__}, "
        f"copy {copy / 1e9:.0f} GB/s; float32 maps are {'widened to float64' if fast_float64() else 'polished'}"
    )
    print(
        f"{'rows':>6} {'N':>8} {'mode':>13} {'error G':>8} {'grad':>8} {'launches':>8} "
        f"{'device us':>17} {'call us':>17} {'of copy':>8} {'torch/ours':>10}"
    )
    for rows, n in sizes:
        for causal in (False, True):
            print(line(rows, n, causal, options.eta, rounds, copy), flush=True)


def line(rows: int, n: int, causal: bool, eta: float, rounds: int, copy: float) -> str:
    """One line of the table."""
    head = f"{rows:>6} {n:>8} {'causal' if causal else 'bidirectional':>13} "
    free = torch.cuda.mem_get_info()[0]
    if rows * n * HELD > free:
        return head + f"needs {rows * n * HELD / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: left out"
    inputs = problem(rows, n, eta, "cuda")
    compare = rows * n * HELD_BY_TORCH < free
    ours = forward_backward(gpu, inputs, causal)
    arms = {"call": ours, "device": recorded(ours)}
    if compare:
        error_G, error_grad = errors(inputs, causal)
        head += f"{error_G:>8.1e} {error_grad:>8.1e} "
        arms["torch"] = forward_backward(torch_backend, inputs, causal)
    else:
        head += f"{'-':>8} {'-':>8} "
    times = alternate(arms, rounds)
    device = statistics.median(times["device"])
    head += f"{launches(ours):>8} {spread(times['device'])} {spread(times['call'])} {rows * n * BYTES / device / copy:>8.2f} "
    if not compare:
        return head + f"(torch path: {rows * n * HELD_BY_TORCH / 1e9:.0f} GB)"
    return head + f"{statistics.median(times['torch']) / statistics.median(times['call']):>10.1f}"


def problem(rows: int, n: int, eta: float, device: str) -> Inputs:
    """gbar, a, k, z of H = tridiag(1, -2 + v, 1) with Gaussian v, k a little off 1 so that rows do not share it."""
    generator = torch.Generator(device).manual_seed(0)
    normal = {"generator": generator, "device": device}
    a = torch.randn(rows, n, **normal) - 2
    k = 1 + 0.1 * torch.rand(rows, n - 1, **normal)
    z = torch.complex(torch.zeros(rows, device=device), torch.full((rows,), eta, device=device))
    return torch.randn(rows, n, dtype=torch.complex64, **normal), a, k, z


def forward_backward(backend, inputs: Inputs, causal: bool) -> Callable[[], tuple]:
    gbar, a, k, z = inputs

    def call():
        G, saved = backend.forward(a, k, z, causal)
        return G, *backend.backward(gbar, a, k, z, G, saved, causal, True, True)

    return call


def errors(inputs: Inputs, causal: bool) -> tuple[float, float]:
    """Largest errors of G and of the gradients against the torch path in 64 bits, relative to the largest entries."""
    wide = tuple(x.to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs)
    pairs = zip(
        forward_backward(gpu, inputs, causal)(), forward_backward(torch_backend, wide, causal)(), strict=True
    )
    found = [((x - y).abs().max() / y.abs().max()).item() if y.numel() else 0.0 for x, y in pairs]
    return found[0], max(found[1:])


def launches(call: Callable[[], tuple]) -> int:
    """Kernels that a call starts; it is run without starting them."""
    started, launch = [], gpu._launch
    gpu._launch = lambda device, kernel, grid, *args, **constants: started.append(kernel)
    try:
        call()
    finally:
        gpu._launch = launch
    return len(started)


def recorded(call: Callable[[], tuple]) -> Callable[[], None]:
    """The call as a CUDA graph: the same kernels without Python between them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, and settle the allocator, before recording
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def alternate(arms: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, `rounds` values an arm; the arms take turns, so that a busy moment hits all of them."""
    repeats = {}
    for name, call in arms.items():
        call()
        repeats[name] = max(1, min(200, int(0.02 / timed(call, 2))))
    times = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            times[name].append(timed(call, repeats[name]))
    return times


def timed(call: Callable, repeats: int) -> float:
    """Seconds per call over `repeats` calls, by the clock of this process: what a caller waits for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def copy_speed() -> float:
    """Bytes read + bytes written per second by a copy between two buffers far larger than the caches."""
    size = int(min(2**30, torch.cuda.mem_get_info()[0] // 8))
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / statistics.median(timed(lambda: target.copy_(source), 5) for _ in range(10))


def spread(values: list[float]) -> str:
    """Median and half the distance between quartiles, in microseconds."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values) * 1e6:>9.1f} +-{(high - low) / 2 * 1e6:>6.1f}"


def fast_float64() -> bool:
    return torch.cuda.get_device_capability() in gpu.FAST_FLOAT64


if __name__ == "__main__":
    main()
