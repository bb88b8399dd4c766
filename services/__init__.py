"""The services, a package for each, and the command line."""

import os

# gRPC writes to stderr what clients do wrong, past the log and its limits.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
