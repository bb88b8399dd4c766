"""A second model family, made for tests: nothing in it is like Qwen2.5-VL.

It has other tensor names, its own position rule of two components, three patches per token, a rope
parameter and a scaling of queries per sequence, low-rank pairs on the rows of items, and a tiktoken
vocabulary. `plain` computes the same model with plain loops.
"""
