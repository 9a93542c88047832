"""Area of the kernel by yosys."""
