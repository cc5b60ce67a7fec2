"""What stands between any protocol and the engines: keys, admission, cache, deadlines."""
