"""Device code of a block's network over channels, in Triton.

```
kept        h = xhat w1' + b1 is kept: matrix products whose operand or result is changed on its way
              mlp_project_kernel       x + keep gamma (act(h) w2' + b2)
              mlp_hidden_grad_kernel   gradient of h, and gelu(h) again
              mlp_kept_grad_kernel     gradient of h, and those of both matrices and b1 with it
recomputed  h lives in registers only, a tile at a time, and is computed again in the backward pass
              mlp_forward_kernel       output from xhat; stores h too, where it is kept
              mlp_input_grad_kernel    gradient of what LayerNorm normalised
              mlp_weight_grad_kernel   gradients of both matrices and biases
```

Shapes: rows are pixels of all images, `positions` of each image; xhat, x, grad (rows, CHANNELS); h
(rows, HIDDEN); w1 (HIDDEN, CHANNELS), w2 (CHANNELS, HIDDEN), as nn.Linear holds them; biases and
gamma float32; keep (images) is the factor of drop path. Sums are float32. CHANNELS is cut in pieces
of TILE, a power of two that divides it, because 96 and 384 are none.
"""

import triton
import triton.language as tl

from convnext_cli.kernels.triton_rows import gelu, gelu_and_slope, load_factor


@triton.jit
def _load_gamma(gamma_ptr, channel, HAS_GAMMA: tl.constexpr):
    gamma = tl.full((channel.shape[0],), 1.0, tl.float32)
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + channel)
    return gamma


@triton.jit
def _list_channels(k: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """Channels of piece k, of which the last one may be narrower than TILE."""
    WIDTH: tl.constexpr = TILE if k < CHANNELS // TILE else CHANNELS % TILE
    return k * TILE + tl.arange(0, WIDTH)


@triton.jit
def _add_products(
    a, sums, w2_ptr, first, unit,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + a w2' for WIDTH channels from the first on, a piece each."""
    following = ()
    for k in tl.static_range(len(sums)):
        channel = first + _list_channels(k, WIDTH, TILE)
        w2 = tl.load(w2_ptr + channel[:, None] * HIDDEN + unit[None, :])
        out = tl.dot(a, tl.trans(w2), sums[k], input_precision=PRECISION)
        following = following + (out,)
    return following


@triton.jit
def _store_output(
    sums, b2_ptr, gamma_ptr, factor, x_ptr, out_ptr, first, row, used,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, HAS_GAMMA: tl.constexpr,
):  # fmt: skip
    """out = x + factor gamma (sums + b2) for WIDTH channels from the first on, a piece each."""
    for k in tl.static_range(len(sums)):
        channel = first + _list_channels(k, WIDTH, TILE)
        place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        gamma = _load_gamma(gamma_ptr, channel, HAS_GAMMA)
        out = (sums[k] + tl.load(b2_ptr + channel)[None, :]) * gamma[None, :] * factor
        out += tl.load(x_ptr + place, mask=used, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def mlp_forward_kernel(
    xhat_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, gamma_ptr, keep_ptr, x_ptr, out_ptr, h_ptr,
    num_rows, positions,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    STORE_H: tl.constexpr,
):  # fmt: skip
    """out = x + keep gamma (gelu(h) w2' + b2); h = xhat w1' + b1, rounded where it is stored."""
    PIECES: tl.constexpr = (CHANNELS + TILE - 1) // TILE
    dtype = xhat_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = (row < num_rows)[:, None]
    inputs = ()
    sums = ()
    for k in tl.static_range(PIECES):
        channel = _list_channels(k, CHANNELS, TILE)
        place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        inputs = inputs + (tl.load(xhat_ptr + place, mask=used, other=0.0),)
        sums = sums + (tl.zeros((ROWS, channel.shape[0]), tl.float32),)
    for start in range(0, HIDDEN, UNITS):
        unit = start + tl.arange(0, UNITS)
        h = tl.zeros((ROWS, UNITS), tl.float32)
        for k in tl.static_range(PIECES):
            channel = _list_channels(k, CHANNELS, TILE)
            w1 = tl.load(w1_ptr + unit[:, None] * CHANNELS + channel[None, :])
            h = tl.dot(inputs[k], tl.trans(w1), h, input_precision=PRECISION)
        h += tl.load(b1_ptr + unit)[None, :]
        if STORE_H:
            narrow = h.to(dtype)
            tl.store(h_ptr + row.to(tl.int64)[:, None] * HIDDEN + unit[None, :], narrow, mask=used)
            h = narrow.to(tl.float32)
        a = gelu(h, dtype == tl.float32).to(dtype)
        sums = _add_products(a, sums, w2_ptr, 0, unit, CHANNELS, HIDDEN, TILE, PRECISION)
    factor = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
    _store_output(
        sums, b2_ptr, gamma_ptr, factor, x_ptr, out_ptr, 0, row, used,
        CHANNELS, CHANNELS, TILE, HAS_GAMMA,
    )  # fmt: skip


@triton.jit
def mlp_input_grad_kernel(
    grad_ptr, xhat_ptr, rstd_ptr, w1_ptr, b1_ptr, w2_ptr, gamma_ptr, keep_ptr, out_ptr,
    num_rows, positions,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of what LayerNorm normalised to xhat, from that of the block's output."""
    PIECES: tl.constexpr = CHANNELS // TILE
    dtype = xhat_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, TILE)
    used = (row < num_rows)[:, None]
    place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    factor = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
    inputs = ()
    grads = ()
    sums = ()
    for k in tl.static_range(PIECES):
        inputs = inputs + (tl.load(xhat_ptr + place + k * TILE, mask=used, other=0.0),)
        grad = tl.load(grad_ptr + place + k * TILE, mask=used, other=0.0).to(tl.float32)
        gamma = _load_gamma(gamma_ptr, channel + k * TILE, HAS_GAMMA)
        grads = grads + ((grad * factor * gamma[None, :]).to(dtype),)
        sums = sums + (tl.zeros((ROWS, TILE), tl.float32),)
    for start in range(0, HIDDEN, UNITS):
        unit = start + tl.arange(0, UNITS)
        h = tl.zeros((ROWS, UNITS), tl.float32)
        da = tl.zeros((ROWS, UNITS), tl.float32)
        for k in tl.static_range(PIECES):
            w1 = tl.load(w1_ptr + unit[:, None] * CHANNELS + channel[None, :] + k * TILE)
            w2 = tl.load(w2_ptr + (channel[:, None] + k * TILE) * HIDDEN + unit[None, :])
            h = tl.dot(inputs[k], tl.trans(w1), h, input_precision=PRECISION)
            da = tl.dot(grads[k], w2, da, input_precision=PRECISION)
        _a, slope = gelu_and_slope(h + tl.load(b1_ptr + unit)[None, :], dtype == tl.float32)
        dh = (da * slope).to(dtype)
        following = ()
        for k in tl.static_range(PIECES):
            w1 = tl.load(w1_ptr + unit[:, None] * CHANNELS + channel[None, :] + k * TILE)
            following = following + (tl.dot(dh, w1, sums[k], input_precision=PRECISION),)
        sums = following
    mean = tl.zeros((ROWS,), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    for k in tl.static_range(PIECES):
        mean += tl.sum(sums[k], axis=1) / CHANNELS
        along += tl.sum(sums[k] * inputs[k].to(tl.float32), axis=1) / CHANNELS
    rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    for k in tl.static_range(PIECES):
        xhat = inputs[k].to(tl.float32)
        out = rstd * (sums[k] - mean[:, None] - xhat * along[:, None])
        tl.store(out_ptr + place + k * TILE, out.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["steps"])  # it depends on the device
def mlp_weight_grad_kernel(
    grad_ptr, xhat_ptr, w1_ptr, b1_ptr, w2_ptr, gamma_ptr, keep_ptr,
    dw1_ptr, dw2_ptr, db1_ptr, db2_ptr, num_rows, positions, steps,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):  # fmt: skip
    """Sums over `steps` times ROWS rows, of UNITS hidden units: one part a program.

    gamma is multiplied by LIFT on its way into w2. dw1 and dw2 are (parts, HIDDEN, CHANNELS), db1
    (parts, HIDDEN), db2 (parts, CHANNELS). What belongs to w2 and b2 leaves gamma out, which makes
    gamma's gradient a small product of weights.
    """
    PIECES: tl.constexpr = CHANNELS // TILE
    dtype = xhat_ptr.dtype.element_ty
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    part = tl.program_id(1)
    channel = tl.arange(0, TILE)
    b1 = tl.load(b1_ptr + unit)[:, None]
    matrices1 = ()
    matrices2 = ()
    dw1 = ()
    dw2 = ()
    db2 = ()
    for k in tl.static_range(PIECES):
        w1 = tl.load(w1_ptr + unit[:, None] * CHANNELS + channel[None, :] + k * TILE)
        w2 = tl.load(w2_ptr + (channel[None, :] + k * TILE) * HIDDEN + unit[:, None])
        gamma = _load_gamma(gamma_ptr, channel + k * TILE, HAS_GAMMA)[None, :]
        matrices1 = matrices1 + (w1,)
        matrices2 = matrices2 + ((w2.to(tl.float32) * (gamma * LIFT)).to(dtype),)
        dw1 = dw1 + (tl.zeros((UNITS, TILE), tl.float32),)
        dw2 = dw2 + (tl.zeros((UNITS, TILE), tl.float32),)
        db2 = db2 + (tl.zeros((TILE,), tl.float32),)
    db1 = tl.zeros((UNITS,), tl.float32)
    for step in range(steps):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        used = (row < num_rows)[:, None]
        place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        factor = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
        # Units are the rows of these, so that they go into the next products from registers.
        h = tl.zeros((UNITS, ROWS), tl.float32)
        da = tl.zeros((UNITS, ROWS), tl.float32)
        inputs = ()
        grads = ()
        nextb = ()
        for k in tl.static_range(PIECES):
            xhat = tl.load(xhat_ptr + place + k * TILE, mask=used, other=0.0)
            grad = tl.load(grad_ptr + place + k * TILE, mask=used, other=0.0)
            kept = grad.to(tl.float32) * factor
            nextb = nextb + (db2[k] + tl.sum(kept, axis=0),)
            if HAS_KEEP:
                grad = kept.to(dtype)
            h = tl.dot(matrices1[k], tl.trans(xhat), h, input_precision=PRECISION)
            da = tl.dot(matrices2[k], tl.trans(grad), da, input_precision=PRECISION)
            inputs = inputs + (xhat,)
            grads = grads + (grad,)
        a, slope = gelu_and_slope(h + b1, dtype == tl.float32)
        dh = da * slope * (1 / LIFT)
        db1 += tl.sum(dh, axis=1)
        next1 = ()
        next2 = ()
        for k in tl.static_range(PIECES):
            out1 = tl.dot(dh.to(dtype), inputs[k], dw1[k], input_precision=PRECISION)
            out2 = tl.dot(a.to(dtype), grads[k], dw2[k], input_precision=PRECISION)
            next1 = next1 + (out1,)
            next2 = next2 + (out2,)
        dw1 = next1
        dw2 = next2
        db2 = nextb
    place = (part * HIDDEN + unit)[:, None] * CHANNELS + channel[None, :]
    for k in tl.static_range(PIECES):
        tl.store(dw1_ptr + place + k * TILE, dw1[k])
        tl.store(dw2_ptr + place + k * TILE, dw2[k])
        if tl.program_id(0) == 0:
            tl.store(db2_ptr + part * CHANNELS + channel + k * TILE, db2[k])
    tl.store(db1_ptr + part * HIDDEN + unit, db1)


@triton.jit
def mlp_project_kernel(
    h_ptr, w2_ptr, b2_ptr, gamma_ptr, keep_ptr, x_ptr, out_ptr, num_rows, positions,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PIECES: tl.constexpr, UNITS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x + keep gamma (gelu(h) w2' + b2)."""
    COLUMNS: tl.constexpr = CHANNELS // (PIECES * TILE)  # on the axis of the rows: see `launch`
    dtype = h_ptr.dtype.element_ty
    row = tl.program_id(0) // COLUMNS * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % COLUMNS * PIECES * TILE
    used = (row < num_rows)[:, None]
    place = row.to(tl.int64)[:, None] * HIDDEN
    sums = ()
    for _k in tl.static_range(PIECES):
        sums = sums + (tl.zeros((ROWS, TILE), tl.float32),)
    for start in range(0, HIDDEN, UNITS):
        unit = start + tl.arange(0, UNITS)
        h = tl.load(h_ptr + place + unit[None, :], mask=used, other=0.0)
        a = gelu(h.to(tl.float32), dtype == tl.float32).to(dtype)
        sums = _add_products(a, sums, w2_ptr, first, unit, PIECES * TILE, HIDDEN, TILE, PRECISION)
    factor = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
    _store_output(
        sums, b2_ptr, gamma_ptr, factor, x_ptr, out_ptr, first, row, used,
        PIECES * TILE, CHANNELS, TILE, HAS_GAMMA,
    )  # fmt: skip


@triton.jit
def mlp_hidden_grad_kernel(
    grad_ptr, h_ptr, w2_ptr, keep_ptr, dh_ptr, act_ptr, db1_ptr, num_rows, positions,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr, LIFT: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh = (keep grad w2) gelu'(h); keep gelu(h); parts of dh's sum (programs, HIDDEN).

    w2 has gamma in it already, and is LIFT times as large: nothing changes an operand of the
    product on its way, which every program of the same rows would do again.
    """
    COLUMNS: tl.constexpr = HIDDEN // UNITS  # on the axis of the rows: see `launch`
    dtype = h_ptr.dtype.element_ty
    part = tl.program_id(0) // COLUMNS
    unit = tl.program_id(0) % COLUMNS * UNITS + tl.arange(0, UNITS)
    row = part * ROWS + tl.arange(0, ROWS)
    used = (row < num_rows)[:, None]
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, CHANNELS, TILE):
        channel = start + tl.arange(0, TILE)
        place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        grad = tl.load(grad_ptr + place, mask=used, other=0.0)
        w2 = tl.load(w2_ptr + channel[:, None] * HIDDEN + unit[None, :])
        total = tl.dot(grad, w2, total, input_precision=PRECISION)
    factor = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[:, None]
    place = row.to(tl.int64)[:, None] * HIDDEN + unit[None, :]
    h = tl.load(h_ptr + place, mask=used, other=0.0).to(tl.float32)
    h += total * 0  # it lies as the product does then; else GELU would be computed in both orders
    a, slope = gelu_and_slope(h, dtype == tl.float32)
    dh = total * (factor / LIFT) * slope
    tl.store(dh_ptr + place, dh.to(dtype), mask=used)
    tl.store(act_ptr + place, (a * factor).to(dtype), mask=used)
    tl.store(db1_ptr + part * HIDDEN + unit, tl.sum(dh, axis=0))


@triton.jit(do_not_specialize=["steps"])  # it depends on the device
def mlp_kept_grad_kernel(
    grad_ptr, xhat_ptr, h_ptr, w2_ptr, keep_ptr, dh_ptr, dw1_ptr, dw2_ptr, db1_ptr,
    num_rows, positions, steps,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr, LIFT: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """dh = (keep grad w2) gelu'(h), and sums over `steps` times ROWS rows: one part a program.

    dw1 = dh' xhat and dw2 = (keep gelu(h))' grad are (parts, HIDDEN, CHANNELS), db1 (parts,
    HIDDEN). w2 has gamma in it already, and is LIFT times as large. The last piece of channels may
    be narrower than TILE. BOTH: or dw1 is left to another product.
    """
    PIECES: tl.constexpr = (CHANNELS + TILE - 1) // TILE
    dtype = h_ptr.dtype.element_ty
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    part = tl.program_id(1)
    line = tl.arange(0, ROWS)[:, None]
    matrices = ()
    dw1 = ()
    dw2 = ()
    for k in tl.static_range(PIECES):
        channel = _list_channels(k, CHANNELS, TILE)
        matrices = matrices + (tl.load(w2_ptr + channel[None, :] * HIDDEN + unit[:, None]),)
        if BOTH:
            dw1 = dw1 + (tl.zeros((UNITS, channel.shape[0]), tl.float32),)
        dw2 = dw2 + (tl.zeros((UNITS, channel.shape[0]), tl.float32),)
    db1 = tl.zeros((UNITS,), tl.float32)
    identity = (tl.arange(0, UNITS)[:, None] == tl.arange(0, UNITS)[None, :]).to(dtype)
    start = part * steps * ROWS
    for _step in range(steps):
        used = start + line < num_rows
        place = start.to(tl.int64) * CHANNELS
        place_h = start.to(tl.int64) * HIDDEN
        h = tl.load(h_ptr + place_h + (line * HIDDEN + unit[None, :]), mask=used, other=0.0)
        # Units are the rows of all that follows, so that it goes into the next products from
        # registers. This product, which is exact, lays h out as the gradient will be; else threads
        # would exchange it, and GELU be computed in either order.
        h = tl.dot(identity, tl.trans(h), input_precision=PRECISION)
        da = tl.zeros((UNITS, ROWS), tl.float32)
        inputs = ()
        grads = ()
        for k in tl.static_range(PIECES):
            offset = line * CHANNELS + _list_channels(k, CHANNELS, TILE)[None, :]
            grad = tl.load(grad_ptr + place + offset, mask=used, other=0.0)
            if BOTH:
                xhat = tl.load(xhat_ptr + place + offset, mask=used, other=0.0)
                inputs = inputs + (xhat,)
            da = tl.dot(matrices[k], tl.trans(grad), da, input_precision=PRECISION)
            grads = grads + (grad,)
        a, slope = gelu_and_slope(h, dtype == tl.float32)
        row = start + tl.arange(0, ROWS)
        if HAS_KEEP:
            factor = load_factor(keep_ptr, row, num_rows, positions, HAS_KEEP)[None, :]
            a = a * factor
            slope = slope * factor
        dh = da * slope * (1 / LIFT)
        db1 += tl.sum(dh, axis=1)
        dh = dh.to(dtype)
        a = a.to(dtype)
        offset = tl.arange(0, ROWS)[None, :] * HIDDEN + unit[:, None]
        tl.store(dh_ptr + place_h + offset, dh, mask=(row < num_rows)[None, :])
        next1 = ()
        next2 = ()
        for k in tl.static_range(PIECES):
            if BOTH:
                next1 = next1 + (tl.dot(dh, inputs[k], dw1[k], input_precision=PRECISION),)
            next2 = next2 + (tl.dot(a, grads[k], dw2[k], input_precision=PRECISION),)
        dw1 = next1
        dw2 = next2
        start += ROWS
    place = (part * HIDDEN + unit)[:, None] * CHANNELS
    for k in tl.static_range(PIECES):
        channel = _list_channels(k, CHANNELS, TILE)[None, :]
        if BOTH:
            tl.store(dw1_ptr + place + channel, dw1[k])
        tl.store(dw2_ptr + place + channel, dw2[k])
    tl.store(db1_ptr + part * HIDDEN + unit, db1)


@triton.jit
def layer_scale_grad_kernel(
    product_ptr, total_ptr, w2_ptr, b2_ptr, gamma_ptr, dw2_ptr, db2_ptr, dgamma_ptr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Put gamma into the gradients of w2 and b2, and make its own from them.

    product (CHANNELS, HIDDEN) and total (CHANNELS) are those gradients without gamma.
    """
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = channel < CHANNELS
    gamma = tl.load(gamma_ptr + channel, mask=used, other=0.0)
    total = tl.load(total_ptr + channel, mask=used, other=0.0)
    own = total * tl.load(b2_ptr + channel, mask=used, other=0.0)
    for start in range(0, HIDDEN, UNITS):
        place = channel[:, None] * HIDDEN + start + tl.arange(0, UNITS)[None, :]
        product = tl.load(product_ptr + place, mask=used[:, None], other=0.0).to(tl.float32)
        w2 = tl.load(w2_ptr + place, mask=used[:, None], other=0.0).to(tl.float32)
        own += tl.sum(product * w2, axis=1)
        dw2 = (gamma[:, None] * product).to(dw2_ptr.dtype.element_ty)
        tl.store(dw2_ptr + place, dw2, mask=used[:, None])
    tl.store(db2_ptr + channel, gamma * total, mask=used)
    tl.store(dgamma_ptr + channel, own, mask=used)
