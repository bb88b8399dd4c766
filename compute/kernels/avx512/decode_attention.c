/* Attention of one new token per sequence, which reads keys and values in the blocks where they
 * lie. */

#include "bfloat16.h"

enum {
    KEYS = 64,    /* keys that are worked on at a time */
    FEW_HEADS = 4 /* up to so many query heads of a key head are faster one by one */
};

/* One sequence's keys and values of one key head. */
typedef struct {
    const bf16 *keys;
    const bf16 *values;
    const int64_t *blocks;
    uint32_t block_size;
    long stride; /* from one token to the next */
    long length;
} Context;

/* Computes the scores of up to 64 keys, a vector per key with a query head in each lane, and
 * returns the greatest score of each head. Eight keys at a time share the loads of the queries and
 * hide the latency of the product. Meanwhile the keys at the places `ahead` are prefetched. */
INLINE __m512 score(const bf16 *keys, const long *places, const long *ahead, int count,
                    const int32_t *q, int dim, float scale, __m512 *scores)
{
    __m512 greatest = _mm512_set1_ps(-INFINITY);
    for (int t = 0; t < count; t += 8) {
        __m512 sums[8];
        for (int j = 0; j < 8; j++) {
            sums[j] = _mm512_setzero_ps();
            for (int d = 0; d < dim; d += 2 * LANES)
                _mm_prefetch((const char *)(keys + ahead[t + j] + d), _MM_HINT_T1);
        }
        for (int d = 0; d < dim / 2; d++) {
            __m512bh query = (__m512bh)_mm512_load_si512(q + d * MAX_GROUP);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                sums[j] = _mm512_dpbf16_ps(sums[j], query, pair_of(keys + places[t + j] + 2 * d));
        }
        for (int j = 0; j < 8; j++) {
            scores[t + j] = _mm512_mul_ps(sums[j], _mm512_set1_ps(scale));
            greatest = _mm512_max_ps(greatest, scores[t + j]);
        }
    }
    return greatest;
}

/* Places the weights of two keys side by side, as the product of pairs needs them. */
INLINE __m512i pair_weights(__m512 first, __m512 second)
{
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Scales the sums [heads][dim] by `shrink`, then adds the weighted values of pairs of keys. Eight
 * heads by 32 entries at a time stay in registers. Interleaving two values moves every four of
 * their entries to another place, which `in_order` undoes. */
INLINE void weigh(const bf16 *values, const long *places, const long *ahead, int num_pairs,
                  const int32_t *weights, const float *shrink, int num_heads, int dim, float *sums)
{
    for (int h = 0; h < num_heads; h += 8)
        for (int d = 0; d < dim; d += 2 * LANES) {
            __m512 c[8][2];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++)
                    c[i][j] = _mm512_mul_ps(_mm512_load_ps(sums + (h + i) * dim + d + j * LANES),
                                            _mm512_set1_ps(shrink[h + i]));
            for (int t = 0; t < num_pairs; t++) {
                __m512i first = _mm512_loadu_si512(values + places[2 * t] + d);
                __m512i second = _mm512_loadu_si512(values + places[2 * t + 1] + d);
                __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
                __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
                _mm_prefetch((const char *)(values + ahead[2 * t] + d), _MM_HINT_T1);
                _mm_prefetch((const char *)(values + ahead[2 * t + 1] + d), _MM_HINT_T1);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[t * MAX_GROUP + h + i]);
                    c[i][0] = _mm512_dpbf16_ps(c[i][0], low, weight);
                    c[i][1] = _mm512_dpbf16_ps(c[i][1], high, weight);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++)
                    _mm512_store_ps(sums + (h + i) * dim + d + j * LANES, c[i][j]);
        }
}

/* Undoes the interleaving of `weigh`: returns the first or the second half of 32 sums in the order
 * of their entries. */
INLINE __m512 in_order(const float *sums, int half)
{
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512i chosen = _mm512_add_epi32(order, _mm512_set1_epi32(8 * half));
    return _mm512_permutex2var_ps(_mm512_load_ps(sums), chosen, _mm512_load_ps(sums + LANES));
}

/* Finds the places of the next 64 keys and values from token `first` on. After the last token its
 * own place is repeated. */
INLINE void locate(const Context *context, long first, long *places)
{
    long last = context->length - 1;
    uint32_t token = (uint32_t)(first < last ? first : last);
    uint32_t block = token / context->block_size;
    uint32_t inside = token % context->block_size;
    for (int t = 0; t < KEYS; t++) {
        places[t] = (context->blocks[block] * context->block_size + inside) * context->stride;
        if (first + t < last && ++inside == context->block_size) {
            inside = 0;
            block++;
        }
    }
}

/* Writes the results [heads][dim], or what must be merged with other parts. */
static void finish(const float *sums, const float *totals, const float *bests, int num_heads,
                   int dim, bf16 *y, float *partial)
{
    for (int h = 0; h < num_heads; h++)
        for (int d = 0; d < dim; d += LANES) {
            __m512 sum = in_order(sums + h * dim + d / (2 * LANES) * 2 * LANES, d / LANES % 2);
            if (partial)
                _mm512_storeu_ps(partial + h * (dim + 2) + d, sum);
            else
                store(y + h * dim + d, 0xffff, _mm512_div_ps(sum, _mm512_set1_ps(totals[h])));
        }
    for (int h = 0; partial && h < num_heads; h++) {
        partial[h * (dim + 2) + dim] = totals[h];
        partial[h * (dim + 2) + dim + 1] = bests[h];
    }
}

/* The queries of one key head's query heads against the tokens from `first` up to `last`, with a
 * running softmax. */
static void attend(const Context *context, long first, long last, const bf16 *queries,
                   int num_heads, int dim, bf16 *y, float *partial)
{
    int32_t q[MAX_HEAD_DIM / 2 * MAX_GROUP] __attribute__((aligned(64)));
    float sums[MAX_GROUP * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float shrink[MAX_GROUP] __attribute__((aligned(64)));
    long places[2][KEYS];
    int32_t weights[KEYS / 2 * MAX_GROUP] __attribute__((aligned(64)));
    __m512 scores[KEYS + 1];
    __m512 greatest = _mm512_set1_ps(-INFINITY);
    __m512 total = _mm512_setzero_ps();
    memset(q, 0, dim / 2 * MAX_GROUP * sizeof *q);
    memset(sums, 0, MAX_GROUP * dim * sizeof *sums);
    for (int h = 0; h < num_heads; h++)
        for (int d = 0; d < dim / 2; d++)
            memcpy(q + d * MAX_GROUP + h, queries + h * dim + 2 * d, 4);
    locate(context, first, places[first / KEYS % 2]);
    for (; first < last; first += KEYS) {
        int count = last - first < KEYS ? (int)(last - first) : KEYS;
        long *here = places[first / KEYS % 2];
        long *ahead = places[(first / KEYS + 1) % 2];
        locate(context, first + KEYS, ahead);
        __m512 best = _mm512_max_ps(greatest, score(context->keys, here, ahead, count, q, dim,
                                                    LOG2_E / sqrtf(dim), scores));
        __m512 factor = power_of_two(_mm512_sub_ps(greatest, best));
        greatest = best;
        total = _mm512_mul_ps(total, factor);
        for (int t = 0; t < count; t++) {
            scores[t] = power_of_two(_mm512_sub_ps(scores[t], best));
            total = _mm512_add_ps(total, scores[t]);
        }
        scores[count] = _mm512_setzero_ps();
        int num_pairs = (count + 1) / 2;
        for (int t = 0; t < num_pairs; t++)
            _mm512_store_si512(weights + t * MAX_GROUP,
                               pair_weights(scores[2 * t], scores[2 * t + 1]));
        _mm512_store_ps(shrink, factor);
        weigh(context->values, here, ahead, num_pairs, weights, shrink, num_heads, dim, sums);
    }
    float totals[MAX_GROUP];
    float bests[MAX_GROUP];
    _mm512_storeu_ps(totals, total);
    _mm512_storeu_ps(bests, greatest);
    finish(sums, totals, bests, num_heads, dim, y, partial);
}

/* Returns the sums of 16 vectors, in their order. */
INLINE __m512 sum_each(__m512 x[LANES])
{
    for (int i = 0; i < 8; i++)
        x[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                             _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d even = _mm512_castps_pd(x[2 * i]);
        __m512d odd = _mm512_castps_pd(x[2 * i + 1]);
        x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    for (int i = 0; i < 2; i++)
        x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88),
                         _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
}

/* Computes the scores of 64 keys for one query, a key in each lane, and returns the greatest of the
 * first `count`. The others become -infinity. */
INLINE float score_one(const bf16 *keys, const long *places, int count, const bf16 *query, int dim,
                       float scale, __m512 *scores)
{
    __m512 greatest = _mm512_set1_ps(-INFINITY);
    for (int t = 0; t < KEYS; t += LANES) {
        __m512 sums[LANES];
        for (int j = 0; j < LANES; j++) sums[j] = _mm512_setzero_ps();
        for (int d = 0; t < count && d < dim; d += 2 * LANES) {
            __m512bh part = (__m512bh)_mm512_loadu_si512(query + d);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) {
                __m512bh key = (__m512bh)_mm512_loadu_si512(keys + places[t + j] + d);
                sums[j] = _mm512_dpbf16_ps(sums[j], part, key);
            }
        }
        __mmask16 mask = t < count ? mask_of(count - t) : 0;
        scores[t / LANES] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask, sum_each(sums),
                                               _mm512_set1_ps(scale));
        greatest = _mm512_max_ps(greatest, scores[t / LANES]);
    }
    return _mm512_reduce_max_ps(greatest);
}

/* `weigh` for one head and up to 128 entries. */
INLINE void weigh_one(const int blocks, const bf16 *values, const long *places, int num_pairs,
                      const bf16 *weights, float shrink, float *sums)
{
    __m512 c[8];
#pragma GCC unroll 8
    for (int j = 0; j < 2 * blocks; j++)
        c[j] = _mm512_mul_ps(_mm512_load_ps(sums + j * LANES), _mm512_set1_ps(shrink));
    for (int t = 0; t < num_pairs; t++) {
        __m512bh weight = pair_of(weights + 2 * t);
#pragma GCC unroll 4
        for (int j = 0; j < blocks; j++) {
            __m512i first = _mm512_loadu_si512(values + places[2 * t] + j * 2 * LANES);
            __m512i second = _mm512_loadu_si512(values + places[2 * t + 1] + j * 2 * LANES);
            __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
            __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
            c[2 * j] = _mm512_dpbf16_ps(c[2 * j], low, weight);
            c[2 * j + 1] = _mm512_dpbf16_ps(c[2 * j + 1], high, weight);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < 2 * blocks; j++) _mm512_store_ps(sums + j * LANES, c[j]);
}

/* The same as `attend`, one head after another. The first one finds its keys and values
 * prefetched, the others find them in the first-level cache. */
static void attend_one_by_one(const Context *context, long first, long last, const bf16 *queries,
                              int num_heads, int dim, bf16 *y, float *partial)
{
    float sums[FEW_HEADS * MAX_HEAD_DIM] __attribute__((aligned(64)));
    bf16 weights[KEYS];
    long places[2][KEYS];
    float totals[FEW_HEADS] = {0};
    float bests[FEW_HEADS];
    for (int h = 0; h < num_heads; h++) bests[h] = -INFINITY;
    memset(sums, 0, num_heads * dim * sizeof *sums);
    locate(context, first, places[first / KEYS % 2]);
    for (; first < last; first += KEYS) {
        int count = last - first < KEYS ? (int)(last - first) : KEYS;
        long *here = places[first / KEYS % 2];
        long *ahead = places[(first / KEYS + 1) % 2];
        locate(context, first + KEYS, ahead);
        for (int t = 0; t < KEYS; t++)
            for (int d = 0; d < dim; d += 2 * LANES) {
                _mm_prefetch((const char *)(context->keys + ahead[t] + d), _MM_HINT_T1);
                _mm_prefetch((const char *)(context->values + ahead[t] + d), _MM_HINT_T1);
            }
        for (int h = 0; h < num_heads; h++) {
            __m512 scores[KEYS / LANES];
            float best = fmaxf(bests[h], score_one(context->keys, here, count, queries + h * dim,
                                                   dim, LOG2_E / sqrtf(dim), scores));
            __m512 total = _mm512_setzero_ps();
            for (int j = 0; j < KEYS / LANES; j++) {
                __m512 weight = power_of_two(_mm512_sub_ps(scores[j], _mm512_set1_ps(best)));
                total = _mm512_add_ps(total, weight);
                store(weights + j * LANES, 0xffff, weight);
            }
            float shrink = exp2f(bests[h] - best);
            bests[h] = best;
            totals[h] = totals[h] * shrink + _mm512_reduce_add_ps(total);
            for (int d = 0; d < dim; d += 8 * LANES) {
                const bf16 *values = context->values + d;
                float *own = sums + h * dim + d;
                int num_pairs = (count + 1) / 2;
                switch ((dim - d) / (2 * LANES)) {
                case 1: weigh_one(1, values, here, num_pairs, weights, shrink, own); break;
                case 2: weigh_one(2, values, here, num_pairs, weights, shrink, own); break;
                case 3: weigh_one(3, values, here, num_pairs, weights, shrink, own); break;
                default: weigh_one(4, values, here, num_pairs, weights, shrink, own);
                }
            }
        }
    }
    finish(sums, totals, bests, num_heads, dim, y, partial);
}

/* dim is a multiple of 32, and at most MAX_GROUP query heads share a key head. */
void attend_part(const Paged *paged, long seq, int kv_head, long first, long count, const bf16 *q,
                 bf16 *y, float *partial)
{
    int dim = paged->dim;
    Context context = {
        .keys = paged->keys + kv_head * dim,
        .values = paged->values + kv_head * dim,
        .blocks = paged->tables + seq * paged->table_stride,
        .block_size = paged->block_size,
        .stride = (long)paged->num_kv_heads * dim,
        .length = paged->contexts[seq],
    };
    int group = paged->num_heads / paged->num_kv_heads;
    (group <= FEW_HEADS ? attend_one_by_one : attend)(&context, first, first + count, q, group, dim,
                                                      y, partial);
}
