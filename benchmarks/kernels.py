"""What the compiler makes of this project's kernels for an H100, without one.

    python benchmarks/kernels.py [--json] [--model convnext_tiny --model convnext_base]

Each launch of a fused block's forward and backward pass is compiled for sm_90 by the Triton that is
installed, at the shapes of a training step (224 px, batches of 128, bfloat16). A row: registers of
a thread; bytes of them that do not fit and go through memory; shared memory; and of the innermost
loop that does the work its instructions and the share that are fp32 multiply-adds (FFMA), tensor
core products (HGMMA; one does thousands of times the work of another instruction) and special
functions (MUFU).
"""

import argparse
import collections
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import Block

IMAGES, RECORDED_IMAGES, FIRST_SIDE = 128, 1, 56
"""The products between the launches are done on this CPU, so one image is recorded; nothing that is
compiled depends on their number but whether rows are a multiple of 16."""


@contextlib.contextmanager
def recorded() -> Iterator[list]:
    """Launches are written down instead of done."""
    launches: list[tuple[JITFunction, dict, dict]] = []

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        del grid, warmup
        named = dict(zip(self.arg_names, args, strict=False))
        constants = {name: kwargs.pop(name) for name in self.arg_names if name in kwargs}
        launches.append((self, named | constants, kwargs))

    real, JITFunction.run = JITFunction.run, run
    triton.knobs.runtime.interpret = True  # so that tensors of the CPU are taken
    try:
        yield launches
    finally:
        JITFunction.run = real
        triton.knobs.runtime.interpret = False


def record_block(dim: int, side: int, *, grn: bool) -> list:
    """The launches of a block in all ways that have some, on memory that nobody touches."""
    block = Block(dim, layer_scale_init=None if grn else 1.0, grn=grn).train()
    every = []
    for way in block.ways()[1:]:
        block.way = way
        x = torch.empty(RECORDED_IMAGES, side, side, dim, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16), recorded() as launches:
            out = block(x.requires_grad_(), torch.empty(RECORDED_IMAGES))  # drop path's factors
            out.backward(torch.empty_like(out))
        every += launches
    return every


class AbsentH100:
    """What Triton asks the driver of a device for before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_launch(kernel: JITFunction, arguments: dict, options: dict) -> dict:
    """Compile one launch as a run on an H100 would, and read its machine code."""
    for name in arguments.keys() & {"images", "num_groups", "num_rows"}:
        arguments = arguments | {name: IMAGES * arguments[name]}
    compiled = kernel.warmup(**arguments, grid=(1,), **options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    loop = find_main_loop(code)
    return {
        "kernel": kernel.__name__,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "loop_instructions": sum(loop.values()),
        **{name: loop[name] for name in ("FFMA", "HGMMA", "MUFU")},
    }


def _run(*command: object) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def find_main_loop(code: str) -> collections.Counter:
    """Instructions of the innermost loop with the most arithmetic; of all code if it has none."""
    labels, names, loops = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*)", line)
        if not found or found[1] == "NOP":
            continue
        names.append(found[1])
        target = re.search(r"`\((\.L_x_\d+)\)", line)
        if found[1] == "BRA" and target and target[1] in labels:
            loops.append((labels[target[1]], len(names)))
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    counted = [collections.Counter(names[start:end]) for start, end in inner]
    working = [one for one in counted if one["FFMA"] > 4 or one["HGMMA"]]
    return (
        max(working, key=lambda one: one["FFMA"] + 99 * one["HGMMA"])
        if working
        else (collections.Counter(names))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", action="append", help="default: T, B and V2-T")
    parser.add_argument("--stage", action="append", type=int, help="0 to 3; default: all")
    asked = parser.parse_args()
    driver.set_active(AbsentH100())
    rows, seen = [], set()
    for name in asked.model or ["convnext_tiny", "convnext_base", "convnextv2_tiny"]:
        variant = find_variant(name)
        for stage, dim in enumerate(variant.dims):
            if stage not in (asked.stage or range(4)):
                continue
            side = FIRST_SIDE >> stage
            for kernel, arguments, options in record_block(dim, side, grn=variant.grn):
                stores_h = arguments.get("STORE_H", False)
                key = (kernel.__name__ + " (h)" * stores_h, dim, side)
                if key in seen:
                    continue
                seen.add(key)
                row = compile_launch(kernel, arguments, options)
                shape = {"channels": dim, "side": side, "stores_h": stores_h}
                rows.append(shape | row)
    if asked.json:
        report = {"triton": triton.__version__, "target": "sm_90", "kernels": rows}
        print(json.dumps(report, indent=1))
        return
    print(f"Triton {triton.__version__}, sm_90, {IMAGES} images at 224 px, bfloat16\n")
    print("| kernel | C | side | registers | spilled B | shared KB | loop | FFMA | HGMMA | MUFU |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        total = row["loop_instructions"]
        shares = " | ".join(f"{row[name] / total:.0%}" for name in ("FFMA", "HGMMA", "MUFU"))
        name = row["kernel"] + " (h)" * row["stores_h"]
        print(
            f"| {name} | {row['channels']} | {row['side']}"
            f" | {row['registers']} | {row['spilled_bytes']} | {row['shared_bytes'] / 1024:.0f}"
            f" | {total} | {shares} |"
        )


if __name__ == "__main__":
    main()
