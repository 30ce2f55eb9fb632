// Candidates among the scores of a row, for top_k.cu: which scores reach a bound, and what is chosen of these.
#pragma once
#include "digits.cuh"
#include "hopper.cuh"

// A block's share of a row.
struct Part {
    const float* x;
    u32 first, n;     // number of its first score, and how many it has
    u32 readable;     // scores of the buffer that lie there, n or more
    u32 sinks, from;  // tokens below and from which on are forced

    // Has scores [i, i + wide) that are not there or forced.
    DEVICE bool special(u32 i, u32 wide) const {
        return i + wide > n || first + i < sinks || first + i + wide > from;
    }
    DEVICE static u32 below(u32 bits) { return bits < 32 ? (1u << bits) - 1 : ~0u; }
    // A bit for each of 32 scores from `i` on that is there; and that is forced.
    DEVICE u32 there(u32 i) const { return below(i < n ? n - i : 0); }
    DEVICE u32 forced(u32 i) const {
        u32 token = first + i;
        return below(token < sinks ? sinks - token : 0) | ~below(token < from ? from - token : 0);
    }
};

// Digits of a sample, of which the larger ones matter: 64 an octave of what lies above `floor`, 32 octaves of it.
struct Bound {
    float floor;
    u32 base, high;  // image of the largest finite score

    // Where `low` and `high` are images of a small and the largest finite one; low above high for none.
    DEVICE Bound(u32 low, u32 high) : floor(low <= high ? score_of(low) : 0.0f), base(0), high(low <= high ? high : LEAST) {
        u32 range = low <= high ? __float_as_uint(score_of(high) - floor) : 0;
        if (range > (BINS - 2) << 17) base = range - ((BINS - 2) << 17);
    }
    DEVICE u32 digit(float x) const {
        u32 bits = __float_as_uint(x - floor);
        return x == POS_INF ? BINS - 1 : bits < base ? 0 : min((bits - base) >> 17, BINS - 2);
    }
    // Image of a score that all of a bin reach, and of the larger ones.
    DEVICE u32 low(u32 bin) const {
        if (bin == BINS - 1) return INFINITE;
        float above = __uint_as_float(base + (bin << 17)), x = floor + above;
        x -= (fabsf(floor) + above) * 2.4e-7f;  // more than was rounded
        return image(bin > 0 && x > floor && x < POS_INF ? x : floor);
    }
};

// A block's scores, the candidates among them, and what is chosen of these. Every warp has a run of the block's part: it
// copies STEP scores at a time, of which a lane looks at neighbours, and keeps candidates in ascending order, wherever
// there is room. Where there is none, they are found again whenever they are wanted.
template <bool CLUSTER, u32 STEP> struct Select : Digits<CLUSTER> {
    Part p;
    float* buffer;       // [WARPS, STEP]
    u32 run, steps;      // scores of a warp, and how many steps they are
    u32 phase;           // of the next step's arrival
    u32* keys;           // images of the candidates kept
    u16* places;         // and where they are in the warp's run
    u32 room;            // for so many
    u32* taken;          // of it, in shared memory
    uint2 piece;         // lane `step`'s: where those of the warp's step begin, and how many
    bool kept;
    u32 low, shift;      // image of the smallest candidate; of the first digit
    u32 bottom, top;     // images: larger ones are chosen, and `want` of these
    bool few;            // these differ, but are no more than a warp's lanes

    DEVICE void share() {
        steps = (p.n + WARPS * STEP - 1) / (WARPS * STEP), run = steps * STEP;
    }
    // Pieces are as many as lanes, and places have 16 bits.
    DEVICE bool keeps() const { return steps <= 32 && run <= 1 << 16; }
    DEVICE u32 run_at() const { return (threadIdx.x >> 5) * run; }
    DEVICE float* own() const { return buffer + (threadIdx.x >> 5) * STEP; }
    // A step of the warp's run, and the wait for it; on Hopper by the copy engine, one instruction instead of eight a lane.
#if WGMMA
    DEVICE u32 arrived() const {
        __shared__ u64 barriers[WARPS];
        return bar(barriers[threadIdx.x >> 5]);
    }
    DEVICE void ready() {
        if (threadIdx.x % 32 == 0) barrier_init(arrived(), 1), fence_proxy();
        phase = 0;
    }
    DEVICE void copy(u32 step) {
        u32 i = run_at() + step * STEP, bytes = i < p.readable ? min(STEP, p.readable - i) * 4 : 0;
        if (step >= steps || threadIdx.x % 32 > 0) return;
        barrier_expect(arrived(), bytes);
        if (bytes > 0) copy_run(shared_address(own()), p.x + i, bytes, arrived());
    }
    DEVICE void wait() { barrier_wait(arrived(), phase), phase ^= 1; }
#else
    DEVICE void ready() {}
    DEVICE void copy(u32 step) {
        u32 lane = threadIdx.x & 31, i = run_at() + step * STEP + lane * 4;
#pragma unroll
        for (u32 j = 0; j < STEP / 128; j++)
            if (step < steps && i + j * 128 < p.readable)
                copy16_to(shared_address(own() + j * 128 + lane * 4), p.x + i + j * 128);
    }
    DEVICE void wait() {
        copy_wait_all();
        __syncwarp();
    }
#endif

    // Counts four scores a thread, from number i of n on, as digits above what one of four in every thread reaches. Then
    // the first step is on its way.
    DEVICE Bound sample(float (&x)[4], u32 i, u32 n) {
        __shared__ uint2 of_warps[WARPS];
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        float best = NEG_INF;
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            if (i + c >= n) x[c] = NEG_INF;
            else if (i + c < p.sinks || i + c >= p.from) x[c] = POS_INF;
            if (x[c] < POS_INF) best = fmaxf(best, x[c]);
        }
        bool any = best > NEG_INF;
        u32 low = __reduce_min_sync(~0u, any ? image(best) : ~0u), high = __reduce_max_sync(~0u, any ? image(best) : 0);
        if (lane == 0) of_warps[warp] = make_uint2(low, high);
        // Now, because many copies under way keep other reads waiting.
        copy(0);
        __syncthreads();
        Bound b(__reduce_min_sync(~0u, of_warps[lane].x), __reduce_max_sync(~0u, of_warps[lane].y));
#pragma unroll
        for (u32 c = 0; c < 4; c++)
            if (x[c] >= b.floor) this->count(0, b.digit(x[c]));
        return b;
    }
    // Keeps what reaches `low`, and counts its first digit; the first step is on its way.
    DEVICE void keep() {
        constexpr u32 WIDE = STEP / 32, FOURS = WIDE / 4;
        u32 lane = threadIdx.x & 31;
        // What is larger reaches it: both zeros have one image.
        float below = score_of(low == image(0.0f) ? low - 2 : low - 1);
        for (u32 step = 0; step < steps; step++) {
            wait();
            const float* x = own() + lane * WIDE;
            u32 bits = 0, i = run_at() + step * STEP + lane * WIDE;
#pragma unroll 2
            for (u32 j = 0; j < FOURS; j++) {
                // In turns, so that eight lanes read from all banks.
                u32 r = (j + lane * FOURS / 8) % FOURS;
                float4 v = *(const float4*)(x + r * 4);
                // Signs: none of zero, nor of the NaN that a difference with NaN is.
                u32 four = 0;
                four = __funnelshift_l(__float_as_uint(below - v.w), four, 1);
                four = __funnelshift_l(__float_as_uint(below - v.z), four, 1);
                four = __funnelshift_l(__float_as_uint(below - v.y), four, 1);
                four = __funnelshift_l(__float_as_uint(below - v.x), four, 1);
                bits |= four << 4 * r;
            }
            if (p.special(i, WIDE)) bits = (bits | p.forced(i)) & p.there(i) & Part::below(WIDE);
            u32 end = warp_scan(__popc(bits)), all = __shfl_sync(~0u, end, 31), at = 0;
            if (lane == 0 && all > 0) at = atomicAdd(taken, all);
            at = __shfl_sync(~0u, at, 0);
            if (lane == step) piece = make_uint2(at, all);
            if (at + all <= room && keeps()) {
                for (u32 to = at + end - __popc(bits); bits; bits &= bits - 1)
                    places[to++] = (u16)(step * STEP + lane * WIDE + __ffs(bits) - 1);
                __syncwarp();
                for (u32 c = lane; c < all; c += 32) {
                    u32 place = places[at + c], token = p.first + run_at() + place;
                    u32 key = token < p.sinks || token >= p.from ? INFINITE : image(own()[place - step * STEP]);
                    keys[at + c] = key, this->count(1, first_digit(key));
                }
            } else {
                for (; bits; bits &= bits - 1) {
                    u32 c = __ffs(bits) - 1;
                    this->count(1, first_digit(p.forced(i) >> c & 1 ? INFINITE : image(x[c])));
                }
            }
            __syncwarp();
            copy(step + 1);
        }
    }
    // f(number, image) of the warp's candidates in turn, 32 at a time; image 0 for none.
    template <class F> DEVICE void each(F f) const {
        u32 lane = threadIdx.x & 31;
        if (kept) {
            for (u32 step = 0; step < steps; step++) {
                u32 first = __shfl_sync(~0u, piece.x, step), end = first + __shfl_sync(~0u, piece.y, step);
                for (; first < end; first += 32) {
                    bool there = first + lane < end;
                    f(run_at() + (there ? places[first + lane] : 0), there ? keys[first + lane] : 0);
                }
            }
            return;
        }
        for (u32 i = run_at(); i < min(run_at() + run, p.n); i += 32) {
            u32 key = i + lane < p.n ? p.forced(i + lane) & 1 ? INFINITE : image(p.x[i + lane]) : 0;
            f(i + lane, key >= low ? key : 0);
        }
    }
    DEVICE bool last_bin(u32 key) const { return bottom <= key && key <= top; }
    DEVICE static u32& in_last() {
        __shared__ u32 n;
        return n;
    }

    // Candidates from `low` on, most of them at most `high`: the bin of the first digit is BINS - 2 for larger ones, but
    // for infinity.
    DEVICE void start(u32 smallest, u32 high) {
        low = smallest, shift = digit_shift(max(high, low) - low);
    }
    DEVICE static u32 digit_shift(u32 range) {
        u32 bits = 32 - __clz(range);
        return bits > 11 ? bits - 11 : 0;
    }
    DEVICE u32 first_digit(u32 key) const { return key == INFINITE ? BINS - 1 : min((key - low) >> shift, BINS - 2); }

    // Finds the k-th largest of the candidates, or the few among which it is. False where they are fewer than k, and
    // there are others.
    DEVICE bool find(u32 k) {
        if (threadIdx.x == 0) in_last() = 0;
        this->want = k;
        this->template search<CLUSTER>(1, true);
        kept = *taken <= room && keeps();
        if (this->total < k && low > LEAST) return false;
        bottom = this->found == BINS - 1 ? INFINITE : low + (this->found << shift);
        top = this->found >= BINS - 2 ? (this->found == BINS - 1 ? INFINITE : INFINITE - 1) : bottom + ((1u << shift) - 1);
        few = this->in_bin > this->want && this->in_bin <= 32 && top > bottom;
        for (u32 round = 2; round < HISTOGRAMS && this->in_bin > this->want && top > bottom && !few; round++) {
            u32 next = digit_shift(top - bottom);
            each([&](u32, u32 key) {
                if (last_bin(key)) this->count(round, (key - bottom) >> next);
            });
            this->template search<CLUSTER>(round, false);
            bottom += this->found << next, top = min(top, bottom + ((1u << next) - 1));
        }
        return true;
    }

    // Chosen are the larger ones and the first `want` of the last bin of the row.
    template <class Emit> DEVICE void write(Emit emit) {
        __shared__ uint2 warps[WARPS], block, last[32];
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, want = this->want, rank = CLUSTER ? cluster_rank() : 0;
        u32 below = (1u << lane) - 1, g = 0, e = 0;
        each([&](u32, u32 key) {
            g += key > top;
            if (!last_bin(key)) return;
            if (few) last[atomicAdd(&in_last(), 1)] = make_uint2(key, rank * WARPS + warp);
            else e++;
        });
        g = __reduce_add_sync(~0u, g), e = __reduce_add_sync(~0u, e);
        if (lane == 0) warps[warp] = make_uint2(g, e);
        __syncthreads();
        // In the warps before this one, and in the blocks before this one.
        uint2 c = warps[lane], all = make_uint2(__reduce_add_sync(~0u, c.x), __reduce_add_sync(~0u, c.y));
        u32 gb = __reduce_add_sync(~0u, lane < warp ? c.x : 0), eb = __reduce_add_sync(~0u, lane < warp ? c.y : 0);
        if (CLUSTER) {
            if (threadIdx.x == 0) block = all;
            cluster_sync();
            all.x = lane < cluster_size() ? remote_word(&block.x, lane) : 0;
            all.y = lane < cluster_size() ? remote_word(&block.y, lane) : 0;
            gb += __reduce_add_sync(~0u, lane < rank ? all.x : 0), eb += __reduce_add_sync(~0u, lane < rank ? all.y : 0);
            all.y = __reduce_add_sync(~0u, all.y);
        }
        if (few) {
            // The want-th largest of the last bin, by every warp.
            u32 n = this->in_bin, larger = 0;
            uint2 own = make_uint2(0, 0);
            if (CLUSTER) {
                u32 of_block = lane < cluster_size() ? remote_word(&in_last(), lane) : 0, i = lane;
                for (u32 b = 0; b < cluster_size(); b++) {
                    u32 m = __shfl_sync(~0u, of_block, b);
                    if (i < m) own = remote_words2(&last[i].x, b);
                    i = i < m ? ~0u : i - m;
                }
            } else if (lane < n) own = last[lane];
            for (u32 j = 0; j < n; j++) larger += __shfl_sync(~0u, own.x, j) > own.x;
            bottom = top = __reduce_min_sync(~0u, lane < n && larger < want ? own.x : ~0u);
            want -= __popc(__ballot_sync(~0u, own.x > top));
            bool before = own.y < rank * WARPS + warp;
            gb += __popc(__ballot_sync(~0u, before && own.x > top));
            eb += __popc(__ballot_sync(~0u, before && own.x == top));
            all.y = __popc(__ballot_sync(~0u, own.x == top));
        }
        if (CLUSTER) cluster_arrive_read();  // no block leaves before the others have read its memory
        if (all.y == want) {
            // The whole bin is chosen.
            gb += eb;
            each([&](u32 at, u32 key) {
                u32 chosen = __ballot_sync(~0u, key >= bottom);
                if (key >= bottom) emit(gb + __popc(chosen & below), p.first + at);
                gb += __popc(chosen);
            });
        } else {
            each([&](u32 at, u32 key) {
                u32 g = __ballot_sync(~0u, key > top), e = __ballot_sync(~0u, last_bin(key));
                u32 larger = gb + __popc(g & below), equal = eb + __popc(e & below);
                if (key > top) emit(larger + min(equal, want), p.first + at);
                else if (last_bin(key) && equal < want) emit(larger + equal, p.first + at);
                gb += __popc(g), eb += __popc(e);
            });
        }
        if (CLUSTER) cluster_wait();
    }
};
