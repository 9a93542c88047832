"""The raw-device and passthrough paths on an NVMe controller that QEMU emulates: python -m benchmarks.nvme"""
