// Content importance of new tokens, in the keys' and queries' dimensions for it; one workgroup per (row, KV head).

struct Params {
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // First dimension of the bias.
    at: u32,
    // Elements between rows of the values, and before the first of them in its binding.
    v_stride: u32,
    v_offset: u32,
    // What a query holds for the bias.
    high: f32,
    low: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> v: array<f32>;
@group(0) @binding(2) var<storage, read> delta: array<f32>;
@group(0) @binding(3) var<storage, read> a: array<f32>;
@group(0) @binding(4) var<storage, read_write> q: array<f32>;
@group(0) @binding(5) var<storage, read_write> k: array<f32>;

var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = flat_group(group, groups);
    let row = item / p.kv_heads;
    let head = item % p.kv_heads;
    let live = row < p.rows;
    let width = p.kv_heads * p.head_dim;
    var sum = 0.0;
    if live {
        for (var i = lane; i < width; i += 64u) {
            sum += delta[head * width + i] * v[p.v_offset + row * p.v_stride + i];
        }
    }
    partial[lane] = sum;
    workgroupBarrier();
    if !live {
        return;
    }
    // Every thread adds the 64 partial sums itself: one barrier instead of a tree of six.
    var x = 0.0;
    for (var i = 0u; i < 64u; i += 1u) {
        x += partial[i];
    }
    // ln(1 + e) for small e: e - e^2 / 2 + e^3 / 3, where 1 + e would round e away.
    let e = exp(-abs(x));
    let ln = select(log(1.0 + e), e * (1.0 - e * (0.5 - e / 3.0)), e < 0.01);
    let cis = a[head] * (max(x, 0.0) + ln);
    let tail = p.head_dim - p.at;
    for (var i = lane; i < tail; i += 64u) {
        k[(row * p.kv_heads + head) * p.head_dim + p.at + i] = select(0.0, cis, i < 2u);
    }
    let shared_by = p.heads / p.kv_heads;
    let first = row * p.heads + head * shared_by;
    for (var i = lane; i < shared_by * tail; i += 64u) {
        let c = i % tail;
        let unit = select(p.low, p.high, c == 0u);
        q[(first + i / tail) * p.head_dim + p.at + c] = select(0.0, unit, c < 2u);
    }
}
