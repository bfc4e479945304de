"""Device code that works on rows of channels: LayerNorm and its gradient, GELU with GRN, in Triton.

In float16 and bfloat16, GELU takes one exponential and no division: the share of a normal
distribution beyond |x| is 2 to a polynomial in |x| (minimax over 0..6, fitted for this), relative
error 1.6e-5, a 30th of what float16 resolves. float32 takes erf.
"""

import triton
import triton.language as tl


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """The share of a standard normal below x."""
    if EXACT:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    size = tl.abs(x)
    power = 5.439471351564862e-05 - 1.5075017927301815e-06 * size
    power = -0.0008681504405103624 + power * size
    power = 0.008239147253334522 + power * size
    power = -0.05336114019155502 + power * size
    power = -0.45911088585853577 + power * size
    power = -1.1509780883789062 + power * size
    tail = tl.exp2(-1.0000174045562744 + power * size)
    return tl.where(x > 0, 1 - tail, tail)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU of float32 values; EXACT: to float32's precision."""
    return x * _normal_cdf(x, EXACT)


@triton.jit
def gelu_and_slope(x, EXACT: tl.constexpr):
    """GELU of float32 values and its derivative."""
    below = _normal_cdf(x, EXACT)
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    return x * below, below + x * density


@triton.jit
def load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP: tl.constexpr):
    """Drop path's factor of each row's image, of `positions` rows; without HAS_KEEP, 1."""
    factor = tl.full((row.shape[0],), 1.0, tl.float32)
    if HAS_KEEP:
        factor = tl.load(keep_ptr + row // positions, mask=row < num_rows, other=0.0)
    return factor


@triton.jit
def normalise_kernel(
    x_ptr, out_ptr, rstd_ptr, num_rows, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LayerNorm without its affine part: (rows, CHANNELS) to the same, and 1 / std (rows)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    used = (row < num_rows)[:, None] & (channel < CHANNELS)[None, :]
    place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    x = tl.load(x_ptr + place, mask=used, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / CHANNELS
    centred = tl.where(used, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
    out = (centred * rstd[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=used)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)


@triton.jit
def normalise_backward_kernel(
    grad_ptr, xhat_ptr, rstd_ptr, out_ptr, num_rows,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of what was normalised, from that of the result."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    used = (row < num_rows)[:, None] & (channel < CHANNELS)[None, :]
    place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    grad = tl.load(grad_ptr + place, mask=used, other=0.0).to(tl.float32)
    xhat = tl.load(xhat_ptr + place, mask=used, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
    mean = tl.sum(grad, axis=1) / CHANNELS
    along = tl.sum(grad * xhat, axis=1) / CHANNELS
    out = rstd[:, None] * (grad - mean[:, None] - xhat * along[:, None])
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def gelu_kernel(
    h_ptr, bias_ptr, keep_ptr, out_ptr, num_rows, positions,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """keep gelu(h + bias); keep is of each image, of `positions` rows."""
    COLUMNS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK  # on the axis of the rows: see `launch`
    unit = tl.program_id(0) % COLUMNS * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // COLUMNS * ROWS + tl.arange(0, ROWS)
    used = (row < num_rows)[:, None] & (unit < HIDDEN)[None, :]
    place = row.to(tl.int64)[:, None] * HIDDEN + unit[None, :]
    bias = tl.load(bias_ptr + unit, mask=unit < HIDDEN, other=0.0)[None, :]
    h = tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32) + bias
    keep = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
    a = gelu(h, h_ptr.dtype.element_ty == tl.float32) * keep
    tl.store(out_ptr + place, a.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["steps"])  # it depends on the device
def gelu_backward_kernel(
    grad_ptr, h_ptr, bias_ptr, keep_ptr, out_ptr, part_ptr, num_rows, positions, steps,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """dh = grad keep gelu'(h + bias), and its sums over `steps` times ROWS rows (parts, HIDDEN)."""
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + unit, mask=unit < HIDDEN, other=0.0)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(steps):
        row = (tl.program_id(1) * steps + step) * ROWS + tl.arange(0, ROWS)
        used = (row < num_rows)[:, None] & (unit < HIDDEN)[None, :]
        place = row.to(tl.int64)[:, None] * HIDDEN + unit[None, :]
        grad = tl.load(grad_ptr + place, mask=used, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32) + bias
        keep = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
        _a, slope = gelu_and_slope(h, h_ptr.dtype.element_ty == tl.float32)
        dh = grad * keep * slope
        sums += dh
        tl.store(out_ptr + place, dh.to(out_ptr.dtype.element_ty), mask=used)
    place = tl.program_id(1) * HIDDEN + unit
    tl.store(part_ptr + place, tl.sum(sums, axis=0), mask=unit < HIDDEN)


@triton.jit
def gelu_grn_sums_kernel(
    h_ptr, grad_ptr, first_ptr, second_ptr, positions,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Sums over the positions of an image, with a = gelu(h), each (images, HIDDEN).

    Forward: of a squared. BACKWARD: of grad times a, and of grad.
    """
    EXACT: tl.constexpr = h_ptr.dtype.element_ty == tl.float32
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, positions, ROWS):
        row = start + tl.arange(0, ROWS)
        used = (row < positions)[:, None] & (channel < HIDDEN)[None, :]
        place = (image * positions + row)[:, None] * HIDDEN + channel[None, :]
        a = gelu(tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32), EXACT)
        if BACKWARD:
            grad = tl.load(grad_ptr + place, mask=used, other=0.0).to(tl.float32)
            first += grad * a
            second += grad
        else:
            first += a * a
    place = image * HIDDEN + channel
    tl.store(first_ptr + place, tl.sum(first, axis=0), mask=channel < HIDDEN)
    if BACKWARD:
        tl.store(second_ptr + place, tl.sum(second, axis=0), mask=channel < HIDDEN)


@triton.jit
def gelu_grn_backward_kernel(
    h_ptr, grad_ptr, scale_ptr, shift_ptr, slope_ptr, dh_ptr, act_ptr, positions,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dh = (grad scale + a slope) gelu'(h), and again the output a scale + shift.

    scale, slope and shift are (images, HIDDEN).
    """
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    lane = channel < HIDDEN
    used = (row < positions)[:, None] & lane[None, :]
    place = (image * positions + row)[:, None] * HIDDEN + channel[None, :]
    scale = tl.load(scale_ptr + image * HIDDEN + channel, mask=lane, other=0.0)[None, :]
    slope = tl.load(slope_ptr + image * HIDDEN + channel, mask=lane, other=0.0)[None, :]
    shift = tl.load(shift_ptr + image * HIDDEN + channel, mask=lane, other=0.0)[None, :]
    grad = tl.load(grad_ptr + place, mask=used, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32)
    a, da = gelu_and_slope(h, h_ptr.dtype.element_ty == tl.float32)
    dh = (grad * scale + a * slope) * da
    tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=used)
    tl.store(act_ptr + place, (a * scale + shift).to(act_ptr.dtype.element_ty), mask=used)
