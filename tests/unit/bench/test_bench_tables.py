"""The report as Markdown."""

import dataclasses

from convnext_cli.bench.report import (
    ClassTime,
    Ratio,
    StepMemory,
    StepProfile,
    StepRate,
    StepReport,
)
from convnext_cli.bench.tables import render_best, render_step_markdown


def rate(system: str, images_per_second: float, **changed) -> StepRate:
    values = {
        "system": system,
        "images_per_second": images_per_second,
        "low": images_per_second - 1,
        "high": images_per_second + 1,
        "matmul_frac": 0.25,
        "sheet_frac": 0.2,
        "floor_ops": "compiler",
        "floor_images_per_second": 7300.0,
        "floor_frac": 0.5,
        "best_floor_frac": 0.25,
        "peak_bytes": 12_340_000_000,
        "start_seconds": 31.0,
        "loss": 6.9,
    }
    return StepRate(**values | changed)


REPORT = StepReport(
    date="2026-11-25",
    model="convnext_tiny",
    device="NVIDIA H100 80GB HBM3",
    versions={"torch": "2.11.0", "cuda": "13.0"},
    images=128,
    image_px=224,
    precision="bf16",
    compiled=True,
    kernels="fused: kept, kept",
    steps=20,
    rounds=5,
    flops_per_image=26.7e9,
    matmul_flops_per_second=790e12,
    copy_bytes_per_second=3e12,
    floors=(),
    rates=(rate("convnext", 3650.0), rate("timm", 4100.0, sheet_frac=None)),
    ratios=(Ratio("convnext", "timm", 0.89, 0.85, 0.93),),
    best_peer=Ratio("convnext", "timm", 0.89, 0.85, 0.93),
    profiles=(
        StepProfile(
            system="convnext",
            step_milliseconds=35.07,
            device_milliseconds=30.0,
            classes=(
                ClassTime("depthwise weight gradient", 12.0, 0.4, 0.4),
                ClassTime("matrix product", 18.0, 0.6, 6.5),
            ),
            kernels=(),
        ),
    ),
    memory=(
        StepMemory("none", (64, 128), (4 * 10**9, 7 * 10**9), 46.9e6, 1e9, (10**9, 10**9), 1500),
    ),
    failed={"torchvision": "it has no such model"},
)


def test_markdown_has_everything_that_a_reader_must_know():
    text = render_step_markdown(REPORT)

    lines = text.splitlines()
    assert lines[0] == "## convnext_tiny at 224 px, batches of 128"
    assert lines[2].startswith(
        "NVIDIA H100 80GB HBM3, 2026-11-25; bf16, compiled, kernels fused: kept, kept; 5 rounds of"
    )
    assert lines[2].endswith("torch 2.11.0, cuda 13.0")
    assert "| timm | 4,100.0 | 4,099.0 | 4,101.0 | 12.34 | 31.0 |" in lines
    assert "| convnext | 25.0% | 20.0% | compiler | 7,300 | 50.0% | 25.0% |" in lines
    assert "| depthwise weight gradient | 0.40 | 12.00  40% |" in lines
    assert "| all kernels | 6.90 | 30.00 100% |" in lines
    assert any(line.startswith("| none | 64 and 128 | 4.00 and 7.00 |") for line in lines)
    assert "torchvision was left out: it has no such model" in lines


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    blocks = render_step_markdown(REPORT).split("\n\n")
    tables = [block.strip().splitlines() for block in blocks if block.startswith("|")]

    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_the_fastest_peer_is_named():
    assert render_best(REPORT) == (
        "the fastest peer is timm: this project is 0.89 times as fast (0.85 to 0.93)"
    )
    assert render_best(dataclasses.replace(REPORT, best_peer=None)) == "no peer was measured"
