"""transformers' common tests of tokenizers, over the three kinds that Tessera trains."""

import tempfile
import unittest
from pathlib import Path

from transformers import TokenizersBackend
from transformers_tests.test_tokenization_common import TokenizerTesterMixin
from transformers_tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin

from contract.left_out import leave_out
from tessera.tokenization import ByteTokenizer, train_tokenizer

# Words of the common tests' own sentences, so that a vocabulary has tokens that they look for.
WORDS = "this is the first sentence that tests a method with inputs of words and lower newer wider".split()
TEXTS = [" ".join(WORDS[i:] + [word.capitalize() for word in WORDS[:i]]) for i in range(len(WORDS))]


class _TokenizerContract(TokenizersBackendTesterMixin, TokenizerTesterMixin):
    kind: str

    @classmethod
    def setUpClass(cls):
        cls._folder = tempfile.TemporaryDirectory()
        folder = Path(cls._folder.name) / cls.kind
        size = None if cls.kind == "bytes" else 340
        train_tokenizer(TEXTS * 20, kind=cls.kind, vocab_size=size, output=folder)
        cls.from_pretrained_id = [str(folder)]
        TokenizerTesterMixin.setUpClass.__func__(cls)

    @classmethod
    def tearDownClass(cls):
        TokenizerTesterMixin.tearDownClass.__func__(cls)
        cls._folder.cleanup()


KINDS = {"bytes": ByteTokenizer, "bpe": TokenizersBackend, "sentencepiece": TokenizersBackend}

for _kind, _class in KINDS.items():
    _name = f"{_kind.capitalize()}TokenizerTest"
    _fields = {"kind": _kind, "tokenizer_class": _class, "rust_tokenizer_class": _class}
    globals()[_name] = leave_out(
        type(_name, (_TokenizerContract, unittest.TestCase), {**_fields, "__module__": __name__}), _kind
    )
