// Rotary embedding on interleaved pairs, after an optional RMS norm of each head; one workgroup per
// (row, head).

override NORM: bool = false;

struct Params {
    rows: u32,
    heads: u32,
    head_dim: u32,
    heads_per_freq: u32,
    x_stride: u32,
    x_offset: u32,
    eps: f32,
    // Of the result.
    factor: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read> inv_freq: array<f32>;
@group(0) @binding(4) var<storage, read> weight: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

var<workgroup> partial: array<f32, 64>;

// a * b as (high, low) words.
fn mul_wide(a: u32, b: u32) -> vec2<u32> {
    let a0 = a & 0xffffu;
    let a1 = a >> 16u;
    let b0 = b & 0xffffu;
    let b1 = b >> 16u;
    let low = a0 * b0;
    let mid = a1 * b0 + (low >> 16u);
    let mid2 = a0 * b1 + (mid & 0xffffu);
    return vec2<u32>(a1 * b1 + (mid >> 16u) + (mid2 >> 16u), (mid2 << 16u) | (low & 0xffffu));
}

// The angle `a >= 1/2` in turns modulo 1, as a 32-bit fraction. Drivers promise sin and cos only near zero,
// and long contexts have angles beyond 1e5, so the reduction is done in integers: the mantissa times 64 bits
// of 1 / (2 pi).
fn turns(a: f32) -> u32 {
    let bits = bitcast<u32>(a);
    let mantissa = (bits & 0x7fffffu) | 0x800000u;
    let shift = i32(bits >> 23u) - 150;
    let high = mul_wide(mantissa, 0x28be60dbu);
    let low = mul_wide(mantissa, 0x9391054au);
    let p0 = low.y;
    let p1 = high.y + low.x;
    let p2 = high.x + select(0u, 1u, p1 < high.y);
    if shift == 0 {
        return p1;
    }
    if shift < 0 {
        let s = min(u32(-shift), 31u);
        return (p2 << (32u - s)) | (p1 >> s);
    }
    let s = min(u32(shift), 31u);
    return (p1 << s) | (p0 >> (32u - s));
}

// (cos a, sin a) for a >= 0.
fn cos_sin(a: f32) -> vec2<f32> {
    var r = a;
    var quadrant = 0u;
    if a >= 0.75 {
        let t = turns(a);
        quadrant = (t + 0x20000000u) >> 30u;
        r = f32(bitcast<i32>(t - (quadrant << 30u))) * 1.4629180792671596e-9;
    }
    let r2 = r * r;
    let s = r + r * r2 * (-1.0 / 6.0 + r2 * (1.0 / 120.0 + r2 * (-1.0 / 5040.0 + r2 / 362880.0)));
    let c = 1.0 + r2 * (-0.5 + r2 * (1.0 / 24.0 + r2 * (-1.0 / 720.0 + r2 * (1.0 / 40320.0 - r2 / 3628800.0))));
    switch quadrant & 3u {
        case 0u: { return vec2<f32>(c, s); }
        case 1u: { return vec2<f32>(-s, c); }
        case 2u: { return vec2<f32>(-c, -s); }
        default: { return vec2<f32>(s, -c); }
    }
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let g = flat_group(group, groups);
    let live = g < p.rows * p.heads;
    let row = g / p.heads;
    let head = g % p.heads;
    let src = p.x_offset + row * p.x_stride + head * p.head_dim;
    let dst = g * p.head_dim;
    var scale = 1.0;
    if NORM {
        var sum = 0.0;
        if live {
            for (var i = lane; i < p.head_dim; i += 64u) {
                let v = x[src + i];
                sum += v * v;
            }
        }
        partial[lane] = sum;
        workgroupBarrier();
        var total = 0.0;
        for (var i = 0u; i < 64u; i += 1u) {
            total += partial[i];
        }
        scale = 1.0 / sqrt(total / f32(p.head_dim) + p.eps);
    }
    if !live {
        return;
    }
    let half = p.head_dim / 2u;
    let position = f32(positions[row]);
    for (var pair = lane; pair < half; pair += 64u) {
        var v = vec2<f32>(x[src + 2u * pair], x[src + 2u * pair + 1u]);
        if NORM {
            let w = head * p.head_dim + 2u * pair;
            v = v * scale * vec2<f32>(weight[w], weight[w + 1u]);
        }
        let angle = position * inv_freq[(head / p.heads_per_freq) * half + pair];
        var turn = cos_sin(abs(angle));
        turn.y = select(turn.y, -turn.y, angle < 0.0);
        turn *= p.factor;
        out[dst + 2u * pair] = v.x * turn.x - v.y * turn.y;
        out[dst + 2u * pair + 1u] = v.y * turn.x + v.x * turn.y;
    }
}
