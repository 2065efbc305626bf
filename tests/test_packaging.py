"""The package as others get it: built, installed, editable, and free of what belongs to one machine only.

Everything is built from a copy of the checkout, offline, with the setuptools of the running environment.
"""

import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What an installed copy reports about itself, run from a folder that is not the checkout.
REPORT = """
import importlib, importlib.metadata, json, sys
from importlib.resources import files

presets = files("tessera.configs")
print(json.dumps({
    "origins": {name: importlib.import_module(name).__file__ for name in sys.argv[1:]},
    "models": sorted(entry.name for entry in presets.joinpath("models").iterdir() if entry.is_file()),
    "version": importlib.metadata.version("tessera-lm"),
}))
"""


def package_folders() -> dict[str, str]:
    """The mapping in setup.cfg: package name -> folder in the checkout."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["package_dir"].strip().splitlines()
    return {name.strip(): folder.strip() for name, folder in (line.split("=") for line in lines)}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is built from."""
    copy = tmp_path / "source"
    for folder in package_folders().values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """The Python of a new virtual environment that sees the dependencies, and no tessera.

    A line in a .pth file adds the running environment's folder without reading the .pth files in it, so an
    editable install of tessera there stays out of sight.
    """
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return python


def build_wheel(tool: str, source: Path) -> Path:
    dist = source.parent / "dist"
    if tool == "pip":
        build = ["pip", "wheel", "-q", "--no-deps", "-w", dist]
    else:
        build = ["uv", "build", "-q", "--offline", "--python", sys.executable, "-o", dist]
    run(sys.executable, "-m", *build, "--no-build-isolation", source)
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_installed_package_imports_and_has_its_presets(
    tool: str, editable: bool, source: Path, fresh_python: Path, tmp_path: Path
) -> None:
    pytest.importorskip(tool, reason=f"{tool} is not installed")
    target = ["-e", source] if editable else [build_wheel(tool, source)]
    if tool == "pip":
        install = ["pip", "--python", fresh_python, "install", "-q", "--ignore-installed"]
    else:
        install = ["uv", "pip", "install", "-q", "--offline", "--python", fresh_python, "--reinstall"]
    run(sys.executable, "-m", *install, "--no-deps", "--no-build-isolation", *target)

    packages = package_folders()
    report = json.loads(run(fresh_python, "-c", REPORT, *packages, "tessera.commands", cwd=tmp_path))
    packages["tessera.commands"] = "tessera/commands"

    for name, origin in report["origins"].items():
        home = source / packages[name] if editable else fresh_python.parents[1]
        assert Path(origin).is_relative_to(home), f"{name} comes from {origin}, not from {home}"
    assert report["models"] == sorted(path.name for path in (ROOT / "configs" / "models").glob("*.json"))
    assert report["version"] == importlib.import_module("tessera").__version__
    assert fresh_python.with_name("tessera").exists(), "the `tessera` command was not installed"


def test_wheel_holds_every_file_of_the_packages(source: Path) -> None:
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(source / folder).as_posix()}"
        for package, folder in package_folders().items()
        for path in (source / folder).rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    with zipfile.ZipFile(build_wheel("pip", source)) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_setup_cfg_maps_each_package_folder() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = package_folders()
    on_disk = {init.parent.name for init in ROOT.glob("[!.]*/__init__.py")} - {"tests"}
    assert set(folders.values()) == on_disk
    nested = {
        f"{package}.{init.parent.name}"
        for package, folder in folders.items()
        for init in (ROOT / folder).glob("*/__init__.py")
    }
    assert set(config["options"]["packages"].split()) == set(folders) | nested
    assert all(
        name == ("tessera" if folder == "tessera" else f"tessera.{folder}")
        for name, folder in folders.items()
    )


def test_tests_run_against_this_checkout() -> None:
    """An environment copied along with a checkout would go on testing the checkout that it was made for."""
    for name, folder in package_folders().items():
        origin = Path(importlib.import_module(name).__file__)
        assert origin == ROOT / folder / "__init__.py", f"{name} comes from {origin}: run `make setup`"


# Folders of the machines that this was written on, home folders, and package registries or their mirrors.
ONE_MACHINE_ONLY = re.compile(
    r"(?<![\w.$}])/(?:work/|tmp/w/|root/|home/\w|Users/\w|opt/(?:wheels|pypi))"
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|index-url|[\w-]+\.jfrog\.io",
)


def test_no_file_names_a_machine_path_or_a_registry() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the project's")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    found = []
    for path in (ROOT / name for name in listed if name):
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1):
            if match := ONE_MACHINE_ONLY.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)
