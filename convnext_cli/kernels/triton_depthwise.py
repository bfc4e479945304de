"""Device code of the 7x7 depthwise convolution over NHWC, in Triton.

A thread owns one channel of `LINES` neighbouring lines of an image and slides along them: of each
input column it reads LINES + 6 values, once, and each goes into the seven output columns around it
and into the lines whose windows it lies in. Those 7 x LINES sums and the 49 weights stay in
registers. So an output costs (LINES + 6) / LINES loads instead of 49, and between two columns there
are 49 LINES multiply-adds, time enough for the loads of the next one.

Shapes: x and out (lines, WIDTH, CHANNELS), where a line is a row of pixels of one image, HEIGHT of
them each; weights (49, CHANNELS) and biases (CHANNELS) in float32. A group is LINES lines of one
image, its last one fewer where LINES does not divide HEIGHT. A program has ROWS groups and BLOCK
channels. UNROLL divides WIDTH.
"""

import triton
import triton.language as tl


@triton.jit
def _find_group(
    index, num_groups,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    LINES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(channels, are they real, are the groups, their first lines in an image, where they begin).

    What is not real is read as the last one that is.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = channel < CHANNELS
    if CHANNELS % BLOCK != 0:
        channel = tl.minimum(channel, CHANNELS - 1)
    asked = index * ROWS + tl.arange(0, ROWS)
    group = tl.minimum(asked, num_groups - 1)
    PER_IMAGE: tl.constexpr = (HEIGHT + LINES - 1) // LINES
    y = group % PER_IMAGE * LINES
    line = (group // PER_IMAGE).to(tl.int64) * HEIGHT + y
    place = line[:, None] * (WIDTH * CHANNELS) + channel[None, :]
    return channel, used, asked < num_groups, y, place


@triton.jit
def _find_inside(y, HEIGHT: tl.constexpr, LINES: tl.constexpr):
    """Which groups have each of the lines from three above them to three below in their image."""
    masks = ()
    for k in tl.static_range(LINES + 6):
        if k < 3 and LINES >= 3:
            inside = y > 0  # y is a multiple of LINES: one condition for all three
        elif k >= LINES + 3 and LINES >= 3 and HEIGHT % LINES == 0:
            inside = y + LINES < HEIGHT
        else:
            inside = (y + (k - 3) >= 0) & (y + (k - 3) < HEIGHT)
        masks = masks + (inside[:, None],)
    return masks


@triton.jit
def _load_column(
    first, masks, column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """A column of the lines from three above a group to three below; 0 outside of its image."""
    values = ()
    for k in tl.static_range(LINES + 6):
        if LINES == HEIGHT and (k < 3 or k >= LINES + 3):
            values = values + (0.0,)
        elif HEIGHT % LINES == 0 and k >= 3 and k < LINES + 3:
            values = values + (tl.load(first + ((k - 3) * WIDTH + column) * CHANNELS),)
        else:
            pointers = first + ((k - 3) * WIDTH + column) * CHANNELS
            values = values + (tl.load(pointers, mask=masks[k], other=0.0),)
    return values


@triton.jit
def _load_lines(
    first, column, wanted, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr
):
    """A column of the lines of a group."""
    values = ()
    for p in tl.static_range(LINES):
        pointers = first + (p * WIDTH + column) * CHANNELS
        values = values + (tl.load(pointers, mask=wanted[p], other=0.0),)
    return values


@triton.jit
def _shift(window, following, LINES: tl.constexpr):
    """Seven columns of each line, moved on by one."""
    moved = ()
    for p in tl.static_range(LINES):
        for t in tl.static_range(6):
            moved = moved + (window[p * 7 + t + 1],)
        moved = moved + (following[p],)
    return moved


@triton.jit
def _add_column(sums, weights, values, HEIGHT: tl.constexpr, LINES: tl.constexpr):
    """Each sum of a line's seven output columns plus what an input column gives."""
    for k in tl.static_range(LINES + 6):
        if LINES != HEIGHT or (k >= 3 and k < LINES + 3):
            value = values[k].to(tl.float32)
            following = ()
            for p in tl.static_range(LINES):
                for t in tl.static_range(7):
                    total = sums[p * 7 + t]
                    if k >= p and k < p + 7:
                        total = total + weights[(k - p) * 7 + 6 - t] * value
                    following = following + (total,)
            sums = following
    return sums


@triton.jit
def _store_column(
    sums, t: tl.constexpr, added, first, column, wanted,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """Write column `t` of the sums."""
    for p in tl.static_range(LINES):
        value = sums[p * 7 + t]
        if HAS_ADD:
            value += added[p].to(tl.float32)
        pointers = first + (p * WIDTH + column) * CHANNELS
        tl.store(pointers, value.to(first.dtype.element_ty), mask=wanted[p])


@triton.jit
def _slide(
    x_ptr, weight_ptr, bias_ptr, add_ptr, out_ptr, num_groups,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    FLIPPED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    channel, used, real, y, place = _find_group(
        tl.program_id(1), num_groups, HEIGHT, WIDTH, CHANNELS, LINES, ROWS, BLOCK
    )
    masks = _find_inside(y, HEIGHT, LINES)
    weights = ()
    for i in tl.static_range(49):
        tap = 48 - i if FLIPPED else i
        weights = weights + (tl.load(weight_ptr + tap * CHANNELS + channel)[None, :],)
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_BIAS:
        first += tl.load(bias_ptr + channel)[None, :]
    lanes = ()
    for p in tl.static_range(LINES):
        lane = real[:, None] & used[None, :]
        if HEIGHT % LINES != 0:
            lane = lane & (y + p < HEIGHT)[:, None]
        lanes = lanes + (lane,)
    # Sums of the output columns from three to the left of the input column to three to its right.
    sums = (first,) * (7 * LINES)
    firsts = (first,) * LINES
    # A column is asked for before its turn, and before the stores of the one at work, which no load
    # may overtake.
    values = _load_column(x_ptr + place, masks, 0, HEIGHT, WIDTH, CHANNELS, LINES)
    for start in range(0, WIDTH, UNROLL):
        for u in tl.static_range(UNROLL):
            column = start + u
            following = _load_column(
                x_ptr + place, masks, tl.minimum(column + 1, WIDTH - 1),
                HEIGHT, WIDTH, CHANNELS, LINES,
            )  # fmt: skip
            wanted = lanes
            if u < 3:
                wanted = ()
                for p in tl.static_range(LINES):
                    wanted = wanted + (lanes[p] & (channel * 0 + column >= 3)[None, :],)
            added = firsts
            if HAS_ADD:
                added = _load_lines(add_ptr + place, column - 3, wanted, WIDTH, CHANNELS, LINES)
            sums = _add_column(sums, weights, values, HEIGHT, LINES)
            _store_column(
                sums, 0, added, out_ptr + place, column - 3, wanted,
                WIDTH, CHANNELS, LINES, HAS_ADD,
            )  # fmt: skip
            sums = _shift(sums, firsts, LINES)
            values = following
    for u in tl.static_range(3):
        if WIDTH - 3 + u >= 0:
            added = firsts
            if HAS_ADD:
                added = _load_lines(add_ptr + place, WIDTH - 3 + u, lanes, WIDTH, CHANNELS, LINES)
            _store_column(
                sums, u, added, out_ptr + place, WIDTH - 3 + u, lanes,
                WIDTH, CHANNELS, LINES, HAS_ADD,
            )  # fmt: skip


@triton.jit
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_groups,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The convolution with its bias."""
    _slide(
        x_ptr, weight_ptr, bias_ptr, x_ptr, out_ptr, num_groups,
        HEIGHT, WIDTH, CHANNELS, LINES, ROWS, BLOCK, UNROLL, False, True, False,
    )  # fmt: skip


@triton.jit
def depthwise_input_grad_kernel(
    grad_ptr, weight_ptr, add_ptr, out_ptr, num_groups,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """Gradient of the input: the convolution with the kernel turned round; HAS_ADD: plus `add`."""
    _slide(
        grad_ptr, weight_ptr, grad_ptr, add_ptr, out_ptr, num_groups,
        HEIGHT, WIDTH, CHANNELS, LINES, ROWS, BLOCK, UNROLL, True, False, HAS_ADD,
    )  # fmt: skip


@triton.jit
def _load_grads(
    grad, column, lanes, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr
):
    """A column of the lines of a group; 0 to the right of the image."""
    wanted = ()
    for p in tl.static_range(LINES):
        wanted = wanted + (lanes[p] & (lanes[p].to(tl.int32) * 0 + column < WIDTH),)
    return _load_lines(grad, column, wanted, WIDTH, CHANNELS, LINES)


@triton.jit(do_not_specialize=["steps"])  # it depends on the device
def depthwise_weight_grad_kernel(
    x_ptr, grad_ptr, part_ptr, num_groups, steps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums over `steps` times ROWS groups: part (programs, 50, CHANNELS), the bias's last.

    The 49 sums stay in registers over all groups of a program, and a second reduction adds up the
    programs in a fixed order: the same bits every time, without atomics.
    """
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = (zero,) * 49
    bias = zero
    for step in range(steps):
        channel, used, real, y, place = _find_group(
            tl.program_id(1) * steps + step, num_groups,
            HEIGHT, WIDTH, CHANNELS, LINES, ROWS, BLOCK,
        )  # fmt: skip
        masks = _find_inside(y, HEIGHT, LINES)
        lanes = ()
        for p in tl.static_range(LINES):
            lanes = lanes + ((real & (y + p < HEIGHT))[:, None],)
        values = _load_column(x_ptr + place, masks, 0, HEIGHT, WIDTH, CHANNELS, LINES)
        # Gradients of the output columns from four to the left of the input column to two to its
        # right, and those that come next.
        window = (zero,) * (7 * LINES)
        for u in tl.static_range(3):
            loaded = _load_grads(grad_ptr + place, u, lanes, WIDTH, CHANNELS, LINES)
            wide = ()
            for p in tl.static_range(LINES):
                wide = wide + (loaded[p].to(tl.float32),)
                bias += wide[p]
            window = _shift(window, wide, LINES)
        coming = _load_grads(grad_ptr + place, 3, lanes, WIDTH, CHANNELS, LINES)
        for start in range(0, WIDTH, UNROLL):
            for u in tl.static_range(UNROLL):
                column = start + u
                next_grads = _load_grads(
                    grad_ptr + place, column + 4, lanes, WIDTH, CHANNELS, LINES
                )
                next_column = _load_column(
                    x_ptr + place, masks, tl.minimum(column + 1, WIDTH - 1),
                    HEIGHT, WIDTH, CHANNELS, LINES,
                )  # fmt: skip
                wide = ()
                for p in tl.static_range(LINES):
                    wide = wide + (coming[p].to(tl.float32),)
                    bias += wide[p]
                window = _shift(window, wide, LINES)
                sums = _add_products(sums, window, values, HEIGHT, LINES)
                coming = next_grads
                values = next_column
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = channel < CHANNELS
    part = part_ptr + tl.program_id(1) * (50 * CHANNELS) + channel
    for tap in tl.static_range(49):
        tl.store(part + tap * CHANNELS, tl.sum(sums[tap], axis=0), mask=used)
    tl.store(part + 49 * CHANNELS, tl.sum(bias, axis=0), mask=used)


@triton.jit
def _add_products(sums, window, values, HEIGHT: tl.constexpr, LINES: tl.constexpr):
    """Each of the 49 sums plus what an input column gives, as in `_add_column`."""
    for k in tl.static_range(LINES + 6):
        if LINES != HEIGHT or (k >= 3 and k < LINES + 3):
            value = values[k].to(tl.float32)
            following = ()
            for i in tl.static_range(7):
                for j in tl.static_range(7):
                    total = sums[i * 7 + j]
                    if k >= i and k < i + LINES:
                        total = total + window[(k - i) * 7 + 6 - j] * value
                    following = following + (total,)
            sums = following
    return sums
