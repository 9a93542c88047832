"""`make audit`: known weaknesses of the installed packages, by pip-audit. Needs the network and the extra [audit]."""

import json
import subprocess
import sys
from importlib.util import find_spec


def main() -> int:
    if find_spec("pip_audit") is None:
        print("pip-audit is missing: pip install 'hillinfer[audit]'")
        return 2
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner=off", "-f", "json"]
    ran = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"no advisories could be had ({(ran.stderr.splitlines() or ['no answer'])[-1]}): run this with a network")
        return 2
    known = [(package, weakness) for package in packages for weakness in package.get("vulns", [])]
    for package, weakness in known:
        fixed = ", ".join(weakness["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {weakness['id']}, fixed in {fixed}")
    left = [package["name"] for package in packages if "skip_reason" in package]
    print(
        f"{len(packages) - len(left)} packages asked about, {len(known)} known weaknesses; not asked: {left or 'none'}"
    )
    return int(bool(known))


if __name__ == "__main__":
    sys.exit(main())
