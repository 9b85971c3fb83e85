"""Compiles the Triton kernels for GPUs that this machine need not have.

    python tests/benchmark_compile.py                              # 1 to 2 hours of processor time
    python tests/benchmark_compile.py --offered                    # without what is not offered
    python tests/benchmark_compile.py --dtypes bf16 --architectures 90

Triton's compiler and the ptxas of its wheel need no GPU. The numbers are those of the programs that
a GPU would run, because ptxas reports them while it makes them. It prints a markdown table: per
architecture, kernel and dtype the best and the worst candidate of the autotuner. A
candidate is offered if `is_offered` of natten3d_triton.py says so.

All presets have heads of 64 numbers, and the sizes B, T, n and the number of columns are arguments
of a kernel, so the presets share one program per candidate. Triton compiles another one if n or
the number of columns is a multiple of 16: --aligned is that.

It exits with 1 if a candidate that is offered spills registers or exceeds the shared memory.
"""

import argparse
import contextlib
import csv
import io
import itertools
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Triton reads these when it is imported: compile instead of interpreting, always, and print ptxas's
# report. In 3.9 fused multiply-adds are the default, and a warning if it isn't said.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

sys.path.insert(0, str(Path(__file__).parent.parent))
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import natten3d_triton

# Bytes of shared memory that a block may have: CUDA C++ Programming Guide, "Compute Capabilities".
# It is the memory of a multiprocessor, 164 or 228 KiB, without the 1 KiB that CUDA keeps.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns, of sm_100: PTX ISA, "Tensor Memory"
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = ("forward_kernel", "dq_kernel", "dkv_kernel")


class Case(NamedTuple):
    architecture: int
    kernel: str
    dtype: str
    d: int
    N: int
    warps: int
    stages: int


class Built(NamedTuple):
    registers: int  # per thread
    spills: int  # bytes per thread, stores and loads
    shared: int  # bytes per block
    tensor_memory: int  # columns per block, of sm_100


def padded(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def is_offered(case: Case) -> bool:
    number_bytes = DTYPE_BYTES[case.dtype]
    backward = case.kernel != "forward_kernel"
    facts = (padded(case.d), number_bytes, backward)
    return natten3d_triton.is_offered(case.N, case.warps, *facts)


def fits(case: Case, built: Built) -> bool:
    """Whether a GPU can launch it, and nothing spills."""
    shared = built.shared <= SHARED_LIMIT[case.architecture]
    return shared and built.tensor_memory <= TENSOR_MEMORY_LIMIT and built.spills == 0


def build(case: Case, aligned: bool = False) -> Built:
    """Compile a kernel as a launch on tensors of PyTorch would, whose memory is aligned."""
    function = getattr(natten3d_triton, case.kernel).fn
    signature = {}
    attributes = {}
    for i, name in enumerate(function.arg_names):
        # The type of the argument.
        if name in ("d", "P", "M", "N"):
            signature[name] = "constexpr"
        elif name in ("row", "column", "columns"):
            signature[name] = "*i32"
        elif name in ("lse", "delta"):
            signature[name] = "*fp32"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in ("T", "n", "most"):
            signature[name] = "i32"
        else:
            signature[name] = f"*{case.dtype}"

        # What is known to be a multiple of 16.
        if signature[name].startswith("*") or name == "T" or (aligned and name in ("n", "most")):
            attributes[(i,)] = [["tt.divisibility", 16]]

    # Compile.
    sizes = {"d": case.d, "P": padded(case.d), "M": natten3d_triton.TILE**3, "N": case.N}
    source = ASTSource(function, signature, sizes, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        program = triton.compile(source, GPUTarget("cuda", case.architecture, 32), options)

    # Read ptxas's report.
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill", log.getvalue())
    if registers is None or not spills:
        raise ValueError(f"ptxas reported no registers or spills for {case}: {log.getvalue()!r}")
    memory = (program.metadata.shared, program.metadata.tmem_size)
    return Built(int(registers[1]), sum(map(int, spills)), *memory)


def cost(row: tuple[Case, Built]) -> tuple:
    """The worst candidate has the largest: spills before shared memory before registers."""
    _, built = row
    return built.spills, built.shared, built.registers


def print_table(rows: list[tuple[Case, Built]]) -> None:
    print("| GPU | kernel | dtype | | N, warps, stages | registers | spills | shared | fits |")
    print("|---|---|---|---|---|---|---|---|---|")
    groups = {}
    for row in rows:
        groups.setdefault(row[0][:3], []).append(row)
    for (architecture, kernel, dtype), group in groups.items():
        # The extremes of the candidates that are offered, and of the others.
        offered = sorted((row for row in group if is_offered(row[0])), key=cost)
        others = sorted((row for row in group if not is_offered(row[0])), key=cost)
        lines = []
        if offered:
            lines += [("best offered", offered[0]), ("worst offered", offered[-1])]
        if others:
            lines += [("best not offered", others[0]), ("worst not offered", others[-1])]
        for label, (case, built) in lines:
            print(
                f"| sm_{architecture} | {kernel.removesuffix('_kernel')} | {dtype} | {label} "
                f"| {case.N}, {case.warps}, {case.stages} | {built.registers} | {built.spills} B "
                f"| {built.shared / 1024:.0f} of {SHARED_LIMIT[architecture] // 1024} KiB "
                f"| {'yes' if fits(case, built) else 'no'} |"
            )


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("--architectures", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    add("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    add("--dtypes", nargs="+", choices=DTYPE_BYTES, default=list(DTYPE_BYTES))
    add("--d", type=int, default=64, help="numbers per head")
    add("--offered", action="store_true", help="only the candidates that are offered")
    add("--one", type=int, nargs=3, metavar=("N", "WARPS", "STAGES"), help="only this candidate")
    add("--aligned", action="store_true", help="n and the number of columns: multiples of 16")
    add("--workers", type=int, default=os.cpu_count())
    add("--csv", type=Path, help="write all numbers there")
    args = cli.parse_args()

    # What to compile.
    candidates = [tuple(args.one)] if args.one else natten3d_triton.CANDIDATES
    products = itertools.product(args.architectures, args.kernels, args.dtypes, candidates)
    cases = [Case(*names, args.d, *candidate) for *names, candidate in products]
    if args.offered:
        cases = [case for case in cases if is_offered(case)]

    # Compile, without what Triton has stored, in several processes.
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor(args.workers) as pool:
            results = pool.map(build, cases, itertools.repeat(args.aligned))
            for case, built in zip(cases, results, strict=True):
                print(*case, *built, file=sys.stderr, flush=True)
                rows.append((case, built))

    # Report.
    print(f"triton {triton.__version__}, d = {args.d}, {len(cases)} programs\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Case._fields, *Built._fields, "offered", "fits"])
            for row in rows:
                writer.writerow([*row[0], *row[1], is_offered(row[0]), fits(*row)])
    print_table(rows)
    wrong = [case for case, numbers in rows if is_offered(case) and not fits(case, numbers)]
    for case in wrong:
        print(f"offered, but it does not fit: {case}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
