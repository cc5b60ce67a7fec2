"""Load generators: over HTTP, and on an engine in this process."""
