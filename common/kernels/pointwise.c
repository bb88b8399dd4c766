/* The small operations between products. */

#include "bfloat16.h"

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

/* Copies rows of `width` to their slots. */
void scatter(const bf16 *x, long stride, bf16 *y, const int64_t *slots, long num_rows, long width)
{
    for (long i = 0; i < num_rows; i++) memcpy(y + slots[i] * width, x + i * stride, width * sizeof(bf16));
}
