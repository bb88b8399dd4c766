import os
import signal

# As the launcher has it: torch's threads that wait sleep. Spinning ones take the cores from
# whatever else runs, tests included.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell's background job ignores SIGINT, and so would every process that a test starts and
# interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
