"""modeling/ stays loadable as remote code: transformers sees in its files what Python imports there."""

import ast
import sys

import pytest
from helpers.remote_code import FILES, FOLDER, imports_of, outsiders_of, siblings_of, travelling
from transformers.dynamic_module_utils import get_imports, get_relative_imports

THIRD_PARTY = {"torch", "transformers", "huggingface_hub"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_import_each_other_flat_and_visibly(path):
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, f"line {node.lineno}: give `from .name import x`"
            assert "." not in node.module, f"line {node.lineno}: saved directories have no folders"
            assert (FOLDER / f"{node.module}.py").is_file(), f"line {node.lineno}"
        assert getattr(node, "module", "") != "__future__", "dataclass fields must have types, not strings"
    # transformers reads lines, not Python: docstrings and `;` can deceive it.
    assert set(get_relative_imports(path)) == siblings_of(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_need_only_what_whoever_loads_them_has(path):
    allowed = THIRD_PARTY | sys.stdlib_module_names
    if path.stem not in travelling():
        allowed = allowed | {"safetensors"}
    # Kernels are taken where Triton is: the import is in a `try`, which transformers leaves out.
    assert outsiders_of(path) - {"triton"} <= allowed
    assert set(get_imports(path)) <= allowed


def test_the_packages_own_tools_stay_behind():
    stay = {path.stem for path in FILES} - travelling()
    assert {"loading", "accounting"} <= stay
    assert {"attention", "auto_map", "configuration_tessera", "feed_forward", "layers"} <= travelling()
