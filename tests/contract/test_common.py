"""transformers' common tests of a causal model, dialect by dialect: models, generation, training, configuration."""

import unittest

from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from contract.dialects import DIALECTS, DialectTester
from contract.left_out import leave_out


class _Contract(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    dialect: str
    all_model_classes = DialectTester.all_model_classes

    def setUp(self):
        super().setUp()
        self.model_tester = DialectTester(self, self.dialect)

    def test_config(self):
        ConfigTester(self, config_class=DialectTester.config_class).run_common_tests()


for _dialect in DIALECTS:
    _name = f"{_dialect.capitalize()}ModelTest"
    globals()[_name] = leave_out(
        type(_name, (_Contract, unittest.TestCase), {"dialect": _dialect, "__module__": __name__}), _dialect
    )
