/* The small operations between products, one row at a time. */

#include "bfloat16.h"

void rms_norm_row(const bf16 *x, const bf16 *weight, bf16 *y, float eps, long width)
{
    __m512 squares = _mm512_setzero_ps();
    for (long j = 0; j < width; j += LANES) {
        __m512 value = load(x + j, mask_of(width - j));
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
    for (long j = 0; j < width; j += LANES) {
        __mmask16 mask = mask_of(width - j);
        __m512 factor = load(weight + j, mask);
        __m512 normed = _mm512_mul_ps(load(x + j, mask), scale);
        store(y + j, mask, _mm512_mul_ps(normed, factor));
    }
}

void gelu_tanh_row(const bf16 *x, bf16 *y, long width)
{
    const __m512 one = _mm512_set1_ps(1);
    for (long j = 0; j < width; j += LANES) {
        __mmask16 mask = mask_of(width - j);
        __m512 value = load(x + j, mask);
        __m512 square = _mm512_mul_ps(value, value);
        __m512 factor = _mm512_fmadd_ps(square, _mm512_set1_ps(GELU_CUBE), _mm512_set1_ps(GELU_LINE));
        /* In this order of the arguments of min a NaN stays a NaN. */
        __m512 power = _mm512_min_ps(_mm512_set1_ps(128), _mm512_mul_ps(value, factor));
        __m512 divisor = _mm512_add_ps(one, power_of_two(power));
        store(y + j, mask, _mm512_div_ps(value, divisor));
    }
}

void silu_mul_row(const bf16 *x, bf16 *y, long width)
{
    const __m512 one = _mm512_set1_ps(1);
    for (long j = 0; j < width; j += LANES) {
        __mmask16 mask = mask_of(width - j);
        __m512 gate = load(x + j, mask);
        __m512 up = load(x + width + j, mask);
        __m512 power = power_of_two(_mm512_mul_ps(gate, _mm512_set1_ps(-LOG2_E)));
        __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(one, power));
        store(y + j, mask, _mm512_mul_ps(silu, up));
    }
}

void rotate_row(bf16 *x, const float *cos, const float *signed_sin, int num_heads, int dim)
{
    int half = dim / 2;
    for (int h = 0; h < num_heads; h++)
        for (int j = 0; j < half; j += LANES) {
            bf16 *low = x + h * dim + j;
            bf16 *high = low + half;
            const float *c = cos + j;
            const float *s = signed_sin + j;
            __mmask16 mask = mask_of(half - j);
            __m512 a = load(low, mask);
            __m512 b = load(high, mask);
            __m512 a_by_sin = _mm512_mul_ps(a, load_floats(s + half, mask));
            __m512 b_by_sin = _mm512_mul_ps(b, load_floats(s, mask));
            store(low, mask, _mm512_fmadd_ps(a, load_floats(c, mask), b_by_sin));
            store(high, mask, _mm512_fmadd_ps(b, load_floats(c + half, mask), a_by_sin));
        }
}
