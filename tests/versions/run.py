"""Runs the tests with the oldest or the newest versions, on the installed wheel and outside the checkout.

    python tests/versions/run.py oldest  # those in oldest.txt: the floors in pyproject.toml
    python tests/versions/run.py newest  # those that the package index offers

`--environment DIR` keeps the virtual environment, and uses it again. Arguments after `--` go to pytest, as the files to run
again. Without any, what came is written to oldest.json or newest.json.
"""

import argparse
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def unpack(work: Path) -> tuple[Path, Path]:
    """Builds the sdist, and from it the wheel: the path of the wheel, and that of the sdist's files but for the package."""
    run(sys.executable, "-m", "build", "--outdir", work / "dist", ROOT)
    (wheel,), (archive,) = (list((work / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with tarfile.open(archive) as sdist:
        sdist.extractall(work, filter="data")
    files = work / archive.name.removesuffix(".tar.gz")
    (files / "lightning_ntk").rename(work / "not_imported")
    return wheel, files


def install(wheel: Path, environment: Path, which: str) -> Path:
    """Installs the wheel with what its tests need: the path of the environment's Python."""
    python = environment / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", environment)
    versions = ["-c", HERE / "oldest.txt"] if which == "oldest" else ["--upgrade"]
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, *versions, f"{wheel}[test]")
    run(*pip, "--force-reinstall", "--no-deps", wheel)  # of a kept environment
    return python


def outcome(junit: Path, python: Path) -> dict[str, object]:
    """Reads what came, with the versions of the packages that pyproject.toml names."""
    suite = next(ElementTree.parse(junit).iter("testsuite"))
    total, failed, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    named = {normalized(requirement) for some in (project["dependencies"], *extras) for requirement in some} | {"numpy"}
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    installed = {normalized(d.name): d.version for d in distributions(path=[str(site)])}
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": dict(Counter(case.attrib["message"] for case in suite.iter("skipped"))),
        "seconds": round(float(suite.attrib["time"])),
        "processor": processor(),
        "versions": {"python": version} | {name: installed[name] for name in sorted(named & installed.keys())},
    }


def normalized(requirement: str) -> str:
    name = requirement.partition(">")[0].partition("=")[0].partition("[")[0]
    return name.lower().replace("_", "-")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def run(*command: str | Path, cwd: Path | None = None, check: bool = True) -> None:
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=cwd, check=check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["oldest", "newest"])
    parser.add_argument("--environment", type=Path)
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        wheel, files = unpack(work)
        environment = (arguments.environment or work / "environment").absolute()
        python = install(wheel, environment, arguments.which)
        junit = work / "junit.xml"
        # The result of this run decides about it.
        earlier = "--deselect=tests/test_packaging.py::test_the_oldest_and_the_newest_versions_were_tested"
        tests = arguments.pytest or ["tests", "--pyargs", "lightning_ntk", earlier]
        run(python, "-m", "pytest", "-q", "-rs", f"--junitxml={junit}", *tests, cwd=files, check=False)
        result = outcome(junit, python)
    print(json.dumps(result, indent=2))
    if not arguments.pytest:
        (HERE / f"{arguments.which}.json").write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
