"""Simulation of the kernel: Verilator and the C++ twin behind one Python interface."""
