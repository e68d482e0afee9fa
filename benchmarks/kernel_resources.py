"""Registers, spills and shared memory of the norm kernels, compiled for given GPUs; needs no GPU.

    python benchmarks/kernel_resources.py [--arch 80 90] [--widths 768 1024] [--save]

Fails if a kernel spills registers at a width of the paper (512 to 4,096), or needs more shared memory than a block can
have.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from _results import argument_parser, report
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cod_lightning.kernels import triton_bounded, triton_norm
from cod_lightning.kernels.reference import BOUNDED

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PAPER_WIDTHS = (512, 768, 1024, 2048, 4096)
MAX_SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory of a block in bytes, by compute capability."""
DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
KINDS = ("rms", "layer", *BOUNDED)
KERNELS = ("norm", "add_norm", "backward", "dweight", "add_norm_mixed", "backward_mixed")
"""`mixed` is the variant of compiled code under autocast: residual stream in float32, other tensors in half precision,
constants in memory."""
BOUNDED_KERNELS = ("norm", "add_norm", "backward")


def bounded_arguments(kernel: str, width: int, dtype: str, kind: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """As `kernel_arguments`, for a bounded norm."""
    constants = triton_bounded.tiles(width, kind == "derf", backward=kernel == "backward")
    types = {"weight": "*fp32", "alpha": "*fp32", "rows": "i32"}
    types |= {"rstd": "*fp32"} if kind == "bhyt" else {}
    types |= {"shift": "*fp32"} if kind == "derf" else {}
    if kernel == "backward":
        sums = dict.fromkeys(("dweight", "dbias", "dalpha", "dshift"), "*fp32")
        streams = dict.fromkeys(("stream", "dy", "dstream", "dx"), dtype)
        return triton_bounded.backward_kernel, constants, types | sums | streams
    types |= {"x": dtype, "y": dtype, "eps": "fp32"} | ({} if kind == "bhyt" else {"bias": "*fp32"})
    types |= {"branch": dtype, "stream": dtype} if kernel == "add_norm" else {}
    return triton_bounded.forward_kernel, constants | {"LOAD": False}, types


def kernel_arguments(kernel: str, width: int, dtype: str, kind: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A kernel, its constants, and its argument types as in training; None: the argument is absent."""
    mixed = kernel.endswith("mixed")
    stream, number = ("*fp32", "*fp32") if mixed else (dtype, "fp32")
    types = {
        "rstd": "*fp32", "mean": "*fp32" if kind == "layer" else None, "rows": "i32", "eps": number, "gain": number,
    }  # fmt: skip
    if kernel == "dweight":
        constants = {"HIDDEN": width, "COLUMNS": triton_norm.COLUMNS, "ROWS": 256, "LOAD": False, "num_warps": 4}
        return triton_norm.dweight_kernel, constants, types | {
            "partial": "*fp32", "dweight": dtype, "programs": "i32",
        }  # fmt: skip
    if kernel.startswith("backward"):
        return triton_norm.backward_kernel, triton_norm.constants(width, load=mixed, backward=True), types | {
            "stream": stream, "weight": stream, "dy": dtype, "dstream": stream, "dx": stream, "partial": "*fp32",
            "dbranch": dtype if mixed else None,
        }  # fmt: skip
    if kernel.startswith("add_norm"):
        types |= {"branch": dtype, "stream": stream}
    constants = triton_norm.constants(width, load=mixed)
    return triton_norm.forward_kernel, constants, types | {"x": stream, "weight": stream, "y": dtype}


def compile_kernel(kernel: str, width: int, dtype: str, kind: str, arch: int) -> tuple[bytes, dict[str, int]]:
    """The cubin of a kernel; its tile and shared memory."""
    arguments = bounded_arguments if kind in BOUNDED else kernel_arguments
    function, settings, types = arguments(kernel, width, DTYPES[dtype], kind)
    constants = {name: value for name, value in settings.items() if name != "num_warps"}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        argument_type = types.get(name, "i32" if name.endswith("_stride") else None)
        if argument_type is None:
            constants.setdefault(name, None)
        elif (argument_type.startswith("*") or name.endswith("_stride")) and width % 16 == 0:
            # the launcher derives this from aligned pointers and strides
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[name] = argument_type or "constexpr"
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, positions, attributes)
    result = triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": settings["num_warps"]})
    tile = {"rows": settings["ROWS"], "warps": settings["num_warps"], "shared": result.metadata.shared}
    return result.asm["cubin"], tile


def inspect(cubin: bytes) -> dict[str, int]:
    """Resources that the assembler reports; `wide` counts memory accesses of 16 bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        listing = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S*", listing)
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "local": resources["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        "accesses": len(accesses),
        "wide": sum(".128" in access for access in accesses),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.MULTILINE)),
    }


def main() -> None:
    parser = argument_parser(__doc__, "kernels")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities")
    parser.add_argument("--widths", type=int, nargs="+", default=[*PAPER_WIDTHS, 100, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = parser.parse_args()
    rows = []
    for arch, kind, dtype, width, kernel in itertools.product(args.arch, args.kinds, args.dtypes, args.widths, KERNELS):
        if (kernel.endswith("mixed") and dtype == "float32") or (kind in BOUNDED and kernel not in BOUNDED_KERNELS):
            continue
        cubin, tile = compile_kernel(kernel, width, dtype, kind, arch)
        case = {"arch": f"sm_{arch}", "kind": kind, "dtype": dtype, "width": width, "kernel": kernel}
        rows.append(case | tile | inspect(cubin))
    report(args, rows, device=" ".join(f"sm_{arch}" for arch in args.arch))
    for row in rows:
        if row["shared"] > (limit := MAX_SHARED.get(int(row["arch"][3:]), min(MAX_SHARED.values()))):
            sys.exit(f"a kernel needs more shared memory than a block can have ({limit} bytes): {row}")
    spills = [row for row in rows if row["width"] in PAPER_WIDTHS and row["spills"] + row["local"] + row["stack"]]
    if spills:
        sys.exit(f"{len(spills)} kernels spill registers at widths of the paper; the first: {spills[0]}")


if __name__ == "__main__":
    main()
