"""llama2.c's files in: the three versions, their tokenizer, and the story that its smallest model tells."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from helpers.llama_originals import meta_weights, tiny_llama, train_sentencepiece
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tessera.conversion.convert import convert
from tessera.conversion.llama2c_tokenizer import find_tokenizer, read_tokenizer
from tessera.modeling.loading import load_model

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
GROUP = 16


def quantize(tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Q8_0 as llama2.c has it: numbers and scales."""
    groups = tensor.float().reshape(-1, GROUP).numpy()
    scales = np.abs(groups).max(axis=1) / 127.0
    return np.round(groups / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def write_bin(file: Path, model: transformers.PreTrainedModel, version: int) -> Path:
    """Writes a model as llama2.c's exporter does; in version 2 the model gets what is left of its weights."""
    weights, config = meta_weights(model), model.config
    layers, tied = range(config.num_hidden_layers), config.tie_word_embeddings
    sizes = [config.hidden_size, config.intermediate_size, len(layers), config.num_attention_heads]
    sizes += [config.num_key_value_heads, config.vocab_size, config.max_position_embeddings]

    def each(kind: str) -> list[torch.Tensor]:
        return [weights[f"layers.{i}.{kind}.weight"] for i in layers]

    attention = [t for kind in ("wq", "wk", "wv", "wo") for t in each(f"attention.{kind}")]
    forward = [t for kind in ("w1", "w2", "w3") for t in each(f"feed_forward.{kind}")]
    embedding, norm = weights["tok_embeddings.weight"], weights["norm.weight"]
    head = [] if tied else [weights["output.weight"]]
    if version == 0:
        sizes[5] *= 1 if tied else -1
        parts = [struct.pack("<7i", *sizes)]
        rotations = torch.ones(config.max_position_embeddings * config.head_dim)
        tensors = [embedding, *each("attention_norm"), *attention, *each("ffn_norm"), *forward, norm]
        parts += [tensor.numpy().tobytes() for tensor in (*tensors, rotations, *head)]
    else:
        flags = struct.pack("<Bi", tied, GROUP if version == 2 else 0)
        parts = [(struct.pack("<Ii7i", 0x616B3432, version, *sizes) + flags).ljust(256, b"\0")]
        norms, matrices = (
            [*each("attention_norm"), *each("ffn_norm"), norm],
            [embedding, *attention, *forward],
        )
        parts += [tensor.numpy().tobytes() for tensor in norms]
        for tensor in (*matrices, *head):
            pieces = quantize(tensor) if version == 2 else (tensor.numpy(),)
            parts += [piece.tobytes() for piece in pieces]
    file.write_bytes(b"".join(parts))
    return file


@pytest.mark.parametrize(("version", "tied"), [(0, True), (0, False), (1, True), (1, False)])
def test_a_file_is_the_llama_with_permuted_weights(version, tied, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    done = convert(write_bin(tmp_path / "model.bin", model, version), tmp_path / "ours")
    assert done.source == "llama2.c"
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(load_model(tmp_path / "ours")(IDS).logits, expected, atol=1e-5, rtol=0)
    convert(tmp_path / "ours", tmp_path / "llama", to="llama", verify="weights")
    found = load_file(tmp_path / "llama" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.get(name, found["model.embed_tokens.weight"]), tensor)


@pytest.mark.parametrize("tied", [True, False])
def test_version_2_is_multiplied_out(tied, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    file = write_bin(tmp_path / "model.bin", model, 2)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.shape != (0,):
            # Groups of 16 lie within a row, so the order of rows does not matter to them.
            numbers, scales = quantize(parameter.data)
            parameter.data = torch.from_numpy(numbers * scales[:, None]).view(parameter.shape)
    convert(file, tmp_path / "ours")
    with torch.no_grad():
        found, expected = load_model(tmp_path / "ours")(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_model_of_a_directory_is_found_among_other_bin_files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    write_bin(folder / "stories.bin", tiny_llama(), 1)
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model.bin")
    assert convert(folder, tmp_path / "ours").source == "llama2.c"
    write_bin(folder / "another.bin", tiny_llama(), 0)
    with pytest.raises(ValueError, match=r"holds several models; name the one .*another\.bin, stories\.bin"):
        convert(folder, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda data: data[:-5],
            r"model\.bin is cut short: its sizes make [\d,]+ bytes .*, but it has [\d,]+",
        ),
        (lambda data: data + b"\0", r"model\.bin is too long"),
        (lambda data: data[:100], "is not a model of llama2.c"),
        (
            lambda data: b"24kA" + data[4:],
            "begins neither with the magic number ak42 nor with the seven sizes",
        ),
        (lambda data: data[:4] + struct.pack("<i", 3) + data[8:], "of version 3 .*; known are 0, 1 and 2"),
        (lambda data: data[:20] + struct.pack("<i", 5) + data[24:], "is not a model of llama2.c"),
        (lambda data: b"", "is not a model of llama2.c"),
        (lambda data: data[:28] + struct.pack("<i", 97) + data[32:], "cut short|too long"),
    ],
)
def test_another_file_is_refused_in_a_sentence(change, sentence, tmp_path):
    file = write_bin(tmp_path / "model.bin", tiny_llama(), 1)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=sentence):
        convert(file, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_groups_that_do_not_divide_are_refused(tmp_path):
    file = write_bin(tmp_path / "model.bin", tiny_llama(), 2)
    data = file.read_bytes()
    for group, sentence in ((7, "groups of 7 do not divide"), (0, "must be at least 1")):
        file.write_bytes(data[:37] + struct.pack("<i", group) + data[41:])
        with pytest.raises(ValueError, match=sentence):
            convert(file, tmp_path / "ours")


# ---- tokenizer ----


def export_pieces(model: sentencepiece.SentencePieceProcessor) -> bytes:
    """A SentencePiece model as llama2.c's exporter writes it."""
    parts = []
    for index in range(model.vocab_size()):
        text = model.id_to_piece(index)
        if index in (model.bos_id(), model.eos_id()):
            text = f"\n{text}\n"
        piece = text.replace("▁", " ").encode()
        parts.append(struct.pack("<fI", model.get_score(index), len(piece)) + piece)
    return struct.pack("<I", max(len(part) for part in parts) - 8) + b"".join(parts)


TEXTS = [
    "the little girl named Lily loved to play.",
    "  two  spaces\nand a line, é 🙂 \t123",
    "outsideparkballs of Lily's",
    " ",
    "",
]


@pytest.mark.parametrize("keep", ["tok300.bin", "tokenizer.model"])
def test_the_tokenizer_has_sentencepieces_ids_after_a_beginning(keep, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    data = train_sentencepiece(folder / "tokenizer.model", 300)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    (folder / "tok300.bin").write_bytes(export_pieces(model))
    for file in folder.iterdir():
        if file.name != keep:
            file.unlink()
    write_bin(folder / "model.bin", tiny_llama(vocab_size=300), 0)
    convert(folder / "model.bin", tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [1, *model.encode(text)]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.encode(text)
        assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_tokenizer_that_is_damaged_or_of_another_model_is_left_with_a_note(tmp_path):
    model = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(tmp_path / "t.model", 300))
    (tmp_path / "t.model").unlink()
    write_bin(tmp_path / "model.bin", tiny_llama(vocab_size=300), 0)
    data = export_pieces(model)
    # The score of the first piece.
    unscored = data[:4] + struct.pack("<f", float("nan")) + data[8:]

    def found(**files: bytes):
        for file in tmp_path.glob("tok*"):
            file.unlink()
        for name, content in files.items():
            (tmp_path / f"{name}.bin").write_bytes(content)
        return find_tokenizer(tmp_path, 300)

    for content, sentence in (
        (data[:-1], "tokenizer.bin is cut short: piece 299 has"),
        (data[:-6], "cut short"),
        (data[:4], "tokenizer.bin is not a tokenizer of llama2.c"),
        (data[:-1] + b"\xff", "tokenizer.bin: piece 299 is not UTF-8"),
        (unscored, "tokenizer.bin is damaged: the score of piece 0 is nan"),
        (data + struct.pack("<fI", -1.0, 1) + b"%", "tokenizer.bin has 301 pieces"),
    ):
        left = found(tokenizer=content)
        assert left.write is None and sentence in left.notes[0]
    # Ids of a text, and a sparse file that is not to be read into memory.
    ids = np.arange(4000, dtype=np.uint16).tobytes()
    assert found(tokens=ids, tok300=data).write is not None
    with open(tmp_path / "tokens.bin", "r+b") as stream:
        stream.truncate(2**26 + 1)
    assert find_tokenizer(tmp_path, 300).notes == []
    assert "tok1.bin, tok2.bin fit alike" in found(tok1=data, tok2=data).notes[0]
    found(tokens=ids)
    done = convert(tmp_path / "model.bin", tmp_path / "ours", verify="weights")
    assert "not exactly one beside the model has its 300 pieces (tokens.bin" in done.notes[0]
    assert not list((tmp_path / "ours").glob("tokenizer*"))


# ---- shared data ----


@pytest.mark.shared
def test_mistrals_tokenizer_as_a_bin_file_has_sentencepieces_ids(tmp_path):
    from tessera.tokenization.reference_codecs import huggingface_codec, sentencepiece_codec
    from tessera.tokenization.verify import require_same

    data = (SHARED / "data/tok_mistral/tokenizer.model.v1").read_bytes()
    file = tmp_path / "tokenizer.bin"
    file.write_bytes(export_pieces(sentencepiece.SentencePieceProcessor(model_proto=data)))
    require_same(sentencepiece_codec(data, "Mistral's"), huggingface_codec(read_tokenizer(file)), "the file")


@pytest.mark.shared
def test_stories260k_tells_its_published_story_after_each_step(tmp_path):
    """.bin -> Tessera -> two ranks -> Tessera -> Llama, greedy from the beginning-of-text token."""
    source = SHARED / "data/stories260k"
    page = (source / "stories260K.md").read_text()
    published = page.partition("-t 0.0\n")[2].partition("\n```")[0]
    golden = json.loads((source / "hf_llama" / "golden.json").read_text())
    assert len(published) == 565

    def story(model, folder: Path) -> str:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt, count = tokenizer("", return_tensors="pt")["input_ids"], len(golden["greedy_ids"])
        out = model.generate(prompt, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        assert out[0].tolist() == golden["prompt_ids"] + golden["greedy_ids"]
        return tokenizer.decode(out[0], skip_special_tokens=True)

    convert(source, tmp_path / "ours")
    assert story(load_model(tmp_path / "ours"), tmp_path / "ours") == published
    convert(tmp_path / "ours", tmp_path / "native", n_experts=0, mp=2)
    convert(tmp_path / "native", tmp_path / "again")
    assert story(load_model(tmp_path / "again"), tmp_path / "again") == published
    convert(tmp_path / "again", tmp_path / "llama", to="llama")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert story(llama, tmp_path / "llama") == published
    expected = (source / "hf_llama" / "model.safetensors").read_bytes()
    assert (tmp_path / "llama" / "model.safetensors").read_bytes() == expected
    # From the same weights as a Llama of transformers: the same Tessera but for the order in a head.
    shutil.copytree(source / "hf_llama", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "from_llama")
    convert(tmp_path / "from_llama", tmp_path / "back", to="llama")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == expected
