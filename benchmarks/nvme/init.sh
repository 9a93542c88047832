#!/bin/busybox sh
# The guest's first process: this machine's files, read-only over 9p, under a layer in memory; then one Python program.
bb=/bin/busybox
. /settings
$bb mkdir -p /proc /sys /dev /host /layer /new
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
for module in /modules/*; do $bb insmod "$module"; done
$bb mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose host /host || $bb poweroff -f
$bb mount -t tmpfs layer /layer
$bb mkdir /layer/upper /layer/work
$bb mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /new
for folder in proc sys dev; do $bb mount --bind /$folder /new/$folder; done
$bb mkdir -p /new/run/nvme
$bb cp /bin/busybox /modules/*-nvme.ko /new/run/nvme/
cd /new
$bb chroot /new /run/nvme/busybox sh -c "cd '$PROJECT' && '$PYTHON' -u -m benchmarks.nvme.guest $PHASE"
echo "exit $?"
$bb sync
$bb poweroff -f
