"""Runs the tests with the oldest and the newest supported versions, each in an environment of its own, and records them.

    python tests/versions.py [oldest] [newest]

It needs a network, several gigabytes where PyTorch comes with CUDA, and about a quarter of an hour for each. The results are
in tests/versions.json.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".json")
OLDEST = {"torch": "2.6.0", "lightning": "2.4.0", "torchmetrics": "1.2.1", "tqdm": "4.60.0"}
REPORTED = ("torch", "lightning", "torchmetrics", "tqdm", "numpy", "transformers")


def requirements() -> list[str]:
    """What the tests need, without versions of the package's own dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    own = [re.split(r"[><=]", requirement)[0] for requirement in project["dependencies"]]
    return own + [requirement for requirement in extras if not requirement.startswith("lightning-ntk")]


def run(versions: dict[str, str], work: Path) -> dict[str, object]:
    """Installs the given versions, or the newest ones, and runs the tests from a copy beside the installed package."""
    venv.create(work / "venv", with_pip=True)
    python = str(work / "venv" / "bin" / "python")
    pinned = [f"{name}=={version}" for name, version in versions.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
    subprocess.run([python, "-m", "pip", "install", "-q", "uv"], check=True, env=environment)
    install = [python, "-m", "uv", "pip", "install", "-q", "--python", python]
    subprocess.run([*install, *requirements(), *pinned], check=True, env=environment)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(work / "source")], check=True)
    subprocess.run([python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(work), str(work / "source")], check=True)
    subprocess.run([*install, "--no-deps", *map(str, work.glob("*.whl"))], check=True, env=environment)
    for folder in ("lightning_ntk", "lightning_ntk.egg-info"):
        subprocess.run(["rm", "-rf", str(work / "source" / folder)], check=True)
    shown = subprocess.run(
        [python, "-m", "uv", "pip", "freeze", "--python", python], capture_output=True, text=True, check=True
    )
    installed = dict(line.split("==") for line in shown.stdout.splitlines() if "==" in line)
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(tests, cwd=work / "source", env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:])
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
    }
    return {
        "date": date.today().isoformat(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {name: installed[name] for name in REPORTED},
        **counts,
        "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE),
    }


def main() -> None:
    """Runs what was asked for."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or ["oldest", "newest"]:
        with tempfile.TemporaryDirectory() as work:
            results[name] = run(OLDEST if name == "oldest" else {}, Path(work))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results[name])


if __name__ == "__main__":
    main()
