"""The Open Inference Protocol with Triton's extensions, over gRPC."""

import os

# Its C library writes a line for each odd call straight to standard error, past the limits of
# logging; once nobody reads that, its threads hang. Read as grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
