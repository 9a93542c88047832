"""Claims and benchmarks that anyone can run again."""
