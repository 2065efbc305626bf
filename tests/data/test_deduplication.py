"""Documents that were there before: exact ones always, near ones as often as MinHash promises."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest

from tessera.data.deduplication import KeySet, SeenSignatures, SeenTexts, fingerprint, minhash

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnp" for b in "aeiou" for c in "rstvz"]


def made_text(draw: random.Random, count: int = 120) -> list[str]:
    return draw.choices(VOCABULARY, k=count)


def edited(parts: list[str], draw: random.Random, share: float) -> list[str]:
    return [draw.choice(VOCABULARY) if draw.random() < share else part for part in parts]


def runs(parts: list[str], n: int = 5) -> set[tuple]:
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)}


def jaccard(left: set[tuple], right: set[tuple]) -> float:
    """Exact similarity of two sets of runs of five words."""
    both = len(left & right)
    return both / (len(left) + len(right) - both)


def shares_a_band(a: list[str], b: list[str]) -> bool:
    return bool((minhash(" ".join(a)) == minhash(" ".join(b))).any())


def test_fingerprints_are_sha256():
    assert fingerprint("Länder") == hashlib.sha256("Länder".encode()).digest()


def test_near_duplicates_are_found_as_often_as_their_exact_similarity_promises():
    draw = random.Random(0)
    expected, found = {}, {}
    for _ in range(1500):
        text = made_text(draw)
        other = edited(text, draw, draw.choice([0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.2]))
        similarity = jaccard(runs(text), runs(other))
        tenth = min(int(similarity * 10), 9)
        expected.setdefault(tenth, []).append(1 - (1 - similarity**8) ** 14)
        found.setdefault(tenth, []).append(shares_a_band(text, other))
    assert sum(len(pairs) > 50 for pairs in found.values()) >= 8
    for tenth, chances in expected.items():
        spread = sum(p * (1 - p) for p in chances) ** 0.5
        assert abs(sum(found[tenth]) - sum(chances)) <= 4 * spread + 0.5, f"similarity {tenth / 10}"
    assert all(found[9]), "a pair that is nearly the same was missed"


def test_of_a_stream_the_first_of_those_alike_stays():
    draw = random.Random(1)
    seen, kept, dropped = SeenSignatures(), [], []
    originals = [made_text(draw) for _ in range(120)]
    stream = [edited(draw.choice(originals), draw, 0.004) for _ in range(400)]
    for parts in stream:
        (dropped if seen.seen(minhash(" ".join(parts))) else kept).append(parts)
    # Every one that went has a twin that stayed; those that stayed are not alike.
    sets = [runs(parts) for parts in kept]
    right = sum(max(jaccard(runs(parts), other) for other in sets) > 0.6 for parts in dropped)
    assert right == len(dropped) > 250
    alike = sum(jaccard(a, b) > 0.9 for i, a in enumerate(sets) for b in sets[:i])
    assert alike == 0 and len(kept) < 150


def test_case_punctuation_and_white_space_make_no_difference():
    text = "The mill was turned into an inn. Visitors may walk around the church; see the castle."
    same = text.upper().replace(" ", "\n ").replace(";", " --").replace(".", "!")
    assert (minhash(text) == minhash(same)).all()
    assert minhash(text).shape == (14,) and minhash(text).dtype == np.uint64
    assert len(set(minhash(text).tolist())) == 14


@pytest.mark.parametrize(
    ("one", "other"), [("a b", "a c"), ("?!", "..."), ("a", "b"), ("", "x"), ("a b", "b a")]
)
def test_short_texts_are_near_their_like_only(one, other):
    assert (minhash(one) == minhash(one)).all() and not (minhash(one) == minhash(other)).any()


def test_long_texts_are_hashed_in_blocks():
    draw = random.Random(2)
    parts = made_text(draw, 5000)
    assert jaccard(runs(parts), runs(parts[:-1])) > 0.999 and shares_a_band(parts, parts[:-1])
    assert not shares_a_band(parts, made_text(draw, 5000))


def test_signatures_are_the_same_in_every_process():
    text = "one two three four five six"
    script = f"from tessera.data.deduplication import minhash; print(minhash({text!r}).tolist())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(minhash(text).tolist())
    # The same tomorrow: what was remembered on disk still counts.
    assert hashlib.sha256(minhash(text).tobytes()).hexdigest()[:16] == "f6df5e0eec9a9ec3"


# ---- what is remembered ----


def test_texts_are_new_once_however_many_there_are(monkeypatch):
    monkeypatch.setattr(KeySet, "RECENT", 7)
    draw = random.Random(0)
    ours, reference = SeenTexts(), set()
    for _ in range(3000):
        text = str(draw.randrange(1500))
        assert (fingerprint(text) in ours) == (text in reference)
        if text not in reference:
            ours.add(fingerprint(text))
            reference.add(text)
    assert len(ours) == len(reference)
    runs = [len(run) for run in ours._runs]
    assert all(a > 2 * b for a, b in zip(runs, runs[1:], strict=False)), "many runs make each question slow"


def test_what_is_remembered_goes_on_from_a_file(monkeypatch):
    monkeypatch.setattr(KeySet, "RECENT", 20)
    draw = random.Random(3)
    stream = [minhash(" ".join(edited(made_text(random.Random(i % 40)), draw, 0.01))) for i in range(120)]
    whole = SeenSignatures()
    expected = [whole.seen(signature) for signature in stream]
    first, file = SeenSignatures(), b""
    answers = []
    for i, signature in enumerate(stream[:70]):
        answers.append(first.seen(signature))
        if i % 9 == 0:
            file += first.take_added()
    file += first.take_added()
    assert len(file) == 112 * answers.count(False) and not first.take_added()
    second = SeenSignatures()
    second.load(file)
    assert not second.take_added(), "what was loaded would be written again"
    assert answers + [second.seen(signature) for signature in stream[70:]] == expected
    assert 20 < expected.count(True) < 100
    with pytest.raises(ValueError, match="end within a key"):
        SeenTexts().load(file[:-1])
