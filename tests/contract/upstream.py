"""Lays out transformers' own common tests as a package that ours can import: `transformers_tests`.

They are in the source distribution of transformers, not in its wheel. So `make test-contract` calls this
file, which downloads the source distribution of the installed version through pip once, and unpacks its tests
into an ignored folder. The distribution lacks some files of the repository (the generation, export and
pipeline tests); `TRANSFORMERS_TESTS` may name a checkout that has them. Where they are missing, empty classes
stand in, so that what is there can be imported. Nothing of transformers is kept in this repository.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "transformers_tests"
# Folders of the checkout's tests that the common tests import from.
FOLDERS = ("generation", "exporters", "pipelines")

# Modules that the source distribution lacks and its tests import by name.
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    # Fields that every configuration takes, with values other than their defaults.
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16', "
        "'problem_type': 'regression', 'id2label': {0: 'one'}, 'label2id': {'one': '0'}}\n"
    ),
}


def version() -> str:
    """The version of transformers whose tests are run: the installed one."""
    return importlib.metadata.version("transformers")


def root() -> Path:
    """The folder that holds the package and that goes onto `sys.path`, whether it is there or not."""
    return REPOSITORY / ".cache" / f"transformers-{version()}"


def is_laid_out() -> bool:
    """Whether `lay_out` has finished here for the installed version."""
    return (root() / "source.txt").is_file()


def has(module: str) -> bool:
    """Whether a module of transformers' tests, such as `generation.test_utils`, is theirs and no stand-in."""
    path = module.replace(".", "/") + ".py"
    here = root() / PACKAGE / path
    return here.is_file() and here.read_text(encoding="utf-8") != STAND_INS.get(path)


def lay_out() -> Path:
    """Makes the package, from `TRANSFORMERS_TESTS` or from the source distribution, unless it is there.

    Raises:
        ValueError: if `TRANSFORMERS_TESTS` names no folder with the common tests.
        CalledProcessError: if pip cannot download the source distribution.
    """
    checkout = os.environ.get("TRANSFORMERS_TESTS")
    target, stamp = root(), root() / "source.txt"
    if checkout is None:
        if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == "source distribution"):
            with tempfile.TemporaryDirectory() as folder:
                _copy(_download(Path(folder)), target, "source distribution")
        return target
    tests = Path(checkout)
    tests = tests / "tests" if (tests / "tests").is_dir() else tests
    if not (tests / "test_modeling_common.py").is_file():
        raise ValueError(f"TRANSFORMERS_TESTS={checkout} has no tests/test_modeling_common.py")
    # A checkout may have been edited since; copying it costs nothing.
    _copy(tests, target, str(tests.resolve()))
    return target


def _download(folder: Path) -> Path:
    """The unpacked tests of the source distribution of the installed version."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--dest", str(folder), f"transformers=={version()}"]
    subprocess.run(command, check=True)
    archive = next(folder.glob("transformers-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("transformers-*/tests"))


def _copy(tests: Path, target: Path, source: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    package = target / PACKAGE
    package.mkdir(parents=True)
    for path in tests.glob("*.py"):
        shutil.copy(path, package)
    for folder in FOLDERS:
        if (tests / folder).is_dir():
            shutil.copytree(tests / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        # Some name themselves by the absolute name, which here is that of our own tests.
        path.write_text(re.sub(r'(from |")tests\.', rf"\1{PACKAGE}.", text), encoding="utf-8")
    for path, text in STAND_INS.items():
        if not (package / path).is_file():
            (package / path).parent.mkdir(exist_ok=True)
            (package / path).write_text(text, encoding="utf-8")
    for folder in (package, *(path for path in package.iterdir() if path.is_dir())):
        (folder / "__init__.py").touch()
    # The tokenizer tests read a text when they start, and then make no use of it.
    (package / "fixtures").mkdir(exist_ok=True)
    (package / "fixtures" / "sample_text.txt").write_text("A text.", encoding="utf-8")
    if (tests.parent / "utils" / "test_module").is_dir():
        # The pipeline tests of a checkout import it from beside the tests.
        shutil.copytree(tests.parent / "utils" / "test_module", target / "utils" / "test_module")
    # They also read both of these when imported: the list of the Hub's tiny models, and the library itself.
    summary = target / "tests" / "utils" / "tiny_model_summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text("{}", encoding="utf-8")
    (target / "src").mkdir()
    library = importlib.util.find_spec("transformers").submodule_search_locations[0]
    (target / "src" / "transformers").symlink_to(library, target_is_directory=True)
    (target / "source.txt").write_text(source, encoding="utf-8")


if __name__ == "__main__":
    try:
        print(f"[test-contract] transformers' tests are in {lay_out().relative_to(REPOSITORY)}")
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"make test-contract: {error}")
