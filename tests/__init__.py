import os

# As the launcher has it: torch's threads that wait sleep. Spinning ones take the cores from whatever else runs, tests included.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
