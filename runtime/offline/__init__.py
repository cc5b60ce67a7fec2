"""Files captioned without a server, as lines of JSON."""
