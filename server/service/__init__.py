"""The layer between protocols and engines: keys, admission, cache, deadlines."""
