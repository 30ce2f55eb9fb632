// Merges split results by log-sum-exp; one workgroup per (row of a sequence, head, sequence).

struct Params {
    rows: u32,
    heads: u32,
    head_dim: u32,
    splits: u32,
    has_lse: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> part: array<f32>;
@group(0) @binding(2) var<storage, read> part_lse: array<f32>;
@group(0) @binding(3) var<storage, read> sequences: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let record = group.z * META_WORDS;
    let q_len = sequences[record + META_Q_LEN];
    let n = p.rows * p.heads;
    for (var i = group.x; i < q_len; i += groups.x) {
        let at = (sequences[record + META_Q_START] + i) * p.heads + group.y;
        var largest = LOWEST;
        for (var s = 0u; s < p.splits; s += 1u) {
            largest = max(largest, part_lse[s * n + at]);
        }
        var total = 0.0;
        if largest > LOWEST {
            for (var s = 0u; s < p.splits; s += 1u) {
                let l = part_lse[s * n + at];
                if l > LOWEST {
                    total += exp(l - largest);
                }
            }
        }
        for (var d = lane; d < p.head_dim; d += 64u) {
            var sum = 0.0;
            if total > 0.0 {
                for (var s = 0u; s < p.splits; s += 1u) {
                    let l = part_lse[s * n + at];
                    if l > LOWEST {
                        sum += exp(l - largest) * part[(s * n + at) * p.head_dim + d];
                    }
                }
                sum /= total;
            }
            out[at * p.head_dim + d] = sum;
        }
        if lane == 0u && p.has_lse == 1u {
            lse[at] = select(MINUS_INF, bitcast<u32>(largest + log(total)), total > 0.0);
        }
    }
}
