"""Messages between processes, their sockets, and shared memory."""
