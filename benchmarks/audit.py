"""`make audit`: known vulnerabilities of the installed packages (pip-audit). Needs a network and the extra [audit]."""

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
        print(f"no advisories available ({(ran.stderr.splitlines() or ['no answer'])[-1]}): run this with a network")
        return 2
    known = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", [])]
    for package, vulnerability in known:
        fixed = ", ".join(vulnerability["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    checked = len(packages) - len(skipped)
    print(f"{checked} packages checked, {len(known)} known vulnerabilities; skipped: {', '.join(skipped) or 'none'}")
    return int(bool(known)) if checked else 2


if __name__ == "__main__":
    sys.exit(main())
