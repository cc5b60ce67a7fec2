"""Settings (`config`), the processor (`machine`), and the plan derived from both (`plan`)."""
