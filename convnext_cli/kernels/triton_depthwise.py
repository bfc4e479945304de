"""Device code of the 7x7 depthwise convolution over NHWC, in Triton.

A program owns `ROWS` lines of an image and `BLOCK` channels; a thread, two channels of a line. It
slides along the line: each input column is read once and goes into the seven output columns around
it, whose sums lie in registers, as the 49 weights do. So an output costs seven loads, not 49, and
no load of the input has a condition: lines above or below the image are read from the line at work,
with a weight of zero.

Shapes: x and out (LINES, WIDTH, CHANNELS), where a line is a row of pixels of one image; weights
(49, CHANNELS) and biases (CHANNELS) in float32. `UNROLL` divides WIDTH.
"""

import triton
import triton.language as tl


@triton.jit
def _load_column(lines, column, masks, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """A column of each line; without MASKED, nothing of it is left out."""
    values = ()
    for i in tl.static_range(7):
        if MASKED:
            values = values + (tl.load(lines[i] + column * CHANNELS, mask=masks[i], other=0.0),)
        else:
            values = values + (tl.load(lines[i] + column * CHANNELS),)
    return values


@triton.jit
def _push(values, following):
    """The columns that are on their way, without the first of them and with a new one."""
    rest = ()
    for i in tl.static_range(len(values) - len(following)):
        rest = rest + (values[i + len(following)],)
    return rest + following


@triton.jit
def _load_added(add, column, wanted, CHANNELS: tl.constexpr, HAS_ADD: tl.constexpr):
    added = 0.0
    if HAS_ADD:
        added = tl.load(add + column * CHANNELS, mask=wanted, other=0.0).to(tl.float32)
    return added


@triton.jit
def _finish(
    value, column, wanted, used, place, line, out_ptr, rstd_ptr, eps,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """Write one column of outputs, normalised over the channels where a program has all of them."""
    if NORMALISED:
        mean = tl.sum(value, axis=1) / CHANNELS
        centred = tl.where(used[None, :], value - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
        value = centred * rstd[:, None]
        first = tl.max(wanted.to(tl.int32), axis=1) > 0
        tl.store(rstd_ptr + line * WIDTH + column, rstd, mask=first)
    tl.store(out_ptr + place + column * CHANNELS, value.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _slide(
    x_ptr, weight_ptr, bias_ptr, add_ptr, out_ptr, rstd_ptr, num_lines, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
    FLIPPED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = CHANNELS % BLOCK != 0
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    used = channel < CHANNELS
    y = row % HEIGHT
    line = tl.minimum(row, num_lines - 1).to(tl.int64)
    masks = (used[None, :],) * 7
    weights = ()
    lines = ()
    for i in tl.static_range(7):
        inside = (y + (i - 3) >= 0) & (y + (i - 3) < HEIGHT) & (row < num_lines)
        near = tl.where(inside, line + (i - 3), line) * (WIDTH * CHANNELS)
        lines = lines + (x_ptr + near[:, None] + channel[None, :],)
        for j in tl.static_range(7):
            tap = i * 7 + j
            if FLIPPED:
                tap = 48 - tap
            weight = tl.load(weight_ptr + tap * CHANNELS + channel, mask=used, other=0.0)
            weights = weights + (tl.where(inside[:, None], weight[None, :], 0.0),)
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_BIAS:
        first += tl.load(bias_ptr + channel, mask=used, other=0.0)[None, :]
    lanes = (row < num_lines)[:, None] & used[None, :]
    place = line[:, None] * (WIDTH * CHANNELS) + channel[None, :]
    # Sums of the output columns from three to the left of the input column to three to its right.
    sums = (first, first, first, first, first, first, first)
    # Columns are asked for AHEAD of their turn, and before the stores of the one at work, which no
    # load may overtake.
    values = ()
    for a in tl.static_range(AHEAD):
        values = values + _load_column(lines, tl.minimum(a, WIDTH - 1), masks, CHANNELS, MASKED)
    for start in range(0, WIDTH, UNROLL):
        for u in tl.static_range(UNROLL):
            column = start + u
            following = _load_column(
                lines, tl.minimum(column + AHEAD, WIDTH - 1), masks, CHANNELS, MASKED
            )
            wanted = lanes
            if u < 3:
                wanted = lanes & (channel * 0 + column >= 3)[None, :]
            added = _load_added(add_ptr + place, column - 3, wanted, CHANNELS, HAS_ADD)
            for i in tl.static_range(7):
                value = values[i].to(tl.float32)
                sums = (
                    sums[0] + weights[i * 7 + 6] * value,
                    sums[1] + weights[i * 7 + 5] * value,
                    sums[2] + weights[i * 7 + 4] * value,
                    sums[3] + weights[i * 7 + 3] * value,
                    sums[4] + weights[i * 7 + 2] * value,
                    sums[5] + weights[i * 7 + 1] * value,
                    sums[6] + weights[i * 7] * value,
                )
            _finish(
                sums[0] + added, column - 3, wanted, used, place, line, out_ptr, rstd_ptr, eps,
                WIDTH, CHANNELS, NORMALISED,
            )  # fmt: skip
            sums = (sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], first)
            values = _push(values, following)
    rest = ()
    for u in tl.static_range(3):
        inside = lanes & (channel * 0 + WIDTH - 3 + u >= 0)[None, :]
        rest = rest + (_load_added(add_ptr + place, WIDTH - 3 + u, inside, CHANNELS, HAS_ADD),)
    for u in tl.static_range(3):
        if WIDTH - 3 + u >= 0:
            _finish(
                sums[u] + rest[u], WIDTH - 3 + u, lanes, used, place, line, out_ptr, rstd_ptr, eps,
                WIDTH, CHANNELS, NORMALISED,
            )  # fmt: skip


@triton.jit
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rstd_ptr, num_lines, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
    NORMALISED: tl.constexpr,
):  # fmt: skip
    """The convolution with its bias; NORMALISED: and LayerNorm over the channels, BLOCK of them."""
    _slide(
        x_ptr, weight_ptr, bias_ptr, x_ptr, out_ptr, rstd_ptr, num_lines, eps,
        HEIGHT, WIDTH, CHANNELS, ROWS, BLOCK, UNROLL, AHEAD, False, True, False, NORMALISED,
    )  # fmt: skip


@triton.jit
def depthwise_input_grad_kernel(
    grad_ptr, weight_ptr, add_ptr, out_ptr, num_lines,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
    HAS_ADD: tl.constexpr,
):  # fmt: skip
    """Gradient of the input: the convolution with the kernel turned round; HAS_ADD: plus `add`."""
    _slide(
        grad_ptr, weight_ptr, grad_ptr, add_ptr, out_ptr, out_ptr, num_lines, 0.0,
        HEIGHT, WIDTH, CHANNELS, ROWS, BLOCK, UNROLL, AHEAD, True, False, HAS_ADD, False,
    )  # fmt: skip


@triton.jit
def _load_grad(grad, lanes, column, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    wanted = lanes & (lanes.to(tl.int32) * 0 + column < WIDTH)
    return tl.load(grad + column * CHANNELS, mask=wanted, other=0.0)


@triton.jit
def depthwise_weight_grad_kernel(
    x_ptr, grad_ptr, part_ptr, num_lines, steps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sums over `steps` times ROWS lines: part (programs, 50, CHANNELS), the bias's last.

    The 49 sums stay in registers over all lines of a program, and a second reduction adds up the
    programs in a fixed order: the same bits every time, without atomics.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = channel < CHANNELS
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = (zero,) * 49
    bias = zero
    for step in range(steps):
        row = (tl.program_id(1) * steps + step) * ROWS + tl.arange(0, ROWS)
        y = row % HEIGHT
        lines = ()
        masks = ()
        for i in tl.static_range(7):
            inside = (y + (i - 3) >= 0) & (y + (i - 3) < HEIGHT) & (row < num_lines)
            near = (row + (i - 3)).to(tl.int64) * (WIDTH * CHANNELS)
            lines = lines + (x_ptr + near[:, None] + channel[None, :],)
            masks = masks + (inside[:, None] & used[None, :],)
        lanes = (row < num_lines)[:, None] & used[None, :]
        grad = grad_ptr + (row.to(tl.int64) * (WIDTH * CHANNELS))[:, None] + channel[None, :]
        # Columns of x that are on their way, AHEAD of their turn.
        values = ()
        for a in tl.static_range(AHEAD):
            values = values + _load_column(lines, tl.minimum(a, WIDTH - 1), masks, CHANNELS, True)
        # Gradients of the output columns from three to the left of the input column onwards, and
        # those that are on their way.
        window = (zero, zero, zero)
        for u in tl.static_range(3):
            window = window + (_load_grad(grad, lanes, u, WIDTH, CHANNELS).to(tl.float32),)
        for i in tl.static_range(3):
            bias += window[i + 3]
        coming = ()
        for a in tl.static_range(AHEAD):
            coming = coming + (_load_grad(grad, lanes, a + 3, WIDTH, CHANNELS),)
        for start in range(0, WIDTH, UNROLL):
            for u in tl.static_range(UNROLL):
                column = start + u
                next_grad = (_load_grad(grad, lanes, column + AHEAD + 3, WIDTH, CHANNELS),)
                next_column = _load_column(
                    lines, tl.minimum(column + AHEAD, WIDTH - 1), masks, CHANNELS, True
                )
                ahead = coming[0].to(tl.float32)
                bias += ahead
                window = window + (ahead,)
                following = ()
                for i in tl.static_range(7):
                    value = values[i].to(tl.float32)
                    for j in tl.static_range(7):
                        following = following + (sums[i * 7 + j] + window[6 - j] * value,)
                sums = following
                window = (window[1], window[2], window[3], window[4], window[5], window[6])
                coming = _push(coming, next_grad)
                values = _push(values, next_column)
    part = part_ptr + tl.program_id(1) * (50 * CHANNELS) + channel
    for tap in tl.static_range(49):
        tl.store(part + tap * CHANNELS, tl.sum(sums[tap], axis=0), mask=used)
    tl.store(part + 49 * CHANNELS, tl.sum(bias, axis=0), mask=used)
