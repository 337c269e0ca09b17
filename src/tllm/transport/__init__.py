"""Messages between processes.

This file does not know them; it sets what gRPC reads once, when it is loaded, and has no other switch for.
"""

import os

# gRPC's core writes to stderr on its own, about every handshake that fails, for instance. What matters of that comes as
# an error or a log line of ours. Whoever debugs gRPC itself sets the variable.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
