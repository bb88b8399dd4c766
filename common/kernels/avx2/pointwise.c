/* The small operations between products: loops that the compiler makes vectors of. */

#include "bfloat16.h"

/* y = x / rms(x) * weight, row by row. */
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, float eps, long num_rows, long width, int num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++) {
        const bf16 *row = x + i * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long j = 0; j < width; j++) squares += widen(row[j]) * widen(row[j]);
        float scale = 1 / sqrtf(squares / width + eps);
#pragma omp simd
        for (long j = 0; j < width; j++) y[i * width + j] = narrow(widen(row[j]) * scale * widen(weight[j]));
    }
}

/* y [num_rows, width] = silu(gate) * up, where x [num_rows, 2 * width] is gate and up side by side. */
void silu_mul(const bf16 *x, bf16 *y, long num_rows, long width, int num_threads)
{
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++) {
        const bf16 *gates = x + 2 * i * width, *ups = gates + width;
#pragma omp simd
        for (long j = 0; j < width; j++) {
            float gate = widen(gates[j]);
            y[i * width + j] = narrow(gate / (1 + power_of_two(-LOG2_E * gate)) * widen(ups[j]));
        }
    }
}

/* Turns the first `num_heads` heads of each row in place: entry i with entry i + dim / 2. cos and signed_sin are [num_rows, dim]. */
void rotate(bf16 *x, long stride, const float *cos, const float *signed_sin, long num_rows, int num_heads, int dim, int num_threads)
{
    int half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (long i = 0; i < num_rows; i++)
        for (int h = 0; h < num_heads; h++) {
            bf16 *low = x + i * stride + h * dim, *high = low + half;
            const float *c = cos + i * dim, *s = signed_sin + i * dim;
#pragma omp simd
            for (int j = 0; j < half; j++) {
                float a = widen(low[j]), b = widen(high[j]);
                low[j] = narrow(a * c[j] + b * s[j]);
                high[j] = narrow(b * c[half + j] + a * s[half + j]);
            }
        }
}

/* Copies rows of `width` to their slots. */
void scatter(const bf16 *x, long stride, bf16 *y, const int64_t *slots, long num_rows, long width)
{
    for (long i = 0; i < num_rows; i++) memcpy(y + slots[i] * width, x + i * stride, width * sizeof(bf16));
}
