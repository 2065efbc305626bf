"""Published tokenizers on hard strings and ten megabytes of real text: ids of tiktoken and SentencePiece.

benchmarks/tokenizer_parity.py is the same on every text there is.
"""

import hashlib
import lzma
import os
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
from transformers import AutoTokenizer

from tessera.tokenization import SPECIAL_TOKENS, import_tokenizer
from tessera.tokenization.byte_level import read_ranks
from tessera.tokenization.probes import adversarial_texts, every_character
from tessera.tokenization.reference_codecs import huggingface_codec, open_codec
from tessera.tokenization.token_bytes import token_bytes
from tessera.tokenization.verify import compare, verify_tokenizers

pytestmark = pytest.mark.shared

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
RANKS = SHARED / "data" / "tok_tiktoken"
MISTRAL = SHARED / "data" / "tok_mistral"
SPECIAL_IDS = {
    "r50k_base": {"<|endoftext|>": 50256},
    "cl100k_base": {"<|endoftext|>": 100257, "<|endofprompt|>": 100276},
    "o200k_base": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
}
# of the tokens of the chat format, the one that ends a document aside
CHAT_IDS = {
    "r50k_base": range(50257, 50270),
    "cl100k_base": range(100261, 100274),
    "o200k_base": range(200000, 200013),
}


@pytest.fixture(scope="module")
def real_text() -> list[str]:
    """Ten megabytes in chunks of some lines each."""
    with lzma.open(SHARED / "data" / "enwiki2015" / "train_200mb.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(10_000_000)
    chunks, start = [], 0
    while start < len(text):
        end = text.find("\n", start + 4000) + 1 or len(text)
        chunks.append(text[start:end])
        start = end
    return chunks


def reference_of(name: str, path: Path, monkeypatch) -> tiktoken.Encoding:
    """tiktoken's own encoding, with its own pattern, from a file instead of the network."""
    monkeypatch.setattr(
        tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *a, **k: read_ranks(path.read_bytes(), name)
    )
    return tiktoken.Encoding(**getattr(tiktoken_ext.openai_public, name)())


def require_equal(tokenizer, encode, texts: list[str]) -> None:
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    for start in range(0, len(texts), 500):
        batch = texts[start : start + 500]
        for text, given in zip(
            batch, backend.encode_batch_fast(batch, add_special_tokens=False), strict=True
        ):
            assert given.ids == encode(text), text


@pytest.mark.parametrize("name", SPECIAL_IDS)
def test_a_conversation_has_the_ids_of_tiktoken_between_its_special_tokens(name, monkeypatch):
    tokenizer = import_tokenizer(RANKS / f"{name}.tiktoken")
    reference = reference_of(name, RANKS / f"{name}.tiktoken", monkeypatch)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    think, thought = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    # The tokens of the chat format are not in tiktoken's, so that each text is encoded alone.
    turns = [
        [start, "system\nBe brief.", end],
        [start, "user\n 12345 naïve 東京?\n", end, "\n", start, "assistant\n"],
    ]
    answer = [think, "\nHm 🦊.\n", thought, "\nIt's 東 🦊", end]

    def ids(pieces: list) -> list[int]:
        encoded = [[p] if isinstance(p, int) else reference.encode_ordinary(p) for p in pieces]
        return [i for piece in encoded for i in piece]

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 12345 naïve 東京?\n"},
        {"role": "assistant", "content": "It's 東 🦊", "reasoning_content": "Hm 🦊."},
    ]
    given = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    prompt, said = ids([*turns[0], "\n", *turns[1]]), ids(answer)
    assert given["input_ids"] == prompt + said + reference.encode_ordinary("\n")
    assert given["assistant_masks"] == [0] * len(prompt) + [1] * len(said) + [0]


@pytest.mark.parametrize("name", SPECIAL_IDS)
def test_ids_of_tiktoken(name, tmp_path, monkeypatch, texts, real_text):
    path = RANKS / f"{name}.tiktoken"
    import_tokenizer(path, output=tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
    reference = reference_of(name, path, monkeypatch)
    require_equal(tokenizer, reference.encode_ordinary, texts)
    require_equal(tokenizer, reference.encode_ordinary, real_text)
    for text in [*texts, *real_text[:100]]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text == reference.decode(ids)
    assert (
        SPECIAL_IDS[name].items() <= {t: reference.encode_single_token(t) for t in SPECIAL_IDS[name]}.items()
    )
    for token, index in SPECIAL_IDS[name].items():
        assert tokenizer.convert_tokens_to_ids(token) == reference.encode_single_token(token) == index
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[1:])) == list(CHAT_IDS[name])
    assert len(tokenizer) == max(reference.n_vocab, CHAT_IDS[name][-1] + 1)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model.v1",
        "mistral_instruct_tokenizer_240216.model.v2",
        "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7",
    ],
)
def test_ids_of_mistral(name, texts, real_text):
    tokenizer = import_tokenizer(MISTRAL / name)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL / name))
    assert len(tokenizer) == len(reference) + len(SPECIAL_TOKENS)
    require_equal(tokenizer, reference.encode, texts)
    require_equal(tokenizer, reference.encode, real_text)
    for text in [*texts, *real_text[:100]]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids) == text.replace("\u2581", " ")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.convert_ids_to_tokens(list(range(400))) == reference.id_to_piece(list(range(400)))


def test_ids_of_gpt2s_own_files(tmp_path, monkeypatch, texts, real_text):
    import_tokenizer(SHARED / "data" / "tok_gpt2", chat=False, output=tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    reference = reference_of("r50k_base", RANKS / "r50k_base.tiktoken", monkeypatch)
    require_equal(tokenizer, reference.encode_ordinary, texts)
    require_equal(tokenizer, reference.encode_ordinary, real_text)
    assert len(tokenizer) == reference.n_vocab and tokenizer.eos_token_id == reference.eot_token


def test_a_name_is_read_from_the_cache_of_tiktoken(tmp_path, monkeypatch):
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    cached = tmp_path / hashlib.sha1(url.encode()).hexdigest()
    cached.write_bytes((RANKS / "r50k_base.tiktoken").read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    by_name = import_tokenizer("gpt2")
    assert by_name.get_vocab() == import_tokenizer(RANKS / "r50k_base.tiktoken").get_vocab()


ORIGINALS = {
    "r50k_base": RANKS / "r50k_base.tiktoken",
    "cl100k_base": RANKS / "cl100k_base.tiktoken",
    "o200k_base": RANKS / "o200k_base.tiktoken",
    "gpt2": SHARED / "data" / "tok_gpt2",
    "mistral": MISTRAL / "mistral_instruct_tokenizer_241114.model.v7",
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_hard_strings_and_unicode(name):
    original = open_codec(ORIGINALS[name])
    assert original.library.startswith("sentencepiece" if name == "mistral" else "tiktoken")
    tokenizer = import_tokenizer(ORIGINALS[name])
    written = huggingface_codec(tokenizer)
    # whole are the planes that have scripts: 64 characters a text
    characters = [text for i, text in enumerate(every_character()) if i < 3 * 1024 or i % 50 == 0]
    for texts, at_least in ((adversarial_texts([*written.special_tokens]), 1600), (characters, 3300)):
        found = compare(original, written, texts)
        assert found.equal and found.documents > at_least, found.report()
        # U+2581 means a space to SentencePiece
        assert found.came_back[1] >= found.documents - (3 if name == "mistral" else 0)
    assert token_bytes(tokenizer).pieces[: len(original.table.pieces)] == original.table.pieces


def test_the_two_forms_of_gpt2_are_one():
    assert verify_tokenizers(ORIGINALS["gpt2"], ORIGINALS["r50k_base"]).equal


def test_two_encodings_are_told_apart():
    found = verify_tokenizers(ORIGINALS["cl100k_base"], ORIGINALS["o200k_base"], ["Same words, don't they?"])
    assert not found.equal and "<|endoftext|> 100257 and 199999" in found.report()
