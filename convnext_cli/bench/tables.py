"""A comparison of steps as tables of text, for a terminal and for Markdown alike; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from convnext_cli.bench.operators import OPERATOR_CLASSES
from convnext_cli.bench.report import DepthwiseReport, Ratio, StepReport


@dataclass(frozen=True)
class Table:
    """Cells; a column whose name starts with `>` is right-aligned."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def make_speed_table(report: StepReport) -> Table:
    """Images per second of each system, the fastest first, against the machine's own rates."""
    rows = [
        (
            rate.system,
            f"{rate.images_per_second:,.1f}",
            f"{rate.low:,.1f}",
            f"{rate.high:,.1f}",
            _render(rate.peak_bytes, 1e-9, ".2f"),
            f"{rate.start_seconds:.1f}",
        )
        for rate in sorted(report.rates, key=lambda rate: -rate.images_per_second)
    ]
    return Table(("system", ">images/s", ">low", ">high", ">peak GB", ">start s"), tuple(rows))


def make_limit_table(report: StepReport) -> Table:
    """Shares of what the device could do, in the same order."""
    columns = (
        *("system", ">matrix rate", ">data sheet", "list"),
        *(">floor", ">of floor", ">of best"),
    )
    rows = [
        (
            rate.system,
            f"{rate.matmul_frac:.1%}",
            _render(rate.sheet_frac, 1, ".1%"),
            rate.floor_ops,
            _render(rate.floor_images_per_second, 1, ",.0f"),
            _render(rate.floor_frac, 1, ".1%"),
            _render(rate.best_floor_frac, 1, ".1%"),
        )
        for rate in sorted(report.rates, key=lambda rate: -rate.images_per_second)
    ]
    return Table(columns, tuple(rows))


def make_ratio_table(ratios: Sequence[Ratio]) -> Table:
    """How many times as fast this project is."""
    rows = [
        (pair.ours, pair.peer, f"{pair.ratio:.2f}", f"{pair.low:.2f}", f"{pair.high:.2f}")
        for pair in ratios
    ]
    return Table(("this project", "against", ">times as fast", ">low", ">high"), tuple(rows))


def make_floor_table(report: StepReport) -> Table:
    """What perfect kernels of each operator list would move, compute and reach."""
    rows = [
        (
            floor.ops,
            f"{floor.bytes_per_image / 1e6:,.1f}",
            f"{floor.flops_per_image / 1e9:,.1f}",
            f"{1e6 / floor.images_per_second:,.1f}",
            f"{floor.images_per_second:,.0f}",
        )
        for floor in report.floors
    ]
    columns = ("perfect kernels", ">MB an image", ">GFLOP an image", ">us an image", ">images/s")
    return Table(columns, tuple(rows))


def make_profile_table(report: StepReport) -> Table:
    """Milliseconds a step by operator class and their share, a column a system.

    The floor is that of this project's operator list, which comes first.
    """
    cells = [{each.operators: each for each in profile.classes} for profile in report.profiles]
    floors = {
        each.operators: each.floor_milliseconds
        for each in report.profiles[0].classes
        if each.floor_milliseconds is not None
    }
    rows = [
        (
            kind,
            _render(floors.get(kind), 1, ",.2f"),
            *(
                f"{times[kind].milliseconds:,.2f} {times[kind].share:>4.0%}"
                if kind in times
                else ""
                for times in cells
            ),
        )
        for kind in OPERATOR_CLASSES
        if any(kind in times for times in cells)
    ]
    rows.append(
        (
            "all kernels",
            f"{sum(floors.values()):,.2f}" if floors else "",
            *(f"{profile.device_milliseconds:,.2f} 100%" for profile in report.profiles),
        )
    )
    steps = (f"{profile.step_milliseconds:,.2f}     " for profile in report.profiles)
    rows.append(("a step of the rounds", "", *steps))
    systems = (f">{profile.system}" for profile in report.profiles)
    return Table(("milliseconds a step", ">floor", *systems), tuple(rows))


def make_memory_table(report: StepReport) -> Table:
    """Peak memory of this project's step at two batch sizes, against the plan's estimate."""
    columns = (
        *("checkpointing", ">images", ">peak GB", ">plan GB"),
        *(">MB an image", ">GB without images", ">most images"),
    )
    rows = [
        (
            memory.checkpointing,
            " and ".join(f"{images:,}" for images in memory.images),
            " and ".join(f"{peak / 1e9:.2f}" for peak in memory.peak_bytes),
            " and ".join(f"{predicted / 1e9:.2f}" for predicted in memory.predicted_bytes),
            f"{memory.bytes_per_image / 1e6:,.1f}",
            f"{memory.fixed_bytes / 1e9:,.2f}",
            _render(memory.most_images, 1, ",.0f"),
        )
        for memory in report.memory
    ]
    return Table(columns, tuple(rows))


def make_depthwise_table(report: DepthwiseReport) -> Table:
    """Milliseconds of each pass and its share of a copy, a row for each shape and system."""
    columns = ["channels", ">side", "system"]
    for name in (">forward ms", ">input grad ms", ">weight grad ms"):
        columns += [name, ">of a copy"]
    rows = []
    for time in report.times:
        row = [f"{time.channels}", f"{time.side}", time.system]
        for measured in (time.forward, time.input_gradient, time.weight_gradient):
            row += [f"{measured.milliseconds:,.3f}", f"{measured.copy_frac:.1%}"]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))


def render_best(report: StepReport) -> str:
    """One sentence on the fastest peer."""
    best = report.best_peer
    if best is None:
        return "no peer was measured"
    return (
        f"the fastest peer is {best.peer}: this project is {best.ratio:.2f} times as fast"
        f" ({best.low:.2f} to {best.high:.2f})"
    )


def render_rates(report: StepReport) -> str:
    """One sentence on what was measured of the device itself."""
    return (
        "measured on the device: a large matrix product"
        f" {report.matmul_flops_per_second / 1e12:,.2f} TFLOP/s, a copy"
        f" {report.copy_bytes_per_second / 1e9:,.0f} GB/s; the model takes"
        f" {report.flops_per_image / 1e9:,.1f} GFLOP an image"
    )


def render_step_markdown(report: StepReport) -> str:
    """The whole comparison, for `benchmarks/README.md`."""
    compiled = "compiled" if report.compiled else "eager"
    parts = [
        f"## {report.model} at {report.image_px} px, batches of {report.images}",
        f"{report.device}, {report.date}; {report.precision}, {compiled}, kernels {report.kernels};"
        f" {report.rounds} rounds of {report.steps} steps, medians of the rounds;"
        f" {_render_versions(report)}",
        _render_markdown(make_speed_table(report)),
    ]
    if report.ratios:
        parts += [_render_markdown(make_ratio_table(report.ratios)), _sentence(render_best(report))]
    parts += [_render_markdown(make_limit_table(report)), _sentence(render_rates(report))]
    if report.floors:
        parts.append(_render_markdown(make_floor_table(report)))
    if report.profiles:
        parts.append(_render_markdown(make_profile_table(report)))
    if report.memory:
        parts.append(_render_markdown(make_memory_table(report)))
    parts += [f"{name} was left out: {why}" for name, why in report.failed.items()]
    return "\n\n".join(parts) + "\n"


def render_depthwise_markdown(report: DepthwiseReport) -> str:
    """The depthwise times, for `benchmarks/README.md`."""
    return (
        "\n\n".join(
            (
                f"## 7x7 depthwise convolution, batches of {report.images}",
                f"{report.device}, {report.date}; {report.precision}; medians;"
                f" a copy {report.copy_bytes_per_second / 1e9:,.0f} GB/s;"
                f" {_render_versions(report)}",
                _render_markdown(make_depthwise_table(report)),
            )
        )
        + "\n"
    )


def _render_versions(report: StepReport | DepthwiseReport) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _render_markdown(table: Table) -> str:
    lines = [
        [column.removeprefix(">") for column in table.columns],
        ["---:" if column.startswith(">") else "---" for column in table.columns],
        *table.rows,
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(value * scale, form)
