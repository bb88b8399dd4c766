/* The small operations between products, one row at a time. The compiler vectorizes the loops. */

#include "bfloat16.h"

void rms_norm_row(const bf16 *x, const bf16 *weight, bf16 *y, float eps, long width)
{
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long j = 0; j < width; j++) squares += widen(x[j]) * widen(x[j]);
    float scale = 1 / sqrtf(squares / width + eps);
#pragma omp simd
    for (long j = 0; j < width; j++) y[j] = narrow(widen(x[j]) * scale * widen(weight[j]));
}

void gelu_tanh_row(const bf16 *x, bf16 *y, long width)
{
#pragma omp simd
    for (long j = 0; j < width; j++) {
        float value = widen(x[j]);
        float power = power_of_two(value * (GELU_CUBE * value * value + GELU_LINE));
        y[j] = narrow(value / (1 + power));
    }
}

void silu_mul_row(const bf16 *x, bf16 *y, long width)
{
#pragma omp simd
    for (long j = 0; j < width; j++) {
        float gate = widen(x[j]);
        y[j] = narrow(gate / (1 + power_of_two(-LOG2_E * gate)) * widen(x[width + j]));
    }
}

void rotate_row(bf16 *x, const float *cos, const float *signed_sin, int num_heads, int dim)
{
    int half = dim / 2;
    for (int h = 0; h < num_heads; h++) {
        bf16 *low = x + h * dim;
        bf16 *high = low + half;
#pragma omp simd
        for (int j = 0; j < half; j++) {
            float a = widen(low[j]);
            float b = widen(high[j]);
            low[j] = narrow(a * cos[j] + b * signed_sin[j]);
            high[j] = narrow(b * cos[half + j] + a * signed_sin[half + j]);
        }
    }
}
