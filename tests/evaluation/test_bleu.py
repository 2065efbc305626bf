"""BLEU, against sacrebleu called directly on texts generated one by one."""

import json
import re

import pytest
import sacrebleu
import torch

from tessera.evaluation.bleu import Pair, corpus_bleu, read_pairs, score_bleu

PROMPTS = ["The quick brown", "Pack my box with five", "zebra", "how vexingly quick daft animals are! The"]


@torch.no_grad()
def continue_one(model, tokenizer, prompt: str, count: int) -> str:
    """Greedy text, token by token without a cache."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    while len(ids) < start + count:
        token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def continuations(loaded) -> list[str]:
    texts = [continue_one(*loaded, prompt, 20).strip() for prompt in PROMPTS]
    assert all(texts) and len(set(texts)) == len(texts)
    return texts


@pytest.mark.parametrize("batch_size", [1, 3])
def test_score_is_sacrebleus_on_texts_generated_one_by_one(loaded, continuations, batch_size):
    # references that share words with the texts, so that the score is neither 0 nor 100
    references = [" ".join(text.split()[:4] + ["other"] + text.split()[4:]) + "." for text in continuations]
    pairs = [Pair(prompt, (text,)) for prompt, text in zip(PROMPTS, references, strict=True)]
    found = score_bleu(*loaded, pairs, max_new_tokens=20, batch_size=batch_size)
    lines = [text.split("\n")[0].rstrip() for text in continuations]
    assert found.hypotheses == lines
    expected = sacrebleu.corpus_bleu(lines, [references])
    assert found.score == pytest.approx(expected.score)
    assert 0 < found.score < 100


def test_several_references_need_not_be_equally_many():
    hypotheses = ["the cat sat on the mat today", "a dog ran over the green hill"]
    references = [
        ("a cat sat on a mat today", "the cat sat on the rug"),
        ("a dog ran over the green hill there",),
    ]
    metric = sacrebleu.BLEU()
    streams = [["a cat sat on a mat today", references[1][0]], ["the cat sat on the rug", None]]
    expected = metric.corpus_score(hypotheses, streams)
    found = corpus_bleu(hypotheses, references)
    assert found.score == pytest.approx(expected.score)
    assert found.signature.replace("bs:1000|seed:12345|", "") == str(metric.get_signature())
    assert found.interval > 0


def test_references_of_several_lines_keep_all_lines_of_a_text(loaded, continuations, monkeypatch):
    monkeypatch.setattr("tessera.evaluation.bleu.complete", lambda *_: ["\none two\nthree four\n"])
    for reference, expected in (("one two", "one two"), ("one two\nthree", "one two\nthree four")):
        assert score_bleu(*loaded, [Pair("x", (reference,))]).hypotheses == [expected]


def test_chat_gives_the_prompt_as_a_users_turn(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    turn = score_bleu(model, tokenizer, [Pair("box", ("a",))], max_new_tokens=9, chat=True).hypotheses
    assert turn == [
        continue_one(model, tokenizer, "[user] box[assistant]", 9).strip().split("\n")[0].rstrip()
    ]


def test_pairs_are_read_in_either_vocabulary(tmp_path):
    rows = [
        {"prompt": "a", "reference": "b"},
        {"source": "c", "target": "d"},
        {"prompt": "e", "references": ["f", "g"]},
        {"prompt": "h", "reference": ["i"]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    expected = [Pair("a", ("b",)), Pair("c", ("d",)), Pair("e", ("f", "g")), Pair("h", ("i",))]
    assert read_pairs(path) == expected
    assert read_pairs(path, limit=2) == expected[:2]


def test_line_separators_of_unicode_and_byte_order_marks_break_no_line(tmp_path):
    row = {"prompt": "a\u2028b", "reference": "c\x85d"}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_pairs(path) == [Pair("a\u2028b", ("c\x85d",))]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no pairs of prompt and reference"),
        ('{"prompt": "a", "reference": "b"}\n{"prompt"', "line 2, is not JSON"),
        ('["a", "b"]', "row 1: expected an object, got str"),
        ('{"text": "a", "reference": "b"}', "a text under prompt or source; there are text, reference"),
        ('{"prompt": "", "reference": "b"}', "a text under prompt or source"),
        ('{"prompt": "a"}', "under reference, references or target; there are prompt"),
        ('{"prompt": "a", "references": []}', "under reference, references or target"),
        ('{"prompt": "a", "references": ["b", null]}', "under reference, references or target"),
    ],
)
def test_a_file_without_pairs_is_refused(text, sentence, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_pairs(path)
    with pytest.raises(ValueError, match="there is no file"):
        read_pairs(tmp_path / "other.jsonl")
