"""The raw-device and passthrough paths on an NVMe controller that QEMU emulates: python -m benchmarks.nvme"""

MIB = 1 << 20
# Bytes of the faulty namespace whose block cannot be read, or not written; the first is within a run's KV.
UNREADABLE, UNWRITABLE = 5 * MIB // 4, 40 * MIB
