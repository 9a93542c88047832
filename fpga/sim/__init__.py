"""The kernel simulated by Verilator, and its C++ twin, behind one Python face."""
