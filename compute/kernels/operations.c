/* Single operations on all rows, which threads divide among themselves. */

#include "kernels.h"

#include <string.h>

/* y [num_rows, num_outputs] = x @ weights.T + bias + residual */
void linear(const Weights *weights, const bf16 *x, long x_stride, const bf16 *residual, bf16 *y,
            long num_rows, int num_threads)
{
    Rows rows = {x, x_stride, residual, y, num_rows};
    long num_tasks = num_linear_tasks(weights, num_rows, num_threads);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (long task = 0; task < num_tasks; task++) linear_task(weights, &rows, num_threads, task);
}

/* y [num_rows, num_inputs] = the weights of these outputs, which must be bfloat16. With it an
 * embedding and a head can be the same matrix. */
void take_rows(const Weights *weights, const int64_t *outputs, bf16 *y, long num_rows,
               int num_threads)
{
    long width = weights->num_inputs;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++) {
        long stride;
        const bf16 *pairs = packed_row(weights, outputs[i], &stride);
        for (long k = 0; k < width; k++) y[i * width + k] = pairs[k / 2 * stride + k % 2];
    }
}

/* Each row of y [num_rows, width] = that of x / rms(x) * weight */
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, float eps, long num_rows, long width,
              int num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++)
        rms_norm_row(x + i * width, weight, y + i * width, eps, width);
}

/* y [num_rows, width] = gelu(x), approximated by tanh */
void gelu_tanh(const bf16 *x, bf16 *y, long num_rows, long width, int num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++) gelu_tanh_row(x + i * width, y + i * width, width);
}

/* y [num_rows, width] = silu(gate) * up, for gate and up side by side in x [num_rows, 2 * width] */
void silu_mul(const bf16 *x, bf16 *y, long num_rows, long width, int num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++) silu_mul_row(x + 2 * i * width, y + i * width, width);
}

/* Rotates the first `num_heads` heads of each row in place. cos and signed_sin are [num_rows,
 * dim]. */
void rotate(bf16 *x, long stride, const float *cos, const float *signed_sin, long num_rows,
            int num_heads, int dim, int num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++)
        rotate_row(x + i * stride, cos + i * dim, signed_sin + i * dim, num_heads, dim);
}

/* Copies rows of `width` entries to their slots in y. */
void scatter(const bf16 *x, long stride, bf16 *y, const int64_t *slots, long num_rows, long width)
{
    for (long i = 0; i < num_rows; i++)
        memcpy(y + slots[i] * width, x + i * stride, width * sizeof(bf16));
}

/* Attention of one new token per sequence: q [num_seqs, num_heads, dim] with a stride between
 * sequences, y [num_seqs, num_heads, dim]. `partials` has [num_heads, dim + 2] for each part of a
 * context. */
void decode_attention(const Paged *paged, const bf16 *q, long q_stride, bf16 *y, float *partials,
                      long num_seqs, int num_threads)
{
    long num_tasks = num_attention_tasks(paged, num_seqs);
    long num_merges = num_merge_tasks(paged, num_seqs);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (long task = 0; task < num_tasks; task++)
            attention_task(paged, q, q_stride, y, partials, task);
#pragma omp for schedule(static)
        for (long task = 0; task < num_merges; task++) merge_task(paged, y, partials, task);
    }
}
