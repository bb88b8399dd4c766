/* Attention: keys and values are packed as weights, one chunk at a time, and tiles of queries
 * multiply them, with a running softmax. */

#include <immintrin.h>

#include "bfloat16.h"

enum { CHUNK = 256, BLOCK_ROWS = 60 };
_Static_assert(CHUNK % CONTEXT_PADDING == 0 && CONTEXT_PADDING % PANEL == 0,
               "packed chunks fill the workspace without gaps");
_Static_assert(MAX_GROUP <= BLOCK_ROWS, "the heads of a group fit in one block");

/* Transposes eight rows of eight pairs. */
INLINE void transpose(__m256i r[8])
{
    __m256i pairs[8];
    __m256i quads[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            quads[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
            quads[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
    }
}

static const bf16 ZEROS[MAX_HEAD_DIM];

/* The entries of a head, filled up to whole panels. */
INLINE int filled(int dim) { return (dim + PANEL - 1) / PANEL * PANEL; }

/* Returns up to 16 entries, of which `left` exist; the others are zero. */
INLINE __m256i load_entries(const bf16 *x, int left)
{
    bf16 few[PANEL] = {0};
    if (left >= PANEL) return _mm256_loadu_si256((const __m256i *)x);
    memcpy(few, x, left * sizeof *x);
    return _mm256_loadu_si256((const __m256i *)few);
}

/* The number of keys in a packed chunk, if `count` keys are left. */
INLINE int padded(long count)
{
    return (int)((count < CHUNK ? count : CHUNK) + PANEL - 1) / PANEL * PANEL;
}

/* Packs keys as weights, in panels of 16 keys, and values as weights whose inputs are the tokens,
 * in panels of 16 entries. After the last token and the last entry there are zeros. */
static void pack(const bf16 *keys, const bf16 *values, const long *places, int count, int dim,
                 bf16 *packed_keys, bf16 *packed_values)
{
    int size = padded(count);
    int width = filled(dim);
    for (int t = 0; t < size; t += LANES)
        for (int d = 0; d < dim; d += PANEL) {
            __m256i r[LANES];
            for (int i = 0; i < LANES; i++) {
                const bf16 *key = t + i < count ? keys + places[t + i] : ZEROS;
                r[i] = load_entries(key + d, dim - d);
            }
            transpose(r);
            bf16 *place = packed_keys + t / PANEL * PANEL * width + d * PANEL + t % PANEL * 2;
            for (int i = 0; i < LANES; i++)
                _mm256_storeu_si256((__m256i *)(place + i * 2 * PANEL), r[i]);
        }
    for (int t = 0; t < size; t += 2) {
        const bf16 *even = t < count ? values + places[t] : ZEROS;
        const bf16 *odd = t + 1 < count ? values + places[t + 1] : ZEROS;
        for (int d = 0; d < dim; d += PANEL) {
            __m256i a = load_entries(even + d, dim - d);
            __m256i b = load_entries(odd + d, dim - d);
            __m256i low = _mm256_unpacklo_epi16(a, b);
            __m256i high = _mm256_unpackhi_epi16(a, b);
            __m256i first = _mm256_permute2x128_si256(low, high, 0x20);
            __m256i second = _mm256_permute2x128_si256(low, high, 0x31);
            bf16 *place = packed_values + d * size + t * PANEL;
            _mm256_storeu_si256((__m256i *)place, first);
            _mm256_storeu_si256((__m256i *)(place + PANEL), second);
        }
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
    float sums[BLOCK_ROWS * MAX_HEAD_DIM] __attribute__((aligned(64))); /* [rows][filled dim] */
    float q[BLOCK_ROWS * MAX_HEAD_DIM] __attribute__((aligned(64)));    /* the same, scaled */
    float totals[BLOCK_ROWS];
    float greatest[BLOCK_ROWS];
} Running;

/* Starts a block. The queries are scaled so that a weight is two to the power of a score. */
static void begin(Running *running, const bf16 *q, long q_stride, int num_rows, int dim)
{
    float scale = LOG2_E / sqrtf(dim);
    int width = filled(dim);
    for (int i = 0; i < num_rows; i++) {
        running->totals[i] = 0;
        running->greatest[i] = LEAST_SCORE;
        for (int d = 0; d < dim; d++)
            running->q[i * width + d] = widen(q[i * q_stride + d]) * scale;
        for (int d = 0; d < width; d++) running->sums[i * width + d] = 0;
    }
}

/* Writes the results of a block. */
static void end(const Running *running, int num_rows, int dim, bf16 *y, long y_stride)
{
    for (int i = 0; i < num_rows; i++)
        for (int d = 0; d < dim; d++)
            y[i * y_stride + d] = narrow(running->sums[i * filled(dim) + d] / running->totals[i]);
}

/* Adds to the first `visible` scores of one row what must be added from the chunk's `first` key
 * on. */
static void add(const Added *added, int row, long first, float *scores, int visible)
{
    const bf16 *bias = added->bias ? added->bias + row * added->bias_stride + first : 0;
    const float *mask = added->mask ? added->mask + first : 0;
    for (int j = 0; bias && j < visible; j++) scores[j] += widen(bias[j]) * LOG2_E;
    for (int j = 0; mask && j < visible; j++) scores[j] += mask[j];
}

/* Turns one row's scores, of which the first `visible` count, into weights. Rescales the row's
 * state to the new greatest score. */
static void softmax_row(float *scores, int count, int visible, int width, Running *running, int row)
{
    float best = running->greatest[row];
    float total = 0;
#pragma omp simd reduction(max : best)
    for (int j = 0; j < visible; j++) best = scores[j] > best ? scores[j] : best;
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < visible; j++) {
        scores[j] = power_of_two(scores[j] - best);
        total += scores[j];
    }
    for (int j = visible; j < count; j++) scores[j] = 0;
    float shrink = power_of_two(running->greatest[row] - best);
    running->greatest[row] = best;
    running->totals[row] = running->totals[row] * shrink + total;
    for (int d = 0; d < width; d++) running->sums[row * width + d] *= shrink;
}

/* A block of rows against the first `count` keys of a packed chunk of `size` keys, which begins with
 * key `first`. Row r sees `visible` + r * `step` of them. */
static void attend(Running *running, int num_rows, const bf16 *keys, const bf16 *values, int size,
                   int count, int dim, long visible, int step, const Added *added, long first)
{
    int width = filled(dim);
    int used = padded(count);
    int num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int t = 0, row = 0; t < num_tiles; t++) {
        float scores[TILE_ROWS * CHUNK] __attribute__((aligned(64)));
        int rows = (num_rows - row + num_tiles - t - 1) / (num_tiles - t);
        for (int j = 0; j < used; j += PANEL)
            all_rows(tiles, rows, running->q + row * width, width, keys + j * width, AHEAD_BYTES,
                     dim / 2, scores + j, CHUNK, 1);
        for (int i = 0; i < rows; i++) {
            long seen = visible + (long)(row + i) * step;
            seen = seen < 0 ? 0 : seen > count ? count : seen;
            add(added, row + i, first, scores + i * CHUNK, (int)seen);
            softmax_row(scores + i * CHUNK, used, (int)seen, width, running, row + i);
        }
        for (int d = 0; d < dim; d += PANEL)
            all_rows(tiles, rows, scores, CHUNK, values + d * size, AHEAD_BYTES, used / 2,
                     running->sums + row * width + d, width, 0);
        row += rows;
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
    int width = filled(dim);
    long size = (context_len + CONTEXT_PADDING - 1) / CONTEXT_PADDING * CONTEXT_PADDING * width;
    long num_blocks = (query_len + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
#pragma omp for collapse(3) schedule(static)
        for (long s = 0; s < num_seqs; s++)
            for (long h = 0; h < num_kv_heads; h++)
                for (long first = 0; first < context_len; first += CHUNK) {
                    bf16 *packed = workspace + (s * num_kv_heads + h) * 2 * size + first * width;
                    long places[CHUNK];
                    long at = (s * context_len + first) * kv_stride + h * dim;
                    for (int t = 0; t < CHUNK; t++) places[t] = t * kv_stride;
                    pack(keys + at, values + at, places,
                         context_len - first < CHUNK ? context_len - first : CHUNK, dim, packed,
                         packed + size);
                }
#pragma omp for collapse(3) schedule(dynamic)
        for (long s = 0; s < num_seqs; s++)
            for (long h = 0; h < num_heads; h++)
                for (long b = 0; b < num_blocks; b++) {
                    Running running;
                    long kv_head = h * num_kv_heads / num_heads;
                    const bf16 *packed = workspace + (s * num_kv_heads + kv_head) * 2 * size;
                    long row = b * BLOCK_ROWS;
                    long at = s * query_len + row;
                    long rows = query_len - row < BLOCK_ROWS ? query_len - row : BLOCK_ROWS;
                    long visible = causal ? context_len - query_len + row + 1 : context_len;
                    long length = visible + (rows - 1) * causal;
                    Added added = {bias ? bias + h * bias_head_stride + row * bias_stride : 0,
                                   bias_stride, mask ? mask + s * context_len : 0};
                    begin(&running, q + at * q_stride + h * dim, q_stride, rows, dim);
                    for (long first = 0; first < length; first += CHUNK)
                        attend(&running, rows, packed + first * width,
                               packed + size + first * width, padded(context_len - first),
                               length - first < CHUNK ? length - first : CHUNK, dim,
                               visible - first, causal, &added, first);
                    end(&running, rows, dim, y + (at * num_heads + h) * dim, (long)num_heads * dim);
                }
    }
}

/* Writes what `merge_task` merges with the other parts. */
static void end_part(const Running *running, int num_rows, int dim, float *partial)
{
    for (int i = 0; i < num_rows; i++, partial += dim + 2) {
        memcpy(partial, running->sums + i * dim, dim * sizeof *partial);
        partial[dim] = running->totals[i];
        partial[dim + 1] = running->greatest[i];
    }
}

/* Reads keys and values in the blocks where they lie. dim is a multiple of 32. */
void attend_part(const Paged *paged, long seq, int kv_head, long first, long count, const bf16 *q,
                 bf16 *y, float *partial)
{
    Running running;
    const Added nothing = {0};
    bf16 packed[2 * CHUNK * MAX_HEAD_DIM] __attribute__((aligned(64)));
    int dim = paged->dim;
    int group = paged->num_heads / paged->num_kv_heads;
    int block_size = paged->block_size;
    long stride = (long)paged->num_kv_heads * dim;
    long last = first + count;
    const bf16 *keys = paged->keys + kv_head * dim;
    const bf16 *values = paged->values + kv_head * dim;
    begin(&running, q, dim, group, dim);
    for (; first < last; first += CHUNK) {
        long places[CHUNK];
        int size = last - first < CHUNK ? (int)(last - first) : CHUNK;
        for (int t = 0; t < size; t++) {
            uint32_t token = (uint32_t)(first + t);
            int64_t block = paged->tables[seq * paged->table_stride + token / block_size];
            places[t] = (block * block_size + token % block_size) * stride;
            /* The lines of a token alternate with those of other heads, so the processor's own
             * prefetchers do not detect a stream. */
            for (int d = 0; d < dim; d += 32) {
                __builtin_prefetch(keys + places[t] + d, 0, 2);
                __builtin_prefetch(values + places[t] + d, 0, 2);
            }
        }
        pack(keys, values, places, size, dim, packed, packed + CHUNK * dim);
        attend(&running, group, packed, packed + CHUNK * dim, padded(size), size, dim, size, 0,
               &nothing, 0);
    }
    if (partial)
        end_part(&running, group, dim, partial);
    else
        end(&running, group, dim, y, dim);
}
