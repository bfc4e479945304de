"""Device code that works on rows of channels, in Triton: LayerNorm, GELU and GRN, their gradients.

In float16 and bfloat16, GELU takes one exponential and no division: the share of a normal
distribution beyond |x| is 2 to a polynomial in |x| (minimax over 0..6, fitted for this), relative
error 1.6e-5, a 30th of what float16 resolves. float32 takes erf.

A sum over rows reads ahead (STAGES) where it computes much for what it reads. Programs that run
side by side read neighbouring memory.
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
        row = (step * tl.num_programs(1) + tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
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


@triton.jit(do_not_specialize=["steps"])  # it depends on the device
def sum_kept_kernel(
    x_ptr, keep_ptr, sums_ptr, num_rows, positions, steps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """Sums of keep x over `steps` times ROWS rows (parts, CHANNELS)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        row = (step * tl.num_programs(1) + tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
        used = (row < num_rows)[:, None] & (channel < CHANNELS)[None, :]
        place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_ptr + place, mask=used, other=0.0).to(tl.float32)
        sums += x * load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
    place = tl.program_id(1) * CHANNELS + channel
    tl.store(sums_ptr + place, tl.sum(sums, axis=0), mask=channel < CHANNELS)


@triton.jit
def _find_part(index, parts, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """(units, part of the positions, image) of a program: neighbours read neighbouring memory."""
    COLUMNS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    unit = index % COLUMNS * BLOCK + tl.arange(0, BLOCK)
    return unit, index // COLUMNS % parts, (index // COLUMNS // parts).to(tl.int64)


@triton.jit(do_not_specialize=["steps", "parts"])  # they depend on the device
def gelu_grn_sums_kernel(
    grad_ptr, h_ptr, bias_ptr, first_ptr, second_ptr, images, positions, steps, parts,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Sums over `steps` times ROWS positions, with a = gelu(h + bias): (parts, images, HIDDEN).

    Forward: of a squared. BACKWARD: of grad times a, and of grad.
    """
    unit, part, image = _find_part(tl.program_id(0), parts, HIDDEN, BLOCK)
    bias = tl.load(bias_ptr + unit, mask=unit < HIDDEN, other=0.0)[None, :]
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        used = (row < positions)[:, None] & (unit < HIDDEN)[None, :]
        place = (image * positions + row)[:, None] * HIDDEN + unit[None, :]
        h = tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32) + bias
        a = gelu(h, h_ptr.dtype.element_ty == tl.float32)
        if BACKWARD:
            grad = tl.load(grad_ptr + place, mask=used, other=0.0).to(tl.float32)
            first += grad * a
            second += grad
        else:
            first += tl.where(used, a * a, 0.0)  # of a row that is none, a is that of the bias
    place = (part.to(tl.int64) * images + image) * HIDDEN + unit
    tl.store(first_ptr + place, tl.sum(first, axis=0), mask=unit < HIDDEN)
    if BACKWARD:
        tl.store(second_ptr + place, tl.sum(second, axis=0), mask=unit < HIDDEN)


@triton.jit
def _mean_energy(squares_ptr, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of the roots of an image's HIDDEN squares, plus eps."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        total += tl.sqrt(tl.load(squares_ptr + unit, mask=unit < HIDDEN, other=0.0))
    return tl.sum(total) / HIDDEN + eps


@triton.jit
def grn_scale_kernel(
    squares_ptr, gamma_ptr, scale_ptr, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GRN's factor of each image and unit, from the sums of squares, both (images, HIDDEN)."""
    start_of_image = tl.program_id(0).to(tl.int64) * HIDDEN
    squares_ptr += start_of_image
    mean = _mean_energy(squares_ptr, eps, HIDDEN, BLOCK)
    for start in range(0, HIDDEN, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        used = unit < HIDDEN
        energy = tl.sqrt(tl.load(squares_ptr + unit, mask=used, other=0.0))
        gamma = tl.load(gamma_ptr + unit, mask=used, other=0.0)
        tl.store(scale_ptr + start_of_image + unit, 1 + gamma * (energy / mean), mask=used)


@triton.jit
def grn_slope_kernel(
    squares_ptr, products_ptr, totals_ptr, gamma_ptr, keep_ptr, scale_ptr, slope_ptr, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """keep times GRN's factor, and what a's gradient has besides grad times that, divided by a.

    products and totals, sums of grad times a and of grad, become the image's part of the gradients
    of gamma and beta. All are (images, HIDDEN).
    """
    image = tl.program_id(0)
    start_of_image = image.to(tl.int64) * HIDDEN
    squares_ptr += start_of_image
    products_ptr += start_of_image
    totals_ptr += start_of_image
    keep = tl.load(keep_ptr + image) if HAS_KEEP else 1.0
    mean = _mean_energy(squares_ptr, eps, HIDDEN, BLOCK)
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        used = unit < HIDDEN
        energy = tl.sqrt(tl.load(squares_ptr + unit, mask=used, other=0.0))
        product = tl.load(products_ptr + unit, mask=used, other=0.0)
        gamma = tl.load(gamma_ptr + unit, mask=used, other=0.0)
        along += gamma * product * (energy / mean)
    common = tl.sum(along) / HIDDEN
    for start in range(0, HIDDEN, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        used = unit < HIDDEN
        energy = tl.sqrt(tl.load(squares_ptr + unit, mask=used, other=0.0))
        product = tl.load(products_ptr + unit, mask=used, other=0.0)
        total = tl.load(totals_ptr + unit, mask=used, other=0.0)
        gamma = tl.load(gamma_ptr + unit, mask=used, other=0.0)
        share = energy / mean
        slope = keep * (gamma * product - common) / mean / tl.where(energy > 0, energy, 1.0)
        place = start_of_image + unit
        tl.store(scale_ptr + place, keep * (1 + gamma * share), mask=used)
        tl.store(slope_ptr + place, tl.where(energy > 0, slope, 0.0), mask=used)
        tl.store(products_ptr + unit, keep * share * product, mask=used)
        tl.store(totals_ptr + unit, keep * total, mask=used)


@triton.jit
def gelu_grn_kernel(
    h_ptr, bias_ptr, scale_ptr, beta_ptr, keep_ptr, out_ptr, positions,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """keep (gelu(h + bias) scale + beta); scale is (images, HIDDEN)."""
    parts = tl.cdiv(positions, ROWS)
    unit, part, image = _find_part(tl.program_id(0), parts, HIDDEN, BLOCK)
    row = part * ROWS + tl.arange(0, ROWS)
    lane = unit < HIDDEN
    used = (row < positions)[:, None] & lane[None, :]
    place = (image * positions + row)[:, None] * HIDDEN + unit[None, :]
    bias = tl.load(bias_ptr + unit, mask=lane, other=0.0)[None, :]
    keep = tl.load(keep_ptr + image) if HAS_KEEP else 1.0
    scale = keep * tl.load(scale_ptr + image * HIDDEN + unit, mask=lane, other=0.0)[None, :]
    beta = keep * tl.load(beta_ptr + unit, mask=lane, other=0.0)[None, :]
    h = tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32) + bias
    out = gelu(h, h_ptr.dtype.element_ty == tl.float32) * scale + beta
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["steps", "parts"])  # they depend on the device
def gelu_grn_backward_kernel(
    grad_ptr, h_ptr, bias_ptr, scale_ptr, slope_ptr, dh_ptr, sums_ptr, positions, steps, parts,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dh = (grad scale + a slope) gelu'(h + bias); scale and slope are (images, HIDDEN).

    And sums of dh over `steps` times ROWS positions of an image (images x parts, HIDDEN).
    """
    unit, part, image = _find_part(tl.program_id(0), parts, HIDDEN, BLOCK)
    lane = unit < HIDDEN
    bias = tl.load(bias_ptr + unit, mask=lane, other=0.0)[None, :]
    scale = tl.load(scale_ptr + image * HIDDEN + unit, mask=lane, other=0.0)[None, :]
    slope = tl.load(slope_ptr + image * HIDDEN + unit, mask=lane, other=0.0)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        used = (row < positions)[:, None] & lane[None, :]
        place = (image * positions + row)[:, None] * HIDDEN + unit[None, :]
        grad = tl.load(grad_ptr + place, mask=used, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32) + bias
        a, da = gelu_and_slope(h, h_ptr.dtype.element_ty == tl.float32)
        dh = tl.where(used, (grad * scale + a * slope) * da, 0.0)
        sums += dh
        tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=used)
    place = (image * parts + part) * HIDDEN + unit
    tl.store(sums_ptr + place, tl.sum(sums, axis=0), mask=lane)
