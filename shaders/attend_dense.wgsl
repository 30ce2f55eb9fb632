// Causal softmax attention over all cached tokens. `decode`: one row per sequence, workgroups of (split, heads
// of one KV head, sequence). `prefill`: flash attention, workgroups of (32 rows, head, sequence and split).

struct Params {
    rows: u32,
    heads: u32,
    kv_heads: u32,
    // 0xffffffff without a window.
    window: u32,
    splits: u32,
    scale: f32,
    // HEAD_DIM, for loops that are not to be unrolled.
    head_dim: u32,
    // 0: prompts want log-sum-exps alone.
    values: u32,
}

@group(0) @binding(0) var<uniform> p: Params;

// The window's first token; entries of the first page before it are skipped.
var<private> window_start: u32;

fn token_at(i: u32) -> u32 {
    return select(NO_TOKEN, i, i >= window_start);
}

// First token that a row at `position` sees.
fn first_seen(position: u32) -> u32 {
    return select(0u, position + 1u - p.window, position + 1u > p.window);
}

// Page-aligned token range of a split over tokens first..last.
fn split_range(first: u32, last: u32, split: u32) -> vec2<u32> {
    let page0 = first / PAGE;
    let n = (last + PAGE - 1u) / PAGE - page0;
    let piece = (n + p.splits - 1u) / p.splits;
    let start = min((page0 + split * piece) * PAGE, last);
    return vec2<u32>(start, min(start + piece * PAGE, last));
}

@compute @workgroup_size(64)
fn decode(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z;
    let kv_len = record(sequence, META_KV_LEN);
    if record(sequence, META_Q_LEN) == 0u || kv_len == 0u {
        return;
    }
    let head = group.y * HEADS;
    let row = record(sequence, META_Q_START);
    window_start = first_seen(kv_len - 1u);
    let range = split_range(window_start, kv_len, group.x);
    let out_row = (group.x * p.rows + row) * p.heads + head;
    flash_decode(
        lane, sequence, row, p.heads, p.kv_heads, head, range.x, range.y, p.scale, p.head_dim, out_row,
    );
}

// Rows of a block; keys come in pages of 64.
const BLOCK: u32 = 32u;
var<workgroup> p_tile: array<f32, 2048>;
var<workgroup> row_max: array<f32, 128>;

// 128 threads: 8 groups of four rows by 16 columns. A thread has four keys of the page (tx, tx + 16, ...) in
// the product with K, and four-dimension pieces tx, tx + 16, ... in the product with V.
@compute @workgroup_size(128)
fn prefill(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z / p.splits;
    let split = group.z % p.splits;
    let head = group.y;
    let kv_head = head / GROUP;
    let q_len = record(sequence, META_Q_LEN);
    let kv_len = record(sequence, META_KV_LEN);
    let row0 = record(sequence, META_Q_START);
    if group.x * BLOCK >= q_len || kv_len < q_len {
        return;
    }
    let tx = lane % 16u;
    let ty = lane / 16u;
    let quads = HEAD_DIM / 4u;
    let pieces = (quads + 15u) / 16u;
    let block0 = group.x * BLOCK;
    let base_position = kv_len - q_len;

    // Rows past the end repeat the last one and are not written.
    var position: array<u32, 4>;
    var q_at: array<u32, 4>;
    for (var i = 0u; i < 4u; i += 1u) {
        let r = min(block0 + ty * 4u + i, q_len - 1u);
        position[i] = base_position + r;
        q_at[i] = ((row0 + r) * p.heads + head) * quads;
    }
    let block_last = base_position + min(block0 + BLOCK, q_len) - 1u;
    let range = split_range(first_seen(base_position + block0), block_last + 1u, split);

    var largest = array<f32, 4>(LOWEST, LOWEST, LOWEST, LOWEST);
    var total = array<f32, 4>();
    var acc = array<vec4<f32>, 16>();
    for (var first = range.x; first < range.y; first += PAGE) {
        let tile = (page_of(sequence, first / PAGE) * p.kv_heads + kv_head) * PAGE * HEAD_DIM;
        var s = array<vec4<f32>, 4>();
        for (var d = 0u; d < p.head_dim; d += 4u) {
            let k0 = k4(tile + k_offset(LEAD, HEAD_DIM, tx, d));
            let k1 = k4(tile + k_offset(LEAD, HEAD_DIM, tx + 16u, d));
            let k2 = k4(tile + k_offset(LEAD, HEAD_DIM, tx + 32u, d));
            let k3 = k4(tile + k_offset(LEAD, HEAD_DIM, tx + 48u, d));
            for (var i = 0u; i < 4u; i += 1u) {
                let qv = q[q_at[i] + d / 4u];
                s[i] += vec4<f32>(dot(qv, k0), dot(qv, k1), dot(qv, k2), dot(qv, k3));
            }
        }
        for (var i = 0u; i < 4u; i += 1u) {
            for (var j = 0u; j < 4u; j += 1u) {
                let t = first + tx + 16u * j;
                let seen = t <= position[i] && t >= first_seen(position[i]) && t < range.y;
                s[i][j] = select(LOWEST, s[i][j] * p.scale, seen);
                p_tile[(ty * 4u + i) * PAGE + tx + 16u * j] = s[i][j];
            }
        }
        workgroupBarrier();
        var m = LOWEST;
        for (var j = 0u; j < 16u; j += 1u) {
            m = max(m, p_tile[(lane / 4u) * PAGE + (lane % 4u) * 16u + j]);
        }
        row_max[lane] = m;
        workgroupBarrier();
        for (var i = 0u; i < 4u; i += 1u) {
            let at = (ty * 4u + i) * 4u;
            let page_max = max(max(row_max[at], row_max[at + 1u]), max(row_max[at + 2u], row_max[at + 3u]));
            let now = max(largest[i], page_max);
            let shrink = exp(largest[i] - now);
            largest[i] = now;
            total[i] *= shrink;
            for (var c = 0u; c < pieces; c += 1u) {
                acc[c * 4u + i] *= shrink;
            }
            for (var j = 0u; j < 4u; j += 1u) {
                let w = select(0.0, exp(s[i][j] - now), s[i][j] > LOWEST);
                p_tile[(ty * 4u + i) * PAGE + tx + 16u * j] = w;
                total[i] += w;
            }
        }
        workgroupBarrier();
        let weighed = select(0u, min(PAGE, range.y - first), p.values != 0u);
        for (var t = 0u; t < weighed; t += 1u) {
            let w = vec4<f32>(
                p_tile[ty * 4u * PAGE + t],
                p_tile[(ty * 4u + 1u) * PAGE + t],
                p_tile[(ty * 4u + 2u) * PAGE + t],
                p_tile[(ty * 4u + 3u) * PAGE + t],
            );
            for (var c = 0u; c < pieces; c += 1u) {
                let quad = min(c * 16u + tx, quads - 1u);
                let value = v4(tile + t * HEAD_DIM + quad * 4u);
                acc[c * 4u] += w.x * value;
                acc[c * 4u + 1u] += w.y * value;
                acc[c * 4u + 2u] += w.z * value;
                acc[c * 4u + 3u] += w.w * value;
            }
        }
        workgroupBarrier();
    }

    // Each row's denominator is spread over its 16 threads.
    for (var i = 0u; i < 4u; i += 1u) {
        p_tile[(ty * 4u + i) * 16u + tx] = total[i];
    }
    workgroupBarrier();
    for (var i = 0u; i < 4u; i += 1u) {
        let r = block0 + ty * 4u + i;
        if r >= q_len {
            continue;
        }
        var denominator = 0.0;
        for (var j = 0u; j < 16u; j += 1u) {
            denominator += p_tile[(ty * 4u + i) * 16u + j];
        }
        let out_row = (split * p.rows + row0 + r) * p.heads + head;
        for (var c = 0u; c < pieces; c += 1u) {
            let quad = c * 16u + tx;
            if quad < quads {
                out[out_row * quads + quad] =
                    select(vec4<f32>(), acc[c * 4u + i] / denominator, denominator > 0.0);
            }
        }
        if tx == 0u {
            write_lse(out_row, largest[i], denominator);
        }
    }
}
