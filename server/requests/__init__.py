"""Bodies and fields of requests, parsed within bounds."""
