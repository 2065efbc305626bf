"""Pipelines over every head of every dialect: what each returns is what the model itself gives.

With a checkout of transformers that has its pipeline tests (`TRANSFORMERS_TESTS`), those are run too.
"""

import tempfile
import unittest
import unittest.mock
from pathlib import Path

import pytest
import torch
from helpers.weights import randomize
from transformers import pipeline

from contract import upstream
from contract.dialects import DIALECTS, DialectTester, contract_config
from contract.left_out import leave_out
from tessera.tokenization import train_tokenizer

TEXTS = ["This is a test", "Another one, and longer"]


def save_tiny_model(folder: Path, dialect: str, model_class: type) -> None:
    """A model of random weights with the byte tokenizer, whose special tokens come after the 256 bytes."""
    tokenizer = train_tokenizer(kind="bytes", output=folder)
    labels = {"id2label": {0: "ENTAILMENT", 1: "NEUTRAL"}, "label2id": {"ENTAILMENT": 0, "NEUTRAL": 1}}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # The longest text of theirs has 1400 bytes, and each byte is a token.
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    config = contract_config(dialect, bos_token_id=None, **special, **sizes, **labels)
    randomize(model_class(config)).save_pretrained(folder)


@pytest.fixture(params=DIALECTS)
def build(request, tmp_path):
    """Builds a pipeline of a task from a saved directory."""

    def build(task: str, model_class: type, **kwargs):
        save_tiny_model(tmp_path / task, request.param, model_class)
        return pipeline(task, model=str(tmp_path / task), device="cpu", **kwargs)

    return build


@torch.no_grad()
def test_feature_extraction_gives_the_last_hidden_states(build):
    extractor = build("feature-extraction", DialectTester.base_model_class)
    for text, states in zip(TEXTS, extractor(TEXTS), strict=True):
        expected = extractor.model(**extractor.tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(torch.tensor(states), expected)


@torch.no_grad()
def test_text_classification_of_a_batch_gives_what_each_text_gives_alone(build):
    classifier = build("text-classification", DialectTester.sequence_classification_class, top_k=None)
    for text, labels in zip(TEXTS, classifier(TEXTS, batch_size=2), strict=True):
        expected = classifier.model(**classifier.tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        scores = {entry["label"]: entry["score"] for entry in labels}
        given = torch.tensor([scores["ENTAILMENT"], scores["NEUTRAL"]])
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_token_classification_labels_every_byte(build):
    tagger = build("token-classification", DialectTester.token_classification_class, ignore_labels=[])
    entities = tagger(TEXTS[0])
    expected = tagger.model(**tagger.tokenizer(TEXTS[0], return_tensors="pt")).logits[0].argmax(-1)
    assert [entity["entity"] for entity in entities] == [
        tagger.model.config.id2label[i] for i in expected.tolist()
    ]
    assert "".join(TEXTS[0][entity["start"] : entity["end"]] for entity in entities) == TEXTS[0]


@torch.no_grad()
def test_zero_shot_classification_scores_each_label_by_its_entailment(build):
    classifier = build("zero-shot-classification", DialectTester.sequence_classification_class)
    result = classifier(TEXTS[0], ["tests", "politics"], hypothesis_template="about {}", multi_label=True)
    for label, score in zip(result["labels"], result["scores"], strict=True):
        pair = classifier.tokenizer(TEXTS[0], f"about {label}", return_tensors="pt")
        pair.pop("token_type_ids", None)
        expected = classifier.model(**pair).logits[0].flip(0).softmax(-1)[1]
        assert score == pytest.approx(expected.item(), abs=1e-5)


def test_text_generation_of_a_batch_gives_what_each_prompt_gives_alone(build):
    generator = build("text-generation", DialectTester.causal_lm_class)
    greedy = {"do_sample": False, "max_new_tokens": 6}
    together = generator(TEXTS, batch_size=2, **greedy)
    assert [out[0] for out in together] == [generator(text, **greedy)[0] for text in TEXTS]


if upstream.is_laid_out() and upstream.has("pipelines.test_pipelines_common"):
    from transformers_tests import test_pipeline_mixin
    from transformers_tests.test_pipeline_mixin import PipelineTesterMixin

    class _PipelineContract(PipelineTesterMixin):
        dialect: str
        pipeline_model_mapping = {
            "feature-extraction": DialectTester.base_model_class,
            "text-classification": DialectTester.sequence_classification_class,
            "text-generation": DialectTester.causal_lm_class,
            "token-classification": DialectTester.token_classification_class,
            "zero-shot": DialectTester.sequence_classification_class,
        }

        def setUp(self):
            super().setUp()
            # Where the tests look for a model of each class: <folder>/<model type>/<class>.
            folder = tempfile.TemporaryDirectory()
            self.addCleanup(folder.cleanup)
            summary = {}
            for model_class in set(self.pipeline_model_mapping.values()):
                name = model_class.__name__
                save_tiny_model(Path(folder.name, "tessera", name), self.dialect, model_class)
                summary[name] = {"tokenizer_classes": ["TokenizersBackend"], "processor_classes": []}
            for name, value in (
                ("TRANSFORMERS_TINY_MODEL_PATH", folder.name),
                ("tiny_model_summary", summary),
            ):
                patch = unittest.mock.patch.object(test_pipeline_mixin, name, value)
                patch.start()
                self.addCleanup(patch.stop)

    for _dialect in DIALECTS:
        _name = f"{_dialect.capitalize()}PipelineTest"
        globals()[_name] = leave_out(
            type(
                _name, (_PipelineContract, unittest.TestCase), {"dialect": _dialect, "__module__": __name__}
            ),
            _dialect,
        )
