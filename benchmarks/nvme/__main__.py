"""DUAL-BLADE's device paths on an NVMe controller that QEMU emulates: python -m benchmarks.nvme

Boots Debian's kernel under software emulation, with this machine's own files, read-only over 9p, and seven namespaces.
Runs `benchmarks.nvme.guest` there, kills it in the middle of a run, as a power failure would, and boots again.
Needs Debian's qemu-system-x86, busybox-static, kmod and cpio. The kernel's package is downloaded by apt and never
installed. The console is kept in out/nvme/console-*.log.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.claims import ROOT, Claim, verdict
from benchmarks.nvme import MIB, UNREADABLE, UNWRITABLE

HERE = Path(__file__).parent
MODULES = "nvme virtio_pci 9pnet_virtio 9p overlay ext4".split()
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "cpio": "cpio",
    "sfdisk": "fdisk",
}
SIZE = 96 * MIB
NAMESPACES = {  # serial of the controller -> options of its namespaces, by number
    "small": {  # transfers of at most 32 KiB
        1: "logical_block_size=512,physical_block_size=512",
        2: "logical_block_size=4096,physical_block_size=4096",
        3: "logical_block_size=512,physical_block_size=512,ms=8",
    },
    "large": {
        1: "logical_block_size=4096,physical_block_size=4096",
        2: "logical_block_size=4096,physical_block_size=4096",
        3: "logical_block_size=512,physical_block_size=512",
    },
    "multi": {1: "logical_block_size=512,physical_block_size=512,shared=off"},  # in a subsystem: can be detached
}
MDTS = {"small": 3, "large": 7, "multi": 7}  # as a power of two of 4 KiB
FAULTY = ("large", 2)  # some of its blocks cannot be read, others not written
DEADLINE = 1500  # seconds of one boot


def words(*command: str | Path, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def kernel(folder: Path, release: str | None) -> tuple[Path, Path, str]:
    """Debian's kernel: its image, the root of its modules, its release. Downloaded into `folder` once."""
    if release is None:
        found = [
            line.split()[1]
            for line in words("apt-cache", "depends", "linux-image-amd64").splitlines()
            if "Depends:" in line
        ]
        release = found[0].removeprefix("linux-image-")
    root = folder / release
    if not (root / "boot").exists():
        folder.mkdir(parents=True, exist_ok=True)
        words("apt-get", "download", f"linux-image-{release}", cwd=folder)
        words("dpkg-deb", "-x", next(folder.glob(f"linux-image-{release}_*.deb")), root)
        words("depmod", "-b", root, release)
    return root / f"boot/vmlinuz-{release}", root, release


def initramfs(root: Path, release: str, folder: Path, phase: str) -> Path:
    """The guest's first files: busybox, modules in their order, `init.sh` and what it runs."""
    inside = folder / "initramfs"
    shutil.rmtree(inside, ignore_errors=True)
    (inside / "bin").mkdir(parents=True)
    (inside / "modules").mkdir()
    shutil.copy(shutil.which("busybox"), inside / "bin")
    shutil.copy(HERE / "init.sh", inside / "init")
    (inside / "init").chmod(0o755)
    listed = [words("modprobe", "-d", root.resolve(), "-S", release, "--show-depends", name) for name in MODULES]
    paths = dict.fromkeys(line.split()[1] for line in "".join(listed).splitlines() if line.startswith("insmod"))
    for number, path in enumerate(paths):
        shutil.copy(path, inside / "modules" / f"{number:02}-{Path(path).name}")
    settings = {"PROJECT": str(ROOT), "PYTHON": sys.executable, "HOME": str(Path.home()), "PATH": os.environ["PATH"]}
    settings |= {"PHASE": phase, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    lines = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    (inside / "settings").write_text(lines, encoding="utf-8")
    names = words("find", ".", cwd=inside)
    target = folder / "initramfs.cpio"
    with target.open("wb") as file:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], cwd=inside, input=names.encode(), stdout=file, check=True
        )
    return target


def image(folder: Path, serial: str, number: int) -> Path:
    return folder / f"{serial}-{number}.img"


def machine(folder: Path, accelerator: str) -> list[str]:
    """QEMU's command without its kernel."""
    command = "qemu-system-x86_64 -M q35 -cpu max -smp 2 -m 3G -nographic -no-reboot".split() + ["-accel", accelerator]
    command += "-fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap".split()
    command += "-device virtio-9p-pci,fsdev=host,mount_tag=host".split()
    for serial, namespaces in NAMESPACES.items():
        own = ""
        if serial == "multi":
            command += ["-device", "nvme-subsys,id=group"]
            own = ",subsys=group"
        command += ["-device", f"nvme,id={serial},serial={serial},mdts={MDTS[serial]}{own}"]
        for number, options in namespaces.items():
            name, path = f"{serial}{number}", image(folder, serial, number)
            drive = (
                f"driver=raw,node-name={name},discard=unmap,file.driver=file,file.filename={path},file.discard=unmap"
            )
            if (serial, number) == FAULTY:
                below = f"file.image.driver=file,file.image.filename={path}"
                drive = f"driver=raw,node-name={name},file.driver=blkdebug,{below}"
                for at, (event, offset) in enumerate((("read_aio", UNREADABLE), ("write_aio", UNWRITABLE))):
                    drive += f",file.inject-error.{at}.event={event},file.inject-error.{at}.errno=5"
                    drive += f",file.inject-error.{at}.sector={offset // 512},file.inject-error.{at}.once=off"
            command += ["-blockdev", drive, "-device", f"nvme-ns,drive={name},bus={serial},nsid={number},{options}"]
    for event in ("pci_nvme_dsm_deallocate", "pci_nvme_err_mdts", "pci_nvme_err_invalid_opc"):
        command += ["-trace", event]
    return command + ["-D", str(folder / "trace.log")]


def boot(command: list[str], log: Path, kill_at: str | None = None) -> tuple[list[dict], bool]:
    """Run a guest until it ends, or a second beyond the line `kill_at`: its checks, and whether it ended well."""
    checks, ended, start = [], False, time.monotonic()
    with log.open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
        )
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(DEADLINE)
        for line in process.stdout:
            kept.write(line)
            kept.flush()
            if line.startswith("check "):
                checks.append(json.loads(line[6:]))
                said = "ok  " if checks[-1]["ok"] else "FAIL"
                print(f"{time.monotonic() - start:5.0f} s | {said} | {checks[-1]['name']}", flush=True)
            ended |= line.startswith("exit 0")
            if kill_at and line.startswith(kill_at):
                time.sleep(1)
                process.kill()
                ended = True
        process.wait()
        signal.alarm(0)
    return checks, ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--release", help="of Debian's kernel; the newest that apt knows without")
    parser.add_argument("--accelerator", default="tcg,thread=multi", help="kvm where it works")
    parser.add_argument("--folder", type=Path, default=Path("out/nvme"))
    given = parser.parse_args()
    if missing := [package for tool, package in TOOLS.items() if not shutil.which(tool)]:
        raise SystemExit(
            f"needs Debian's {', '.join(missing)}: apt-get install --no-install-recommends {' '.join(missing)}"
        )
    folder, start = given.folder.resolve(), time.monotonic()
    vmlinuz, root, release = kernel(folder / "kernel", given.release)
    for serial, namespaces in NAMESPACES.items():
        for number in namespaces:
            path = image(folder, serial, number)
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                file.truncate(SIZE)
    claims = []
    for phase, kill_at in (("first", "working"), ("second", None)):
        started = initramfs(root, release, folder, phase)
        command = [*machine(folder, given.accelerator), "-kernel", str(vmlinuz), "-initrd", str(started)]
        command += ["-append", "console=ttyS0 quiet loglevel=0 panic=-1"]
        checks, ended = boot(command, folder / f"console-{phase}.log", kill_at)
        claims += [Claim(check["name"], check["figure"], check["bar"], check["ok"]) for check in checks]
        claims.append(Claim(f"the {phase} boot came to its end", "yes" if ended else "no", "yes", ended))
        if phase == "first":
            traced = (folder / "trace.log").read_text(encoding="utf-8", errors="replace")
            trims, errors = traced.count("pci_nvme_dsm_deallocate"), traced.count("pci_nvme_err_mdts")
            claims.append(Claim("the device sees TRIM", f"{trims} ranges deallocated", "1 or more", trims > 0))
            claims.append(Claim("no command larger than the device takes", str(errors), "0", errors == 0))
    print(f"Linux {release}, {words('qemu-system-x86_64', '--version').splitlines()[0]}, {given.accelerator}")
    for claim in claims:
        claim.show()
    took = time.monotonic() - start
    claims.append(Claim("both boots", f"{took / 60:.1f} min", "15 min", took < 900).show())
    return verdict(claims)


if __name__ == "__main__":
    sys.exit(main())
