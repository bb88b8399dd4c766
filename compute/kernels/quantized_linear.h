/* Products with weights of eight or four bits: what quantized_linear.c has of each instruction set.
 *
 * An integer of eight bits times a scale is a weight. The kernels multiply by the integers, and
 * scale the sums. Inputs are taken in pieces (`Weights`). In memory a piece of int4 weights of one
 * panel begins with its scales, float16 [INT4_PANEL], and with what is added to each value, int8
 * [INT4_PANEL]. Then its octets of inputs follow. An octet has 32 bits per output: the lower 16 are
 * its even inputs, from the lowest bits on, the upper 16 the odd ones. */

#pragma once

#include "bfloat16.h"

enum {
    HEADER_BYTES = 3 * INT4_PANEL,
    INT4_OCTET_BYTES = OCTET / 2 * INT4_PANEL,
    INT8_OCTET_BYTES = OCTET * INT4_PANEL
};

/* Rows of x in the order of the packed weights, filled up with zeros. */
typedef struct {
    const Factor *x;
    long x_stride;
    const float *totals; /* the sum of each row of x in the piece */
    long totals_stride;
    long num_rows;
} Block;

/* A piece of one panel. */
typedef struct {
    const char *w;
    const char *header; /* of int4 weights, or null */
    long num_octets;
} Piece;

/* Adds the products with one piece to the sums [num_rows, INT4_PANEL]. */
void multiply_piece(Kind kind, const Piece *piece, const Block *block, float *sums);

/* Returns the sum of `count` entries, which is a multiple of eight. */
float total_of(const Factor *x, long count);

long num_quantized_tasks(const Weights *weights, long num_rows, int num_threads);
void quantized_task(const Weights *weights, const Rows *rows, int num_threads, long task);
