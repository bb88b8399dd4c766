"""Expendable processes in which preprocess opens what clients sent: prompts, guides and images.

A file of a few bytes may cost minutes and gigabytes to open, or crash a library. Each sandbox
works on one job at a time, within limits of CPU time and memory. If it dies, the job fails, and
another sandbox takes its place. The work loop of preprocess never waits for a sandbox.

- `jobs.py` has the messages, and the memory in which bytes are passed.
- `work.py` does a job.
- `meter.py` limits a sandbox, and notes what it is busy with.
- `child.py` is the program: it loads the model's files once, and forks a sandbox when asked.
- `pool.py` is the side of the work loop: it chooses the next job, and replaces what has died.
"""
