"""Registers, spills and shared memory of the norm kernels, compiled for named GPUs on a machine that needs none.

    python benchmarks/kernel_resources.py [--arch 80 90] [--widths 768 1024] [--save]

Fails if a kernel spills registers to memory at a width that the paper uses (512 to 4,096), or asks at any width for
more shared memory than a block can have.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from _results import save, show
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cod_lightning.kernels import triton_norm

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PAPER_WIDTHS = (512, 768, 1024, 2048, 4096)
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that a block can have, by compute capability."""
ELEMENTS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


KERNELS = ("norm", "add_norm", "backward", "dweight", "add_norm_mixed", "backward_mixed")
"""`mixed` is what compiled code under autocast runs: a stream in float32, the rest in half precision, constants in
memory."""


def parts(kernel: str, width: int, element: str, layer: bool) -> tuple[Any, dict[str, Any], dict[str, str | None]]:
    """A kernel, its constants, and the types of its arguments as training passes them; None: an argument left out."""
    mixed = kernel.endswith("mixed")
    stream, number = ("*fp32", "*fp32") if mixed else (element, "fp32")
    types = {"rstd": "*fp32", "mean": "*fp32" if layer else None, "rows": "i32", "eps": number, "gain": number}
    if kernel == "dweight":
        constants = {"HIDDEN": width, "COLUMNS": triton_norm.COLUMNS, "ROWS": 256, "LOAD": False, "num_warps": 4}
        return triton_norm.dweight_kernel, constants, types | {
            "partial": "*fp32", "dweight": element, "programs": "i32",
        }  # fmt: skip
    if kernel.startswith("backward"):
        return triton_norm.backward_kernel, triton_norm.constants(width, load=mixed, backward=True), types | {
            "stream": stream, "weight": stream, "dy": element, "dstream": stream, "dx": stream, "partial": "*fp32",
            "dbranch": element if mixed else None,
        }  # fmt: skip
    if kernel.startswith("add_norm"):
        types |= {"branch": element, "stream": stream}
    constants = triton_norm.constants(width, load=mixed)
    return triton_norm.forward_kernel, constants, types | {"x": stream, "weight": stream, "y": element}


def compiled(kernel: str, width: int, dtype: str, layer: bool, arch: int) -> tuple[bytes, dict[str, int]]:
    """The machine code of a kernel, and its tile."""
    function, given, types = parts(kernel, width, ELEMENTS[dtype], layer)
    constants = {name: value for name, value in given.items() if name != "num_warps"}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        kind = types.get(name, "i32" if name.endswith("_stride") else None)
        if kind is None:
            constants.setdefault(name, None)
        signature[name] = "constexpr" if kind is None else kind
        # What the launcher finds out of aligned pointers and of strides that are multiples of 16.
        if kind is not None and (kind.startswith("*") or name.endswith("_stride")) and width % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, places, attributes)
    built = triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": given["num_warps"]})
    return built.asm["cubin"], {"rows": given["ROWS"], "warps": given["num_warps"], "shared": built.metadata.shared}


def inspect(cubin: bytes) -> dict[str, int]:
    """What the assembler reports of a kernel, and how many of its memory accesses are 16 bytes wide."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        listing = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S*", listing)
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        "accesses": len(accesses),
        "wide": sum(".128" in access for access in accesses),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.MULTILINE)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities")
    parser.add_argument("--widths", type=int, nargs="+", default=[*PAPER_WIDTHS, 100, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=ELEMENTS)
    parser.add_argument("--kinds", nargs="+", default=["rms", "layer"], choices=["rms", "layer"])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sm_.._[date]_kernels.csv")
    options = parser.parse_args()
    rows = []
    for arch, kind, dtype, width, kernel in itertools.product(
        options.arch, options.kinds, options.dtypes, options.widths, KERNELS
    ):
        if kernel.endswith("mixed") and dtype == "float32":
            continue
        cubin, tile = compiled(kernel, width, dtype, kind == "layer", arch)
        case = {"arch": f"sm_{arch}", "kind": kind, "dtype": dtype, "width": width, "kernel": kernel}
        rows.append(case | tile | inspect(cubin))
    show(rows)
    if options.save:
        save("kernels", rows, device=" ".join(f"sm_{arch}" for arch in options.arch))
    for row in rows:
        if row["shared"] > SHARED.get(int(row["arch"][3:]), min(SHARED.values())):
            sys.exit(f"more shared memory than there is: {row}")
    spilt = [row for row in rows if row["width"] in PAPER_WIDTHS and row["spills"] + row["local"] + row["stack"]]
    if spilt:
        sys.exit(f"{len(spilt)} kernels spill at the paper's widths, the first: {spilt[0]}")


if __name__ == "__main__":
    main()
