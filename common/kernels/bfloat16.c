/* Products and the small operations between them in bfloat16, for CPUs that have its dot product (AVX512_BF16).
 *
 * Sums are float32 and rounded once. A row's result does not depend on the rows beside it. Matrices of weights lie as oneDNN packs
 * them: panels of 64 outputs, in each the inputs in pairs, [outputs / 64][inputs / 2][64][2], filled up with zeros to whole panels and
 * to a multiple of 32 inputs.
 */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef __AVX512BF16__
#error "no bfloat16 dot product"
#endif

typedef uint16_t bf16;
#define INLINE static inline __attribute__((always_inline))
#define LOG2_E 1.44269504f

enum { LANES = 16, PANEL = 64, MAX_ROWS = 64, TILE_ROWS = 6, TILE_PAIRS = 32, AHEAD = 2 };
enum { MAX_HEADS = 16, MAX_DIM = 256, KEYS = 64, CHUNK = 256, BLOCK_ROWS = 48 };

INLINE __mmask16 mask_of(long left) { return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1); }

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

INLINE __m512 load(const bf16 *x, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, x)); }

INLINE void store(bf16 *y, __mmask16 mask, __m512 x) { _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(x)); }

INLINE __m512bh pair_of(const bf16 *x)
{
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* 2^x: a polynomial for the fraction, nearly as exact as float32 itself. In this order of max a NaN stays one. */
INLINE __m512 power_of_two(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-127), x);
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, n), p = _mm512_set1_ps(1.540353e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1)), n);
}

/* Adds `count` input pairs to the sums of a tile of rows by vectors of outputs. Lines `from` to `to` of what every pair's four will be some
 * steps later are fetched: where several tiles work on the same weights, each fetches its part of the next. */
INLINE void tile(const int rows, const int vectors, const bf16 *x, long x_stride, const bf16 *w, long w_stride, long count,
                 float *sums, long sums_stride, int first, int from, int to)
{
    __m512 c[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) c[i][j] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * sums_stride + j * LANES);
    for (long k = 0; k < count; k++, w += w_stride, x += 2) {
        __m512bh b[4];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) b[j] = (__m512bh)_mm512_loadu_si512(w + j * 2 * LANES);
        for (int line = from; line < to; line++) _mm_prefetch((const char *)(w + AHEAD * TILE_PAIRS * w_stride) + line * 64, _MM_HINT_T0);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512bh a = pair_of(x + i * x_stride);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_dpbf16_ps(c[i][j], b[j], a);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) _mm512_store_ps(sums + i * sums_stride + j * LANES, c[i][j]);
}

/* The same for any number of rows up to six. */
INLINE void any_tile(int rows, const int vectors, const bf16 *x, long x_stride, const bf16 *w, long w_stride, long count,
                     float *sums, long sums_stride, int first, int from, int to)
{
    switch (rows) {
    case 1: tile(1, vectors, x, x_stride, w, w_stride, count, sums, sums_stride, first, from, to); break;
    case 2: tile(2, vectors, x, x_stride, w, w_stride, count, sums, sums_stride, first, from, to); break;
    case 3: tile(3, vectors, x, x_stride, w, w_stride, count, sums, sums_stride, first, from, to); break;
    case 4: tile(4, vectors, x, x_stride, w, w_stride, count, sums, sums_stride, first, from, to); break;
    case 5: tile(5, vectors, x, x_stride, w, w_stride, count, sums, sums_stride, first, from, to); break;
    default: tile(6, vectors, x, x_stride, w, w_stride, count, sums, sums_stride, first, from, to);
    }
}

/* Sums [num_rows][64] of one panel: a stretch of weights small enough for the first-level cache is used by all rows before the next. */
static void panel(const bf16 *x, long x_stride, const bf16 *w, long num_pairs, int num_rows, float *sums)
{
    int num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long k = 0; k < num_pairs; k += TILE_PAIRS) {
        long count = num_pairs - k < TILE_PAIRS ? num_pairs - k : TILE_PAIRS;
        for (int t = 0, row = 0; t < num_tiles; t++) {
            int rows = (num_rows - row + num_tiles - t - 1) / (num_tiles - t), from = 4 * t / num_tiles, to = 4 * (t + 1) / num_tiles;
            any_tile(rows, 4, x + row * x_stride + 2 * k, x_stride, w + k * 2 * PANEL, 2 * PANEL, count, sums + row * PANEL, PANEL, k == 0, from, to);
            row += rows;
        }
    }
}

/* y [num_rows, num_outputs] = x [num_rows, num_inputs] times the packed weights, + bias and + residual where they are given.
 * num_rows at most 64, num_inputs even. */
void linear(const bf16 *x, long x_stride, const bf16 *weights, const bf16 *bias, const bf16 *residual, bf16 *y,
            int num_rows, int num_outputs, int num_inputs, int num_threads)
{
    long panel_size = (long)(num_inputs + 31) / 32 * 32 * PANEL;
    int num_panels = (num_outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int p = 0; p < num_panels; p++) {
        float sums[MAX_ROWS * PANEL] __attribute__((aligned(64)));
        panel(x, x_stride, weights + p * panel_size, num_inputs / 2, num_rows, sums);
        for (long n = (long)p * PANEL; n < num_outputs && n < (p + 1L) * PANEL; n += LANES) {
            __mmask16 mask = mask_of(num_outputs - n);
            __m512 offset = bias ? load(bias + n, mask) : _mm512_setzero_ps();
            for (int i = 0; i < num_rows; i++) {
                long at = (long)i * num_outputs + n;
                __m512 value = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL + n % PANEL), offset);
                store(y + at, mask, residual ? _mm512_add_ps(value, load(residual + at, mask)) : value);
            }
        }
    }
}

/* y = x / rms(x) * weight, row by row. */
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, float eps, long num_rows, long width, int num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++) {
        const bf16 *row = x + i * width;
        __m512 squares = _mm512_setzero_ps();
        for (long j = 0; j < width; j += LANES) {
            __m512 value = load(row + j, mask_of(width - j));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
        for (long j = 0; j < width; j += LANES) {
            __mmask16 mask = mask_of(width - j);
            store(y + i * width + j, mask, _mm512_mul_ps(_mm512_mul_ps(load(row + j, mask), scale), load(weight + j, mask)));
        }
    }
}

/* y [num_rows, width] = silu(gate) * up, where x [num_rows, 2 * width] is gate and up side by side. */
void silu_mul(const bf16 *x, bf16 *y, long num_rows, long width, int num_threads)
{
    const __m512 one = _mm512_set1_ps(1);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++)
        for (long j = 0; j < width; j += LANES) {
            __mmask16 mask = mask_of(width - j);
            __m512 gate = load(x + 2 * i * width + j, mask), up = load(x + (2 * i + 1) * width + j, mask);
            __m512 divisor = _mm512_add_ps(one, power_of_two(_mm512_mul_ps(gate, _mm512_set1_ps(-LOG2_E))));
            store(y + i * width + j, mask, _mm512_mul_ps(_mm512_div_ps(gate, divisor), up));
        }
}

/* Turns the first `num_heads` heads of each row in place: entry i with entry i + dim / 2. cos and signed_sin are [num_rows, dim]. */
void rotate(bf16 *x, long stride, const float *cos, const float *signed_sin, long num_rows, int num_heads, int dim, int num_threads)
{
    int half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++)
        for (int h = 0; h < num_heads; h++)
            for (int j = 0; j < half; j += LANES) {
                bf16 *low = x + i * stride + h * dim + j, *high = low + half;
                const float *c = cos + i * dim + j, *s = signed_sin + i * dim + j;
                __mmask16 mask = mask_of(half - j);
                __m512 a = load(low, mask), b = load(high, mask);
                __m512 turned_b = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(mask, s + half));
                store(low, mask, _mm512_fmadd_ps(a, _mm512_maskz_loadu_ps(mask, c), _mm512_mul_ps(b, _mm512_maskz_loadu_ps(mask, s))));
                store(high, mask, _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(mask, c + half), turned_b));
            }
}

/* Scores of up to 64 keys, one vector a key with a query head in each lane; returns the greatest of each head. Eight keys at a time
 * share the loads of the queries and hide the latency of the product; those at the places `ahead` are fetched meanwhile. */
INLINE __m512 score(const bf16 *keys, const long *places, const long *ahead, int count, const int32_t *q, int dim, float scale, __m512 *scores)
{
    __m512 greatest = _mm512_set1_ps(-INFINITY);
    for (int t = 0; t < count; t += 8) {
        __m512 sums[8];
        for (int j = 0; j < 8; j++) {
            sums[j] = _mm512_setzero_ps();
            for (int d = 0; d < dim; d += 2 * LANES) _mm_prefetch((const char *)(keys + ahead[t + j] + d), _MM_HINT_T0);
        }
        for (int d = 0; d < dim / 2; d++) {
            __m512bh query = (__m512bh)_mm512_load_si512(q + d * MAX_HEADS);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) sums[j] = _mm512_dpbf16_ps(sums[j], query, pair_of(keys + places[t + j] + 2 * d));
        }
        for (int j = 0; j < 8; j++) {
            scores[t + j] = _mm512_mul_ps(sums[j], _mm512_set1_ps(scale));
            greatest = _mm512_max_ps(greatest, scores[t + j]);
        }
    }
    return greatest;
}

/* Weights of two keys side by side, as the product of pairs wants them. */
INLINE __m512i pair_weights(__m512 first, __m512 second)
{
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first)), high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Adds the values of pairs of keys, weighted, to the sums [heads][dim], which are scaled first. Eight heads by 32 entries at a time stay in
 * registers; interleaving two values leaves every four of their entries at another place, see `in_order`. */
INLINE void weigh(const bf16 *values, const long *places, const long *ahead, int num_pairs, const int32_t *weights, const float *shrink,
                  int num_heads, int dim, float *sums)
{
    for (int h = 0; h < num_heads; h += 8)
        for (int d = 0; d < dim; d += 2 * LANES) {
            __m512 c[8][2];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++)
                    c[i][j] = _mm512_mul_ps(_mm512_load_ps(sums + (h + i) * dim + d + j * LANES), _mm512_set1_ps(shrink[h + i]));
            for (int t = 0; t < num_pairs; t++) {
                __m512i first = _mm512_loadu_si512(values + places[2 * t] + d), second = _mm512_loadu_si512(values + places[2 * t + 1] + d);
                __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second), high = (__m512bh)_mm512_unpackhi_epi16(first, second);
                _mm_prefetch((const char *)(values + ahead[2 * t] + d), _MM_HINT_T0);
                _mm_prefetch((const char *)(values + ahead[2 * t + 1] + d), _MM_HINT_T0);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[t * MAX_HEADS + h + i]);
                    c[i][0] = _mm512_dpbf16_ps(c[i][0], low, weight);
                    c[i][1] = _mm512_dpbf16_ps(c[i][1], high, weight);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) _mm512_store_ps(sums + (h + i) * dim + d + j * LANES, c[i][j]);
        }
}

/* Undoes the interleaving: which of 32 sums belong to 16 entries that follow each other. */
INLINE __m512 in_order(const float *sums, int half)
{
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    return _mm512_permutex2var_ps(_mm512_load_ps(sums), _mm512_add_epi32(order, _mm512_set1_epi32(8 * half)), _mm512_load_ps(sums + LANES));
}

/* Copies rows of `width` to their slots. */
void scatter(const bf16 *x, long stride, bf16 *y, const int64_t *slots, long num_rows, long width)
{
    for (long i = 0; i < num_rows; i++) memcpy(y + slots[i] * width, x + i * stride, width * sizeof(bf16));
}

typedef struct {
    const bf16 *keys, *values;
    const int64_t *blocks;
    uint32_t block_size;
    long stride, length;
} Context;

/* Where the keys and values from `first` lie; beyond the last it is the last one's place. */
INLINE void locate(const Context *context, long first, long *places)
{
    for (int t = 0; t < KEYS; t++) {
        uint32_t token = (uint32_t)(first + t < context->length ? first + t : context->length - 1), size = context->block_size;
        places[t] = (context->blocks[token / size] * size + token % size) * context->stride;
    }
}

/* One key head of one sequence: the queries of its heads against its whole context, with a running maximum. */
static void attend(const Context *context, const bf16 *queries, int num_heads, int dim, bf16 *y)
{
    int32_t q[MAX_DIM / 2 * MAX_HEADS] __attribute__((aligned(64)));
    float sums[MAX_HEADS * MAX_DIM] __attribute__((aligned(64)));
    float shrink[MAX_HEADS] __attribute__((aligned(64)));
    long places[2][KEYS];
    int32_t weights[KEYS / 2 * MAX_HEADS] __attribute__((aligned(64)));
    __m512 scores[KEYS + 1], greatest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    memset(q, 0, dim / 2 * MAX_HEADS * sizeof *q);
    memset(sums, 0, MAX_HEADS * dim * sizeof *sums);
    for (int h = 0; h < num_heads; h++)
        for (int d = 0; d < dim / 2; d++) memcpy(q + d * MAX_HEADS + h, queries + h * dim + 2 * d, 4);
    locate(context, 0, places[0]);
    for (long first = 0; first < context->length; first += KEYS) {
        int count = context->length - first < KEYS ? (int)(context->length - first) : KEYS;
        long *here = places[first / KEYS % 2], *ahead = places[(first / KEYS + 1) % 2];
        locate(context, first + KEYS, ahead);
        __m512 best = _mm512_max_ps(greatest, score(context->keys, here, ahead, count, q, dim, LOG2_E / sqrtf(dim), scores));
        __m512 factor = power_of_two(_mm512_sub_ps(greatest, best));
        greatest = best;
        total = _mm512_mul_ps(total, factor);
        for (int t = 0; t < count; t++) {
            scores[t] = power_of_two(_mm512_sub_ps(scores[t], best));
            total = _mm512_add_ps(total, scores[t]);
        }
        scores[count] = _mm512_setzero_ps();
        int num_pairs = (count + 1) / 2;
        for (int t = 0; t < num_pairs; t++) _mm512_store_si512(weights + t * MAX_HEADS, pair_weights(scores[2 * t], scores[2 * t + 1]));
        _mm512_store_ps(shrink, factor);
        weigh(context->values, here, ahead, num_pairs, weights, shrink, num_heads, dim, sums);
    }
    _mm512_store_ps(shrink, total);
    for (int h = 0; h < num_heads; h++)
        for (int d = 0; d < dim; d += LANES)
            store(y + h * dim + d, 0xffff, _mm512_div_ps(in_order(sums + h * dim + d / (2 * LANES) * 2 * LANES, d / LANES % 2), _mm512_set1_ps(shrink[h])));
}

/* Attention of `num_seqs` sequences of one new token each over their blocks of keys and values
 * [num_blocks, block_size, num_kv_heads, dim]. The rows of q are `q_stride` long, those of y [num_seqs, num_heads, dim] one after
 * another; dim is a multiple of 32 up to 256, and up to 16 query heads share a key head. */
void decode_attention(const bf16 *q, long q_stride, const bf16 *keys, const bf16 *values, const int64_t *block_tables, long table_stride,
                      const int64_t *context_lens, bf16 *y, int num_seqs, int num_heads, int num_kv_heads, int dim, int block_size,
                      int num_threads)
{
    int group = num_heads / num_kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int s = 0; s < num_seqs; s++)
        for (int h = 0; h < num_kv_heads; h++) {
            Context context = {keys + h * dim, values + h * dim, block_tables + s * table_stride, block_size, (long)num_kv_heads * dim,
                               context_lens[s]};
            long at = (long)h * group * dim;
            attend(&context, q + s * q_stride + at, group, dim, y + (long)s * num_heads * dim + at);
        }
}

/* Keys as weights: panels of 64 keys, [panels][dim / 2][64][2]; what is beyond the last key is zero. */
static void pack_keys(const bf16 *keys, long stride, long length, int dim, bf16 *packed)
{
    const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)stride));
    for (long first = 0; first < length; first += PANEL, packed += PANEL * dim)
        for (int t = 0; t < PANEL; t += LANES) {
            __mmask16 mask = first + t < length ? mask_of(length - first - t) : 0;
            for (int d = 0; d < dim / 2; d++) {
                __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, rows, keys + (first + t) * stride + 2 * d, 2);
                _mm512_storeu_si512(packed + d * 2 * PANEL + 2 * t, pairs);
            }
        }
}

/* Values as weights, tokens being the inputs: [padded length / 2][dim][2]. */
static void pack_values(const bf16 *values, long stride, long length, int dim, bf16 *packed)
{
    for (long t = 0; t < (length + PANEL - 1) / PANEL * PANEL; t += 2, packed += 2 * dim)
        for (int d = 0; d < dim; d++) {
            packed[2 * d] = t < length ? values[t * stride + d] : 0;
            packed[2 * d + 1] = t + 1 < length ? values[(t + 1) * stride + d] : 0;
        }
}

typedef struct {
    float sums[BLOCK_ROWS * MAX_DIM] __attribute__((aligned(64)));
    __m512 totals[BLOCK_ROWS];
    float greatest[BLOCK_ROWS];
} Running;

/* Makes weights of one row's scores, of which `visible` count, and shrinks what the row has so far to the new maximum. */
INLINE void soften(float *scores, int num_panels, int visible, float scale, int dim, Running *running, int row, bf16 *weights)
{
    __m512 best = _mm512_set1_ps(running->greatest[row]), total = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (int j = 0; j < num_panels * PANEL; j += LANES) {
        float *place = scores + j / PANEL * TILE_ROWS * PANEL + j % PANEL;
        __mmask16 mask = j < visible ? mask_of(visible - j) : 0;
        __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask, _mm512_load_ps(place), factor);
        _mm512_store_ps(place, score);
        best = _mm512_max_ps(best, score);
    }
    float greatest = _mm512_reduce_max_ps(best);
    best = _mm512_set1_ps(greatest);
    for (int j = 0; j < num_panels * PANEL; j += LANES) {
        __m512 weight = power_of_two(_mm512_sub_ps(_mm512_load_ps(scores + j / PANEL * TILE_ROWS * PANEL + j % PANEL), best));
        total = _mm512_add_ps(total, weight);
        store(weights + j, 0xffff, weight);
    }
    __m512 shrink = power_of_two(_mm512_sub_ps(_mm512_set1_ps(running->greatest[row]), best));
    running->greatest[row] = greatest;
    running->totals[row] = _mm512_fmadd_ps(running->totals[row], shrink, total);
    for (int d = 0; d < dim; d += LANES) {
        float *sums = running->sums + row * dim + d;
        _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), shrink));
    }
}

/* Up to six query rows from `row` of the block against one chunk of keys; row r sees `visible` + r * `step` of them. */
static void attend_tile(const bf16 *q, long q_stride, int row, int rows, const bf16 *keys, const bf16 *values, int num_panels, int dim, float scale,
                        long visible, int step, Running *running)
{
    float scores[CHUNK * TILE_ROWS] __attribute__((aligned(64)));
    bf16 weights[TILE_ROWS * CHUNK] __attribute__((aligned(64)));
    for (int p = 0; p < num_panels; p++)
        any_tile(rows, 4, q + row * q_stride, q_stride, keys + p * PANEL * dim, 2 * PANEL, dim / 2, scores + p * TILE_ROWS * PANEL, PANEL, 1, 0, 0);
    for (int i = 0; i < rows; i++) {
        long seen = visible + (long)(row + i) * step;
        seen = seen < 0 ? 0 : seen > num_panels * PANEL ? num_panels * PANEL : seen;
        soften(scores + i * PANEL, num_panels, (int)seen, scale, dim, running, row + i, weights + i * CHUNK);
    }
    int d = 0;
    for (; d + 4 * LANES <= dim && dim - d != 5 * LANES; d += 4 * LANES)
        any_tile(rows, 4, weights, CHUNK, values + 2 * d, 2 * dim, num_panels * PANEL / 2, running->sums + row * dim + d, dim, 0, 0, 0);
    for (; d + 3 * LANES <= dim; d += 3 * LANES)
        any_tile(rows, 3, weights, CHUNK, values + 2 * d, 2 * dim, num_panels * PANEL / 2, running->sums + row * dim + d, dim, 0, 0, 0);
    for (; d + 2 * LANES <= dim; d += 2 * LANES)
        any_tile(rows, 2, weights, CHUNK, values + 2 * d, 2 * dim, num_panels * PANEL / 2, running->sums + row * dim + d, dim, 0, 0, 0);
    for (; d < dim; d += LANES)
        any_tile(rows, 1, weights, CHUNK, values + 2 * d, 2 * dim, num_panels * PANEL / 2, running->sums + row * dim + d, dim, 0, 0, 0);
}

/* A block of query rows of one head against all packed keys and values that it sees: row r sees `visible` + r * `step` of them. */
static void attend_block(const bf16 *q, long q_stride, int num_rows, const bf16 *keys, const bf16 *values, long length, int dim, long visible, int step,
                         bf16 *y, long y_stride)
{
    Running running;
    memset(running.sums, 0, (long)num_rows * dim * sizeof *running.sums);
    for (int i = 0; i < num_rows; i++) {
        running.totals[i] = _mm512_setzero_ps();
        running.greatest[i] = -INFINITY;
    }
    long last = visible + (long)(num_rows - 1) * step;
    length = last < length ? last : length;
    for (long first = 0; first < length; first += CHUNK) {
        long count = length - first < CHUNK ? length - first : CHUNK;
        int num_panels = (int)(count + PANEL - 1) / PANEL;
        for (int row = 0; row < num_rows; row += TILE_ROWS)
            attend_tile(q, q_stride, row, num_rows - row < TILE_ROWS ? num_rows - row : TILE_ROWS, keys + first * dim, values + first * dim, num_panels,
                        dim, LOG2_E / sqrtf(dim), visible - first, step, &running);
    }
    for (int i = 0; i < num_rows; i++) {
        __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(running.totals[i]));
        for (int d = 0; d < dim; d += LANES) store(y + i * y_stride + d, 0xffff, _mm512_div_ps(_mm512_load_ps(running.sums + i * dim + d), total));
    }
}

/* Attention of `num_seqs` sequences, whose rows follow each other: `query_len` rows of q and y each and `context_len` of keys and values, or,
 * where `causal`, the last `query_len` of these being the queries' own. q, keys and values are [.., heads, dim] with strides between rows,
 * y [num_seqs * query_len, num_heads, dim] is contiguous; dim is a multiple of 16 up to 256. The workspace holds keys and values of all
 * heads with lengths rounded up to 64. */
void attention(const bf16 *q, long q_stride, const bf16 *keys, const bf16 *values, long kv_stride, bf16 *y, bf16 *workspace, long num_seqs,
               long query_len, long context_len, int num_heads, int num_kv_heads, int dim, int causal, int num_threads)
{
    long size = (context_len + PANEL - 1) / PANEL * PANEL * dim, num_blocks = (query_len + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
#pragma omp for collapse(2) schedule(static)
        for (long s = 0; s < num_seqs; s++)
            for (long h = 0; h < num_kv_heads; h++) {
                bf16 *packed = workspace + (s * num_kv_heads + h) * 2 * size;
                pack_keys(keys + s * context_len * kv_stride + h * dim, kv_stride, context_len, dim, packed);
                pack_values(values + s * context_len * kv_stride + h * dim, kv_stride, context_len, dim, packed + size);
            }
#pragma omp for collapse(3) schedule(dynamic)
        for (long s = 0; s < num_seqs; s++)
            for (long h = 0; h < num_heads; h++)
                for (long b = 0; b < num_blocks; b++) {
                    const bf16 *packed = workspace + (s * num_kv_heads + h * num_kv_heads / num_heads) * 2 * size;
                    long row = b * BLOCK_ROWS, left = query_len - row;
                    long visible = causal ? context_len - query_len + row + 1 : context_len;
                    attend_block(q + (s * query_len + row) * q_stride + h * dim, q_stride, left < BLOCK_ROWS ? (int)left : BLOCK_ROWS, packed, packed + size,
                                 context_len, dim, visible, causal, y + ((s * query_len + row) * num_heads + h) * dim, (long)num_heads * dim);
                }
    }
}
