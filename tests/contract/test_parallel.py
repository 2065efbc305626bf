"""transformers' tests of tensor, expert and data parallelism, dialect by dialect."""

import shutil
import unittest
from pathlib import Path

import pytest

from contract import upstream
from contract.dialects import DIALECTS, DialectTester, contract_config
from contract.left_out import leave_out

pytestmark = pytest.mark.distributed

_starter = upstream.root() / upstream.PACKAGE / "distributed_testing_utils.py"
if not _starter.is_file():
    shutil.copy(Path(__file__).with_name("rank_processes.py"), _starter)

from transformers_tests import (  # noqa: E402  (what the line above completes)
    test_expert_parallel_mixin,
    test_fsdp_mixin,
    test_tensor_parallel_mixin,
)

# The mixins run their slow tests for the models of these lists only.
for _mixin, _kind in (
    (test_tensor_parallel_mixin, "TP"),
    (test_expert_parallel_mixin, "EP"),
    (test_fsdp_mixin, "FSDP"),
):
    setattr(_mixin, f"{_kind}_DISTRIBUTED_TEST_MODEL_TYPES", None)
# They count a core to a process, which models of this size do not need.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8


class _Contract(
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    dialect: str
    model_tester = None
    all_model_classes = DialectTester.all_model_classes

    def setUp(self):
        super().setUp()
        self.model_tester = DialectTester(self, self.dialect)

    def _get_tiny_config(self):
        # The mixin's own changes the fields one by one, which leaves behind those that follow from them.
        # Without the load-balancing loss: that of a batch is not the mean of those of the ranks' parts.
        fields = {"vocab_size": 256, "router_aux_loss_coef": 0.0}
        if self.dialect == "nanochat":
            # With two layers backout subtracts the last residual from itself, and its gradient is zero but
            # for rounding, which leads Adam two ways.
            fields["num_hidden_layers"] = 3
        config = contract_config(self.dialect, **fields)
        return type(config), config.to_diff_dict()


for _dialect in DIALECTS:
    _name = f"{_dialect.capitalize()}ParallelTest"
    globals()[_name] = leave_out(
        type(_name, (_Contract, unittest.TestCase), {"dialect": _dialect, "__module__": __name__}), _dialect
    )
