/* Products with weights of eight or four bits, as linear.c divides its own into tasks. */

#pragma once

#include "bfloat16.h"

long num_quantized_tasks(const Weights *weights, long num_rows, int num_threads);
void quantized_task(const Weights *weights, const Rows *rows, int num_threads, long task);
