"""The code of saved models: which files it is by Python's own grammar, and running without Tessera."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from tessera.modeling import auto_map

FOLDER = Path(auto_map.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")


def imports_of(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Every import statement of a file, wherever it stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def siblings_of(path: Path) -> set[str]:
    """What a file imports relatively."""
    return {node.module for node in imports_of(path) if isinstance(node, ast.ImportFrom) and node.level}


def outsiders_of(path: Path) -> set[str]:
    """First names of what a file imports absolutely."""
    names = []
    for node in imports_of(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif not node.level:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


def travelling() -> set[str]:
    """Names of the files that go with a saved model: itself and what it imports."""
    found, new = set(), {"modeling_tessera"}
    while new:
        found |= new
        new = {name for file in new for name in siblings_of(FOLDER / f"{file}.py")} - found
    return found


def without_tessera(code: str, *arguments, home: Path, **environment: str) -> str:
    """Runs Python where `tessera` cannot be imported and, unless told otherwise, no network is asked.

    Args:
        code: is run after the block.
        arguments: become `sys.argv[1:]`.
        home: of Hugging Face's caches, empty or not; the working directory is beside it.
        environment: more variables.

    Returns:
        What it printed. A failure fails the test with its traceback.
    """
    home.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['tessera'] = None\n{code}", *map(str, arguments)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            **environment,
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
        },
        cwd=home.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
