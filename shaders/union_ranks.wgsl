// Scores that order tokens by the turn in which the heads' rankings name them. `places` counts, for every entry of a
// head's list, the entries before it; `main` looks for every token in every list (they are ascending).

struct Params {
    heads: u32,
    // Room of a list.
    k: u32,
    stride: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> scores: array<u32>;
@group(0) @binding(3) var<storage, read> indices: array<u32>;
@group(0) @binding(4) var<storage, read> counts: array<u32>;
@group(0) @binding(5) var<storage, read_write> places_of: array<u32>;
@group(0) @binding(6) var<storage, read_write> out: array<u32>;

const TILE: u32 = 256u;
// Scores as numbers of the same order: a comparison of infinities is not left to the driver.
var<workgroup> tile: array<u32, TILE>;

// Workgroups of (64 entries, head, sequence).
@compute @workgroup_size(64)
fn places(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.z * p.heads + group.y;
    let n = min(counts[row], p.k);
    for (var first = group.x * 64u; first < n; first += groups.x * 64u) {
        let e = first + lane;
        let mine = image(scores[row * p.stride + indices[row * p.k + min(e, n - 1u)]]);
        var place = 0u;
        for (var start = 0u; start < n; start += TILE) {
            let count = min(TILE, n - start);
            workgroupBarrier();
            for (var i = lane; i < count; i += 64u) {
                tile[i] = image(scores[row * p.stride + indices[row * p.k + start + i]]);
            }
            workgroupBarrier();
            for (var i = 0u; i < count; i += 1u) {
                if tile[i] > mine || (tile[i] == mine && start + i < e) {
                    place += 1u;
                }
            }
        }
        if e < n {
            places_of[row * p.k + e] = place;
        }
    }
}

// Workgroups of (64 tokens, sequence).
@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.y * META_WORDS + META_KV_LEN];
    for (var j = group.x * 64u + lane; j < kv_len; j += groups.x * 64u) {
        var turn = 0xffffffffu;
        for (var h = 0u; h < p.heads; h += 1u) {
            let row = group.y * p.heads + h;
            let n = min(counts[row], p.k);
            var low = 0u;
            var high = n;
            while low < high {
                let middle = (low + high) / 2u;
                if indices[row * p.k + middle] < j {
                    low = middle + 1u;
                } else {
                    high = middle;
                }
            }
            if low < n && indices[row * p.k + low] == j {
                turn = min(turn, places_of[row * p.k + low] * p.heads + h);
            }
        }
        var score = LOWEST;
        if turn != 0xffffffffu {
            score = -f32(turn);
        }
        out[group.y * p.stride + j] = score_bits(score);
    }
}
