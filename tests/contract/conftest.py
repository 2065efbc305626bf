"""Makes transformers' tests importable, and gives pytest the marks that their own conftest declares."""

import os
import sys

from contract import upstream

# Set before transformers is imported: no test of the contract needs the Hub, and none may wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Files made of transformers' mixins; `make test-contract` lays these out first.
collect_ignore = (
    [] if upstream.is_laid_out() else ["test_common.py", "test_parallel.py", "test_tokenizers.py"]
)

MARKS = (
    "accelerate_tests",
    "all_flash_attn_test",
    "executorch_export_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "onnx_export_test",
    "openvino_export_test",
    "timeout",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
    if upstream.is_laid_out() and str(upstream.root()) not in sys.path:
        sys.path.insert(0, str(upstream.root()))
        # Processes that the tests start find the package too.
        paths = [str(upstream.root()), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def pytest_report_header(config):
    if not upstream.is_laid_out():
        return "transformers' own tests: not here, and left out; `make test-contract` downloads them"
    source = (upstream.root() / "source.txt").read_text(encoding="utf-8")
    return f"transformers' own tests: {upstream.version()}, from {source}"
