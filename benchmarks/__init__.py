"""Reproducible benchmarks and checks of the project's claims."""
