"""Words counted in pieces, processes and shards against those of whole texts; what is dropped; failures."""

import random
import shutil
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from tessera import tokenization
from tessera.tokenization import word_counts
from tessera.tokenization.byte_level import GPT4_PATTERN
from tessera.tokenization.word_counts import SPACES_PARTS, SPACES_PATTERN, count_words, cut_text


def words_of_the_library(text: str) -> list[str]:
    split = pre_tokenizers.Split(Regex(GPT4_PATTERN), behavior="isolated")
    return [word for word, _ in split.pre_tokenize_str(text)]


def words_of_sentencepiece(text: str) -> list[str]:
    """Spaces and what follows them, character by character."""
    words = []
    for line in text.split("\n"):
        for place, character in enumerate(line):
            if place == 0 or (character == " " and line[place - 1] != " "):
                words.append("")
            words[-1] += character
    return words


WORDS_OF = {GPT4_PATTERN: words_of_the_library, SPACES_PATTERN: words_of_sentencepiece}


@pytest.fixture
def assigned(texts) -> list[str]:
    """Texts of characters that all tables of Unicode know: those of the libraries are of different years."""
    return ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in texts]


@pytest.fixture
def small_limits(monkeypatch):
    """Processes for little text, and little text at a time."""
    monkeypatch.setattr(word_counts, "SMALL", 1000)
    monkeypatch.setattr(word_counts, "BATCH", 3000)
    monkeypatch.setattr(word_counts, "OPEN_SHARDS", 3)


@pytest.mark.parametrize("pattern", WORDS_OF)
def test_words_are_those_of_the_library(pattern, assigned, corpus):
    for text in [*assigned, *corpus]:
        assert count_words([text], pattern).counts == Counter(WORDS_OF[pattern](text))


def test_a_cut_text_has_the_same_words(assigned, corpus):
    draw = random.Random(3)
    texts = [
        *corpus,
        *(draw.choice(["", " ", "\n", "\n \n", "  a", "京"]).join(assigned[:300]) for _ in "123"),
    ]
    for text in texts:
        for length in (50, 400):
            pieces = list(cut_text(text, length))
            assert "".join(pieces) == text and max(map(len, pieces)) <= length
            words, cut = Counter(words_of_the_library(text)), Counter()
            for piece in pieces:
                cut.update(words_of_the_library(piece))
            # but where nothing was left but to cut a word
            hard = sum(len(piece) == length for piece in pieces)
            assert sum(abs(cut[word] - words[word]) for word in {*cut, *words}) <= 4 * hard
    assert list(cut_text("")) == []
    assert list(cut_text("one two  three\n\n four", 9)) == ["one two", "  three", "\n\n four"]
    assert list(cut_text("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]


@pytest.mark.parametrize("pattern", WORDS_OF)
@pytest.mark.parametrize("memory", [word_counts.MEMORY, 700_000])
def test_processes_and_shards_count_the_same(small_limits, monkeypatch, corpus, pattern, memory):
    # with the smaller memory, several shards of each process, which are merged in more than one go
    monkeypatch.setattr(word_counts, "_keep", lambda words, memory: word_counts.WordCounts(dict(words())))
    expected = Counter(word for text in corpus for word in WORDS_OF[pattern](text))
    for workers in (1, 2):
        assert count_words(corpus, pattern, workers=workers, memory=memory).counts == expected


@pytest.mark.parametrize("processes", [False, True])
def test_only_the_rarest_words_are_dropped_and_it_is_said_which(request, corpus, processes):
    if processes:
        request.getfixturevalue("small_limits")
    everything = count_words(corpus, GPT4_PATTERN, workers=2).counts
    memory = 300_000
    words = count_words(corpus, GPT4_PATTERN, workers=2, memory=memory)
    cost = sum(map(word_counts._cost, words.counts))
    assert 0.9 * memory < cost < 1.1 * memory
    assert words.dropped == len(everything) - len(words.counts) > 0
    assert all(everything[word] == count for word, count in words.counts.items())
    dropped = [count for word, count in everything.items() if word not in words.counts]
    assert max(dropped) == words.dropped_count <= min(words.counts.values())
    assert words == count_words(reversed(corpus), GPT4_PATTERN, workers=1, memory=memory)


def test_words_of_sentencepiece_are_split_where_no_piece_goes_on():
    counts = count_words(["the (end), don't 1984  naïve–x! a<s>b\n  "], SPACES_PATTERN, SPACES_PARTS).counts
    assert list(counts) == [
        *(
            "the",
            " (",
            "end",
            "),",
            " don",
            "'",
            "t",
            " ",
            "1",
            "9",
            "8",
            "4",
            "  naïve–x",
            "!",
            " a<s>b",
            "  ",
        )
    ]


def test_processes_take_no_module_from_the_folder_of_the_program_or_of_the_user(
    small_limits, corpus, monkeypatch, tmp_path
):
    program = shutil.copy(word_counts.__file__, tmp_path)
    for folder in (tmp_path, tmp_path / "user"):
        folder.mkdir(exist_ok=True)
        for name in ("heapq", "runpy", "statistics"):
            (folder / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(word_counts, "__file__", program)
    monkeypatch.chdir(tmp_path / "user")
    expected = Counter(word for text in corpus for word in words_of_the_library(text))
    assert count_words(corpus, GPT4_PATTERN, workers=2).counts == expected


def test_no_file_is_called_as_a_module_of_the_standard_library():
    names = {path.stem for path in Path(tokenization.__file__).parent.glob("*.py")}
    assert "word_counts" in names and not names & sys.stdlib_module_names


def test_a_process_that_dies_is_an_error_and_not_a_hang(small_limits, corpus, monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nsys.stdin.buffer.read(5000)\nsys.exit(3)\n")
    monkeypatch.setattr(word_counts, "__file__", str(program))
    with pytest.raises(ValueError, match="a process that counts words has died"):
        count_words(corpus * 5, GPT4_PATTERN, workers=2)


def test_an_error_of_the_text_leaves_no_process_and_no_file(small_limits, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(word_counts.tempfile, "tempdir", str(tmp_path))

    def broken():
        yield from corpus
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="^the disk is gone$"):
        count_words(broken(), GPT4_PATTERN, workers=2)
    assert list(tmp_path.iterdir()) == []
