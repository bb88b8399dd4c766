import os
import signal

from common.tuning import with_tuning

# Tests that compute run as a vision replica does. Without it torch's idle threads would spin and
# take the cores from other tests.
os.environ.update(with_tuning("vision", os.environ))
# A background job of a shell ignores SIGINT. Every process that a test starts and interrupts would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
