/* Attention of many queries per sequence. Keys and values are packed as weights once; then blocks
 * of queries pass over them in chunks, with a running softmax. */

#include "bfloat16.h"

enum { CHUNK = 256, BLOCK_ROWS = 48 };
_Static_assert(CONTEXT_PADDING == PANEL, "packed keys fill their part of the workspace");

/* Packs keys as weights, in panels of 64 keys: [panels][dim / 2][64][2]. After the last key there
 * are zeros. */
static void pack_keys(const bf16 *keys, long stride, long length, int dim, bf16 *packed)
{
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i rows = _mm512_mullo_epi32(numbers, _mm512_set1_epi32((int)stride));
    for (long first = 0; first < length; first += PANEL, packed += PANEL * dim)
        for (int t = 0; t < PANEL; t += LANES) {
            __mmask16 mask = first + t < length ? mask_of(length - first - t) : 0;
            for (int d = 0; d < dim / 2; d++) {
                const bf16 *source = keys + (first + t) * stride + 2 * d;
                touch_lanes(source, stride * sizeof *source, mask);
                __m512i pairs =
                    _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, rows, source, 2);
                _mm512_storeu_si512(packed + d * 2 * PANEL + 2 * t, pairs);
            }
        }
}

/* The entries of a head, filled up to whole vectors. */
INLINE int padded(int dim) { return (dim + LANES - 1) / LANES * LANES; }

/* Packs values as weights whose inputs are the tokens: [padded length / 2][padded dim][2]. After
 * the last token and the last entry there are zeros. */
static void pack_values(const bf16 *values, long stride, long length, int dim, bf16 *packed)
{
    int width = padded(dim);
    for (long t = 0; t < (length + PANEL - 1) / PANEL * PANEL; t += 2, packed += 2 * width) {
        for (int d = 0; d < dim; d++) {
            packed[2 * d] = t < length ? values[t * stride + d] : 0;
            packed[2 * d + 1] = t + 1 < length ? values[(t + 1) * stride + d] : 0;
        }
        memset(packed + 2 * dim, 0, 2 * (width - dim) * sizeof *packed);
    }
}

/* What is added to the scores, besides the product of queries and keys. Each may be null. */
typedef struct {
    const bf16 *bias; /* [queries, context_len] */
    long bias_stride;
    const float *mask; /* [context_len] */
} Added;

/* The state of the running softmax of a block of rows. */
typedef struct {
    float sums[BLOCK_ROWS * MAX_HEAD_DIM] __attribute__((aligned(64))); /* [rows][padded dim] */
    __m512 totals[BLOCK_ROWS]; /* the sum of a row's weights is the sum of the lanes */
    float greatest[BLOCK_ROWS];
} Running;

/* Turns one row's scores, of which the first `visible` count, into weights. Rescales the row's
 * state to the new greatest score. */
INLINE void softmax_row(float *scores, int num_panels, int visible, float scale, int width,
                        const bf16 *bias, const float *key_mask, Running *running, int row,
                        bf16 *weights)
{
    __m512 best = _mm512_set1_ps(running->greatest[row]);
    __m512 total = _mm512_setzero_ps();
    __m512 factor = _mm512_set1_ps(scale);
    for (int j = 0; j < num_panels * PANEL; j += LANES) {
        float *place = scores + j / PANEL * TILE_ROWS * PANEL + j % PANEL;
        __mmask16 mask = j < visible ? mask_of(visible - j) : 0;
        __m512 score =
            _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask, _mm512_load_ps(place), factor);
        if (bias) score = _mm512_fmadd_ps(load(bias + j, mask), _mm512_set1_ps(LOG2_E), score);
        if (key_mask) score = _mm512_add_ps(load_floats(key_mask + j, mask), score);
        _mm512_store_ps(place, score);
        best = _mm512_max_ps(best, score);
    }
    float greatest = _mm512_reduce_max_ps(best);
    best = _mm512_set1_ps(greatest);
    for (int j = 0; j < num_panels * PANEL; j += LANES) {
        const float *place = scores + j / PANEL * TILE_ROWS * PANEL + j % PANEL;
        __m512 weight = power_of_two(_mm512_sub_ps(_mm512_load_ps(place), best));
        total = _mm512_add_ps(total, weight);
        store(weights + j, 0xffff, weight);
    }
    __m512 shrink = power_of_two(_mm512_sub_ps(_mm512_set1_ps(running->greatest[row]), best));
    running->greatest[row] = greatest;
    running->totals[row] = _mm512_fmadd_ps(running->totals[row], shrink, total);
    for (int d = 0; d < width; d += LANES) {
        float *sums = running->sums + row * width + d;
        _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), shrink));
    }
}

/* Up to six query rows from `row` of the block on, against one chunk of keys. Row r of the block
 * sees `visible` + r * `step` keys of the chunk. */
static void attend_tile(const bf16 *q, long q_stride, int row, int rows, const bf16 *keys,
                        const bf16 *values, int num_panels, int dim, long visible, int step,
                        const Added *added, Running *running)
{
    int width = padded(dim);
    float scores[CHUNK * TILE_ROWS] __attribute__((aligned(64)));
    bf16 weights[TILE_ROWS * CHUNK] __attribute__((aligned(64)));
    for (int p = 0; p < num_panels; p++)
        any_tile(rows, 4, q + row * q_stride, q_stride, keys + p * PANEL * dim, 2 * PANEL, dim / 2,
                 scores + p * TILE_ROWS * PANEL, PANEL, 1, 0, 0);
    for (int i = 0; i < rows; i++) {
        long seen = visible + (long)(row + i) * step;
        seen = seen < 0 ? 0 : seen > num_panels * PANEL ? num_panels * PANEL : seen;
        softmax_row(scores + i * PANEL, num_panels, (int)seen, LOG2_E / sqrtf(dim), width,
                    added->bias ? added->bias + (row + i) * added->bias_stride : 0, added->mask,
                    running, row + i, weights + i * CHUNK);
    }
    long num_pairs = num_panels * PANEL / 2;
    float *sums = running->sums + row * width;
    int d = 0;
#define WEIGH(vectors)                                                                            \
    any_tile(rows, vectors, weights, CHUNK, values + 2 * d, 2 * width, num_pairs, sums + d, width, \
             0, 0, 0)
    /* 80 entries are tiles of 48 and 32, because one of 64 and one of 16 would be slower. */
    for (; d + 4 * LANES <= width && width - d != 5 * LANES; d += 4 * LANES) WEIGH(4);
    for (; d + 3 * LANES <= width; d += 3 * LANES) WEIGH(3);
    for (; d + 2 * LANES <= width; d += 2 * LANES) WEIGH(2);
    for (; d < width; d += LANES) WEIGH(1);
#undef WEIGH
}

/* A block of query rows of one head against all packed keys and values that it sees. Row r sees
 * `visible` + r * `step` keys. */
static void attend_block(const bf16 *q, long q_stride, int num_rows, const bf16 *keys,
                         const bf16 *values, long length, int dim, long visible, int step, Added added, bf16 *y,
                         long y_stride)
{
    Running running;
    int width = padded(dim);
    memset(running.sums, 0, (long)num_rows * width * sizeof *running.sums);
    for (int i = 0; i < num_rows; i++) {
        running.totals[i] = _mm512_setzero_ps();
        running.greatest[i] = LEAST_SCORE;
    }
    long last = visible + (long)(num_rows - 1) * step;
    length = last < length ? last : length;
    for (long first = 0; first < length; first += CHUNK) {
        long count = length - first < CHUNK ? length - first : CHUNK;
        int num_panels = (int)(count + PANEL - 1) / PANEL;
        for (int row = 0; row < num_rows; row += TILE_ROWS) {
            int rows = num_rows - row < TILE_ROWS ? num_rows - row : TILE_ROWS;
            attend_tile(q, q_stride, row, rows, keys + first * dim, values + first * width,
                        num_panels, dim, visible - first, step, &added, &running);
        }
        if (added.bias) added.bias += CHUNK;
        if (added.mask) added.mask += CHUNK;
    }
    for (int i = 0; i < num_rows; i++) {
        __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(running.totals[i]));
        for (int d = 0; d < dim; d += LANES)
            store(y + i * y_stride + d, mask_of(dim - d),
                  _mm512_div_ps(_mm512_load_ps(running.sums + i * width + d), total));
    }
}

/* Attention of `num_seqs` sequences of equal lengths, whose rows follow each other. A sequence has
 * `query_len` rows of q and y and `context_len` of keys and values. If `causal`, the last
 * `query_len` keys belong to the queries themselves.
 *
 * q, keys and values are [.., heads, dim] with strides between rows, y [num_seqs * query_len,
 * num_heads, dim] is contiguous. dim is even and at most MAX_HEAD_DIM. The bias [num_heads,
 * query_len, context_len] and the mask [num_seqs, context_len], which is 0 or -infinity, are added
 * to the scaled scores; both may be null. The bias has strides between heads and between queries. The workspace holds keys and values of all heads, with
 * contexts rounded up to CONTEXT_PADDING and heads to HEAD_PADDING. */
void attention(const bf16 *q, long q_stride, const bf16 *keys, const bf16 *values, long kv_stride,
               const bf16 *bias, long bias_head_stride, long bias_stride, const float *mask,
               bf16 *y, bf16 *workspace, long num_seqs, long query_len, long context_len, int num_heads, int num_kv_heads, int dim,
               int causal, int num_threads)
{
    long size =
        (context_len + CONTEXT_PADDING - 1) / CONTEXT_PADDING * CONTEXT_PADDING * padded(dim);
    long num_blocks = (query_len + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
#pragma omp for collapse(2) schedule(static)
        for (long s = 0; s < num_seqs; s++)
            for (long h = 0; h < num_kv_heads; h++) {
                bf16 *packed = workspace + (s * num_kv_heads + h) * 2 * size;
                pack_keys(keys + s * context_len * kv_stride + h * dim, kv_stride, context_len, dim,
                          packed);
                pack_values(values + s * context_len * kv_stride + h * dim, kv_stride, context_len,
                            dim, packed + size);
            }
#pragma omp for collapse(3) schedule(dynamic)
        for (long s = 0; s < num_seqs; s++)
            for (long h = 0; h < num_heads; h++)
                for (long b = 0; b < num_blocks; b++) {
                    long kv_head = h * num_kv_heads / num_heads;
                    const bf16 *packed = workspace + (s * num_kv_heads + kv_head) * 2 * size;
                    long row = b * BLOCK_ROWS;
                    long left = query_len - row;
                    long at = s * query_len + row;
                    int rows = left < BLOCK_ROWS ? (int)left : BLOCK_ROWS;
                    long visible = causal ? context_len - query_len + row + 1 : context_len;
                    Added added = {bias ? bias + h * bias_head_stride + row * bias_stride : 0,
                                   bias_stride, mask ? mask + s * context_len : 0};
                    attend_block(q + at * q_stride + h * dim, q_stride, rows, packed, packed + size,
                                 context_len, dim, visible, causal, added, y + (at * num_heads + h) * dim,
                                 (long)num_heads * dim);
                }
    }
}
