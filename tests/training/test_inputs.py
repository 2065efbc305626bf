"""From text to one stream of tokens."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tessera import build_byte_tokenizer
from tessera.training.inputs import encode

DOCUMENTS = [b"one<|end|>", b"\xff\x00two", "drei é".encode()]


def test_bytes_stay_bytes_with_a_line_break_between_documents():
    tokens = encode(build_byte_tokenizer(), DOCUMENTS)
    assert bytes(tokens.ids.tolist()) == b"\n".join(DOCUMENTS)
    assert tokens.num_bytes == len(b"\n".join(DOCUMENTS))
    assert tokens.ids.dtype == np.uint8


def test_bytes_with_an_end_token_keep_texts_that_spell_it():
    tokens = encode(build_byte_tokenizer(eos_token="<|end|>"), DOCUMENTS)
    expected = [token for document in DOCUMENTS for token in [*document, 256]]
    assert tokens.ids.tolist() == expected


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<|end|>": 3, "\n": 4}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_other_tokenizers_end_each_document_and_read_control_tokens_as_text(word_tokenizer):
    word_tokenizer.eos_token = "<|end|>"
    assert encode(word_tokenizer, [b"a b", b"b"]).ids.tolist() == [1, 2, 3, 2, 3]
    spelled = encode(word_tokenizer, [b"a<|end|>b"]).ids.tolist()
    assert spelled.count(3) == 1 and spelled[-1] == 3


def test_documents_without_an_end_token_do_not_run_together(word_tokenizer):
    assert encode(word_tokenizer, [b"a", b"b"]).ids.tolist() == [1, 4, 2]
