/* Attention of one new token per sequence: which part of which context a task is, and how parts
 * are merged. */

#include "kernels.h"

#include <math.h>

static long num_parts(const Paged *paged, long seq)
{
    return (paged->contexts[seq] + PART_TOKENS - 1) / PART_TOKENS;
}

long num_attention_tasks(const Paged *paged, long num_seqs)
{
    long count = 0;
    for (long s = 0; s < num_seqs; s++) count += num_parts(paged, s);
    return count * paged->num_kv_heads;
}

/* A task is one key head in one part of one sequence's context. */
void attention_task(const Paged *paged, const bf16 *q, long q_stride, bf16 *y, float *partials,
                    long task)
{
    int kv_head = (int)(task % paged->num_kv_heads);
    int group = paged->num_heads / paged->num_kv_heads;
    int dim = paged->dim;
    long part_of_all = task / paged->num_kv_heads; /* among the parts of all sequences */
    long head = (long)kv_head * group;
    long seq = 0;
    long part = part_of_all;
    for (; part >= num_parts(paged, seq); seq++) part -= num_parts(paged, seq);
    long first = part * PART_TOKENS;
    long left = paged->contexts[seq] - first;
    int is_divided = num_parts(paged, seq) > 1;
    float *partial = partials + (part_of_all * paged->num_heads + head) * (dim + 2);
    attend_part(paged, seq, kv_head, first, left < PART_TOKENS ? left : PART_TOKENS,
                q + seq * q_stride + head * dim, y + (seq * paged->num_heads + head) * dim,
                is_divided ? partial : 0);
}

long num_merge_tasks(const Paged *paged, long num_seqs)
{
    for (long s = 0; s < num_seqs; s++)
        if (num_parts(paged, s) > 1) return num_seqs * paged->num_heads;
    return 0;
}

/* A task is one query head of one sequence. */
void merge_task(const Paged *paged, bf16 *y, const float *partials, long task)
{
    long seq = task / paged->num_heads;
    long head = task % paged->num_heads;
    long count = num_parts(paged, seq);
    int dim = paged->dim;
    if (count < 2) return;
    long before = 0;
    for (long s = 0; s < seq; s++) before += num_parts(paged, s);
    const float *first = partials + (before * paged->num_heads + head) * (dim + 2);
    long stride = (long)paged->num_heads * (dim + 2);
    float greatest = first[dim + 1];
    float total = 0;
    float sums[MAX_HEAD_DIM] = {0};
    for (long p = 1; p < count; p++) greatest = fmaxf(greatest, first[p * stride + dim + 1]);
    for (long p = 0; p < count; p++) {
        const float *part = first + p * stride;
        float share = exp2f(part[dim + 1] - greatest);
        total += share * part[dim];
        for (int d = 0; d < dim; d++) sums[d] += share * part[d];
    }
    for (int d = 0; d < dim; d++) y[task * dim + d] = narrow(sums[d] / total);
}
