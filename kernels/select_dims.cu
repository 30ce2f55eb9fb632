// select_dims: chooses n_dims key dimensions per (sequence, KV head) from the current query (decode).
//
// Importance a_i by metric, summed over the group's heads; units of consecutive dimensions are ranked by
// counting the units before them (larger, or equal with a smaller index), which is exact and needs no sort.
//
// Plan: one CTA of 256 threads per (KV head, sequence), thread = dimension, unit or column. Latency bound:
// heads * head_dim * act read, a few hundred words written.
#include "paged.cuh"

#define ABS_Q 0u
#define PAIR_NORM 1u
#define ABS_QK 2u
#define PAIR_QK 3u
#define EVERY 0u

struct SelectArgs {
    const void* q;
    Seqs seqs;
    const float* stats;  // or null
    u32* dims;
    u32* state;
    u32* changed;
    float* coverage;
    u32 heads, kv_heads, head_dim, n_dims, unit, metric;
    u32 refresh, every_or_min, phase_or_max;
    float beta;
};
static_assert(sizeof(SelectArgs) == 104, "as SelectArgs of kv.rs");

template <class A> DEVICE float importance(const SelectArgs& a, const Seq& seq, u32 kvh, u32 i) {
    u32 d = a.head_dim, g = a.heads / a.kv_heads;
    const A* q = (const A*)a.q + ((u64)seq.q_start * a.heads + kvh * g) * d;
    float sum = 0.0f;
    for (u32 h = 0; h < g; h++) {
        if (a.metric == ABS_Q || a.metric == ABS_QK) {
            sum += fabsf(to_f32(q[h * d + i]));
        } else {
            float x = to_f32(q[h * d + (i & ~1u)]), y = to_f32(q[h * d + (i | 1)]);
            sum += sqrtf(x * x + y * y);
        }
    }
    if (a.metric == ABS_Q || a.metric == PAIR_NORM) return sum;
    const float* st = a.stats + ((u64)seq.slot * a.kv_heads + kvh) * 3 * d;
    u32 at = a.metric == ABS_QK ? i : 2 * d + i / 2, squares = a.metric == ABS_QK ? d : d / 2;
    float n = (float)seq.kv_len, mean = st[at] / n;
    float sigma = sqrtf(fmaxf(0.0f, st[at + squares] / n - mean * mean));
    return sum * (a.metric == ABS_QK ? sigma : mean + sigma);
}

template <class A> DEVICE void select_dims(const SelectArgs& a) {
    __shared__ float weight[256], units[256], scratch[33];
    __shared__ u32 best[256], held[256], fresh[256], scan[33];
    Seq seq = a.seqs.get(blockIdx.y);
    u32 i = threadIdx.x, d = a.head_dim, n_units = d / a.unit, keep = a.n_dims / a.unit;
    u64 at = (u64)seq.slot * a.kv_heads + blockIdx.x;
    u32* dims = a.dims + at * a.n_dims;
    u32* state = a.state + at * 4;
    u32 chosen_before = state[0], last = state[1], choices = state[2], replaced = state[3];

    weight[i] = i < d ? importance<A>(a, seq, blockIdx.x, i) : 0.0f;
    held[i] = 0;
    __syncthreads();
    if (i < n_units) {
        float sum = 0.0f;
        for (u32 j = 0; j < a.unit; j++) sum += weight[i * a.unit + j];
        units[i] = sum;
    }
    __syncthreads();
    u32 mine = 0;
    if (i < d) {
        u32 u = i / a.unit, before = 0;
        for (u32 o = 0; o < n_units; o++)
            before += units[o] > units[u] || (units[o] == units[u] && o < u);
        mine = before < keep;
    }
    best[i] = mine;
    u32 column = i < a.n_dims ? dims[i] : 0;  // held dimension of column i
    bool holds = chosen_before && i < a.n_dims && column < d;
    if (holds) held[column] = 1;
    float total = block_sum(weight[i], scratch);
    float top = block_sum(mine ? weight[i] : 0.0f, scratch);
    float now = block_sum(holds ? weight[column] : 0.0f, scratch);
    float rho_best = total > 0.0f ? top / total : 1.0f, rho = total > 0.0f ? now / total : 1.0f;

    bool due = !chosen_before;
    if (!due && a.refresh == EVERY) {
        due = a.every_or_min != 0 && (seq.step + a.phase_or_max) % a.every_or_min == 0;
    } else if (!due) {
        u32 since = seq.step - last;
        due = since >= a.phase_or_max || (since >= a.every_or_min && rho < a.beta * rho_best);
    }
    bool moved = false;
    if (due) {
        // New dimensions in ascending order, then the freed columns in ascending order take them.
        u32 count, freed;
        bool is_new = mine && !held[i];
        u32 rank = block_scan(is_new, scan, count);
        if (is_new) fresh[rank] = i;
        bool free_column = i < a.n_dims && !(holds && best[column]);
        u32 place = block_scan(free_column, scan, freed);  // its barriers also publish `fresh`
        moved = free_column && place < count;
        if (moved) dims[i] = fresh[place];
        if (i == 0) {
            state[0] = 1, state[1] = seq.step, state[2] = choices + 1;
            state[3] = replaced + (chosen_before ? min(count, freed) : 0);
        }
        rho = rho_best;
    }
    u32 word = __ballot_sync(~0u, moved);
    if ((i & 31) == 0) a.changed[at * 8 + (i >> 5)] = word;
    if (i == 0) a.coverage[at * 2] = rho, a.coverage[at * 2 + 1] = rho_best;
}

#define KERNEL(T) \
    extern "C" __global__ void __launch_bounds__(256) select_dims_##T(SelectArgs a) { depend(); select_dims<T>(a); }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
