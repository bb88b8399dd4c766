/* Products of few rows, which are bound by reading the weights. The result of a row does not
 * depend on the other rows. */

#include "quantized_linear.h"

enum { TASKS_PER_THREAD = 4 };

/* Computes the sums [num_rows][64] of one panel. A stretch of weights that fits in the first-level
 * cache is used by all rows before the next stretch is read. */
static void panel(const bf16 *x, long x_stride, const bf16 *w, long num_pairs, int num_rows,
                  float *sums)
{
    int num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long k = 0; k < num_pairs; k += TILE_PAIRS) {
        long count = num_pairs - k < TILE_PAIRS ? num_pairs - k : TILE_PAIRS;
        for (int t = 0, row = 0; t < num_tiles; t++) {
            int rows = (num_rows - row + num_tiles - t - 1) / (num_tiles - t);
            int from = 4 * t / num_tiles;
            int to = 4 * (t + 1) / num_tiles;
            any_tile(rows, 4, x + row * x_stride + 2 * k, x_stride, w + k * 2 * PANEL, 2 * PANEL,
                     count, sums + row * PANEL, PANEL, k == 0, from, to);
            row += rows;
        }
    }
}

/* Entries of one panel; its inputs are filled up with zeros to a multiple of 32. */
static long size_of_panel(long num_inputs) { return (num_inputs + 31) / 32 * 32 * PANEL; }

const bf16 *packed_row(const Weights *weights, long output, long *stride)
{
    *stride = 2 * PANEL;
    return (const bf16 *)weights->packed + output / PANEL * size_of_panel(weights->num_inputs) +
           output % PANEL * 2;
}

/* The panels of a task follow each other, so that most of what is prefetched is the task's own. */
static long panels_per_task(const Weights *weights, int num_threads)
{
    long num_panels = (weights->num_outputs + PANEL - 1) / PANEL;
    long share = num_panels / (TASKS_PER_THREAD * num_threads);
    return share > 1 ? share : 1;
}

long num_linear_tasks(const Weights *weights, long num_rows, int num_threads)
{
    if (weights->kind != BFLOAT16) return num_quantized_tasks(weights, num_rows, num_threads);
    long size = panels_per_task(weights, num_threads) * PANEL;
    return (weights->num_outputs + size - 1) / size;
}

/* bfloat16 weights are filled up with zeros to whole panels and to a multiple of 32 inputs. For
 * them num_rows is at most MAX_LINEAR_ROWS, and num_inputs is even. */
void linear_task(const Weights *weights, const Rows *rows, int num_threads, long task)
{
    if (weights->kind != BFLOAT16) {
        quantized_task(weights, rows, num_threads, task);
        return;
    }
    long panel_size = size_of_panel(weights->num_inputs);
    long num_outputs = weights->num_outputs;
    long count = panels_per_task(weights, num_threads);
    for (long p = task * count; p < (task + 1) * count && p * PANEL < num_outputs; p++) {
        float sums[MAX_LINEAR_ROWS * PANEL] __attribute__((aligned(64)));
        panel(rows->x, rows->x_stride, (const bf16 *)weights->packed + p * panel_size,
              weights->num_inputs / 2, (int)rows->num_rows, sums);
        for (long n = p * PANEL; n < num_outputs && n < (p + 1) * PANEL; n += LANES) {
            __mmask16 mask = mask_of(num_outputs - n);
            __m512 bias = weights->bias ? load(weights->bias + n, mask) : _mm512_setzero_ps();
            for (long i = 0; i < rows->num_rows; i++) {
                long at = i * num_outputs + n;
                __m512 value = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL + n % PANEL), bias);
                if (rows->residual) value = _mm512_add_ps(value, load(rows->residual + at, mask));
                store(rows->y + at, mask, value);
            }
        }
    }
}
