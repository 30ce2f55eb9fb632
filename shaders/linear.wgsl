// y[r, o] = sum_i x[r, i] * w[o, i] + bias[o], or y += with ACCUMULATE. The dispatch sees `count` rows of the
// weight, the first of which is output `first`.

override BIAS: bool = false;
override ACCUMULATE: bool = false;
// Rows of x: of the whole call for matvec (1 to 4), of each thread for matmul_rows (1 to 4).
override ROWS: u32 = 1u;
// matvec: threads that share one output.
override LANES: u32 = 16u;

struct Params {
    rows: u32,
    inputs: u32,
    outputs: u32,
    first: u32,
    count: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> w_pairs: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

fn store(row: u32, o: u32, sum: f32) {
    var v = sum;
    if BIAS {
        v += bias[p.first + o];
    }
    let i = row * p.outputs + p.first + o;
    if ACCUMULATE {
        v += y[i];
    }
    y[i] = v;
}

// Partial sums of one thread: [row * 64 + lane], one component per output.
var<workgroup> partial: array<vec4<f32>, 256>;

// Weights 8c..8c+8 of output `o`.
fn w8(o: u32, c: u32) -> Eight {
    let i = o * (p.inputs / 8u) + c;
    if DTYPE == 0u {
        return Eight(bitcast<vec4<f32>>(w[2u * i]), bitcast<vec4<f32>>(w[2u * i + 1u]));
    }
    let v = w[i];
    return Eight(unpack4(v.x, v.y), unpack4(v.z, v.w));
}

// Few rows: LANES threads walk along the inputs for four outputs and add up once at the end.
@compute @workgroup_size(64)
fn matvec(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let teams = 64u / LANES;
    let o = (flat_group(group, groups) * teams + lane / LANES) * 4u;
    let last = p.count - 1u;
    let chunks = p.inputs / 8u;
    var acc = array<vec4<f32>, 4>();
    if o < p.count {
        for (var c = lane % LANES; c < chunks; c += LANES) {
            let w0 = w8(o, c);
            let w1 = w8(min(o + 1u, last), c);
            let w2 = w8(min(o + 2u, last), c);
            let w3 = w8(min(o + 3u, last), c);
            for (var r = 0u; r < ROWS; r += 1u) {
                let a = x[(r * chunks + c) * 2u];
                let b = x[(r * chunks + c) * 2u + 1u];
                acc[r] += vec4<f32>(dot(w0.a, a), dot(w1.a, a), dot(w2.a, a), dot(w3.a, a));
                acc[r] += vec4<f32>(dot(w0.b, b), dot(w1.b, b), dot(w2.b, b), dot(w3.b, b));
            }
        }
    }
    for (var r = 0u; r < ROWS; r += 1u) {
        partial[r * 64u + lane] = acc[r];
    }
    workgroupBarrier();
    // One thread per (row, team) adds the lanes.
    let r = lane / teams;
    let team = lane % teams;
    if r < ROWS {
        var sum = vec4<f32>();
        for (var i = 0u; i < LANES; i += 1u) {
            sum += partial[r * 64u + team * LANES + i];
        }
        let first = (flat_group(group, groups) * teams + team) * 4u;
        for (var j = 0u; j < 4u; j += 1u) {
            if first + j < p.count {
                store(r, first + j, sum[j]);
            }
        }
    }
}

// Tiles of 64 rows, 64 outputs and 16 inputs; the odd stride keeps the transposing writes apart.
const TILE: u32 = 65u;
var<workgroup> x_tile: array<f32, 1040>;
var<workgroup> w_tile: array<f32, 1040>;

// Four weights of output `o` from input `k` on.
fn w4(o: u32, k: u32) -> vec4<f32> {
    let i = (o * p.inputs + k) / 4u;
    if DTYPE == 0u {
        return vec4<f32>(bitcast<vec2<f32>>(w_pairs[2u * i]), bitcast<vec2<f32>>(w_pairs[2u * i + 1u]));
    }
    let v = w_pairs[i];
    return unpack4(v.x, v.y);
}

// Many rows: 64 x 64 outputs per workgroup, 4 x 4 per thread.
@compute @workgroup_size(256)
fn matmul(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row0 = group.y * 64u;
    let out0 = group.x * 64u;
    let tx = lane % 16u;
    let ty = lane / 16u;
    let load_row = lane / 4u;
    let load_k = (lane % 4u) * 4u;
    var acc = array<vec4<f32>, 4>();
    for (var k0 = 0u; k0 < p.inputs; k0 += 16u) {
        var xv = vec4<f32>();
        var wv = vec4<f32>();
        if k0 + load_k < p.inputs {
            if row0 + load_row < p.rows {
                xv = x[((row0 + load_row) * p.inputs + k0 + load_k) / 4u];
            }
            if out0 + load_row < p.count {
                wv = w4(out0 + load_row, k0 + load_k);
            }
        }
        for (var j = 0u; j < 4u; j += 1u) {
            x_tile[(load_k + j) * TILE + load_row] = xv[j];
            w_tile[(load_k + j) * TILE + load_row] = wv[j];
        }
        workgroupBarrier();
        for (var k = 0u; k < 16u; k += 1u) {
            let xi = k * TILE + ty * 4u;
            let wi = k * TILE + tx * 4u;
            let wk = vec4<f32>(w_tile[wi], w_tile[wi + 1u], w_tile[wi + 2u], w_tile[wi + 3u]);
            acc[0] += x_tile[xi] * wk;
            acc[1] += x_tile[xi + 1u] * wk;
            acc[2] += x_tile[xi + 2u] * wk;
            acc[3] += x_tile[xi + 3u] * wk;
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i += 1u) {
        let row = row0 + ty * 4u + i;
        for (var j = 0u; j < 4u; j += 1u) {
            let o = out0 + tx * 4u + j;
            if row < p.rows && o < p.count {
                store(row, o, acc[i][j]);
            }
        }
    }
}

// Many rows on a software adapter, where loads cost far more than arithmetic and barriers more still: a thread
// has ROWS rows and eight outputs in registers and shares nothing.
@compute @workgroup_size(8)
fn matmul_rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let o = group.x * 8u;
    let last = p.count - 1u;
    let chunks = p.inputs / 8u;
    let row0 = group.y * 8u * ROWS + lane;
    var low = array<vec4<f32>, 4>();
    var high = array<vec4<f32>, 4>();
    for (var c = 0u; c < chunks; c += 1u) {
        let w0 = w8(o, c);
        let w1 = w8(min(o + 1u, last), c);
        let w2 = w8(min(o + 2u, last), c);
        let w3 = w8(min(o + 3u, last), c);
        let w_4 = w8(min(o + 4u, last), c);
        let w5 = w8(min(o + 5u, last), c);
        let w6 = w8(min(o + 6u, last), c);
        let w7 = w8(min(o + 7u, last), c);
        for (var r = 0u; r < ROWS; r += 1u) {
            let at = (min(row0 + r * 8u, p.rows - 1u) * chunks + c) * 2u;
            let a = x[at];
            let b = x[at + 1u];
            low[r] += vec4<f32>(dot(w0.a, a), dot(w1.a, a), dot(w2.a, a), dot(w3.a, a));
            low[r] += vec4<f32>(dot(w0.b, b), dot(w1.b, b), dot(w2.b, b), dot(w3.b, b));
            high[r] += vec4<f32>(dot(w_4.a, a), dot(w5.a, a), dot(w6.a, a), dot(w7.a, a));
            high[r] += vec4<f32>(dot(w_4.b, b), dot(w5.b, b), dot(w6.b, b), dot(w7.b, b));
        }
    }
    for (var r = 0u; r < ROWS; r += 1u) {
        let row = row0 + r * 8u;
        for (var j = 0u; j < 4u; j += 1u) {
            if row < p.rows && o + j < p.count {
                store(row, o + j, low[r][j]);
            }
            if row < p.rows && o + 4u + j < p.count {
                store(row, o + 4u + j, high[r][j]);
            }
        }
    }
}
