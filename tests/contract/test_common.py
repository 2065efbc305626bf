"""transformers' common tests of a causal model, dialect by dialect: model, generation, training, config."""

import copy
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
    # Unset, they would leave the test out for a library that is not in their own tree.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        self.model_tester = DialectTester(self, self.dialect)

    def test_config(self):
        ConfigTester(self, config_class=DialectTester.config_class).run_common_tests()

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        if config.smear:
            # One more layer of the cache holds the embeddings; the check is of those with keys and values.
            past_key_values = copy.copy(past_key_values)
            *past_key_values.layers, embeddings = past_key_values.layers
            batch, heads, _, width = embeddings.keys.shape
            self.assertEqual((batch, heads, width), (batch_size, 1, config.hidden_size))
        super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length, config)


for _dialect in DIALECTS:
    _name = f"{_dialect.capitalize()}ModelTest"
    globals()[_name] = leave_out(
        type(_name, (_Contract, unittest.TestCase), {"dialect": _dialect, "__module__": __name__}), _dialect
    )
