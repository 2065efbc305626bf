"""Tasks of lm-evaluation-harness, against loops by hand and against the harness's own `hf` model."""

import re
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_model
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tessera import build_byte_tokenizer
from tessera.evaluation.harness import TesseraLM, load_tasks, run_tasks
from tessera.serving.generate import load

from .conftest import CONTEXT, TEXT

pytestmark = pytest.mark.usefixtures("offline")

WORDS = TEXT.split()
ITEMS = [
    {"question": " ".join(WORDS[i : i + 3]), "choices": WORDS[2 * i : 2 * i + 3], "answer": i % 3}
    for i in range(8)
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "word_perplexity"},
        {"metric": "byte_perplexity"},
        {"metric": "bits_per_byte"},
    ],
}


@torch.no_grad()
def likelihood(model, context: list[int], answer: list[int]) -> float:
    logits = model(input_ids=torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
    return sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(answer))


def requests_of(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i, task_name="here") for i, given in enumerate(arguments)]


@pytest.fixture(params=["merges", "bytes"])
def any_model(request, loaded, byte_model):
    return loaded if request.param == "merges" else byte_model


def test_accuracy_is_that_of_a_loop_by_hand(any_model, write_task):
    model, tokenizer = any_model
    tasks = load_tasks(["by_hand"], write_task("by_hand", ITEMS, **CHOICE))
    entries, truncated = run_tasks(model, tokenizer, tasks, batch_size=3)
    right = {"acc": 0, "acc_norm": 0}
    for item in ITEMS:
        prompt = tokenizer.encode(f"Q: {item['question']}\nA:")
        answers = [tokenizer.encode(f" {choice}") for choice in item["choices"]]
        scores = [likelihood(model, prompt, answer) for answer in answers]
        by_length = [score / len(c) for score, c in zip(scores, item["choices"], strict=True)]
        right["acc"] += max(range(3), key=scores.__getitem__) == item["answer"]
        right["acc_norm"] += max(range(3), key=by_length.__getitem__) == item["answer"]
    metrics = entries["by_hand"]["metrics"]
    for name, count in right.items():
        share = count / len(ITEMS)
        assert metrics[name]["value"] == pytest.approx(share)
        assert metrics[name]["stderr"] == pytest.approx((share * (1 - share) / (len(ITEMS) - 1)) ** 0.5)
    assert right["acc"] not in (0, len(ITEMS)), "a test of something"
    assert (entries["by_hand"]["items"], entries["by_hand"]["fewshot"], truncated) == (8, 0, 0)


def test_every_kind_of_request_is_answered_as_by_the_harness_own_model(folder, write_task):
    write_task("choice", ITEMS, **CHOICE)
    write_task("generate", ITEMS, **GENERATE)
    tasks = write_task("rolling", [{"text": TEXT * 3}, {"text": TEXT[:80]}], **ROLLING)
    names = ["choice", "generate", "rolling"]

    def evaluate(model):
        manager = TaskManager(include_path=tasks, include_defaults=False)
        results = simple_evaluate(model, tasks=names, task_manager=manager, log_samples=True)
        texts = [sample["resps"] for sample in results["samples"]["generate"]]
        return results["results"], texts

    ours, our_texts = evaluate(TesseraLM(str(folder), device="cpu", batch_size=3))
    theirs, their_texts = evaluate(
        HFLM(pretrained=str(folder), device="cpu", batch_size=2, backend="causal", max_length=CONTEXT)
    )
    assert our_texts == their_texts
    for name in names:
        assert ours[name].keys() == theirs[name].keys()
        for metric, value in theirs[name].items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
            assert ours[name][metric] == expected, metric
    entries, _ = run_tasks(*load(str(folder), device="cpu"), load_tasks(names, tasks))
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        value = entries["rolling"]["metrics"][metric]["value"]
        assert value == pytest.approx(theirs["rolling"][f"{metric},none"], rel=1e-5)


def test_text_ends_before_a_stop_string(any_model):
    model, tokenizer = any_model
    harness = TesseraLM(model, tokenizer, batch_size=4)
    prompts = [" ".join(WORDS[i : i + 2]) for i in range(6)]
    free = harness.generate_until(
        requests_of("generate_until", *((p, {"until": [], "max_gen_toks": 16}) for p in prompts)), True
    )
    for prompt, text in zip(prompts, free, strict=True):
        ids = tokenizer.encode(prompt)
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
        )
        assert text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    stop = next(text for text in free if len(text) > 3)[2:4]
    stopped = harness.generate_until(
        requests_of("generate_until", *((p, {"until": [stop], "max_gen_toks": 16}) for p in prompts)), True
    )
    assert stopped == [text.split(stop)[0] for text in free]
    assert stopped != free


def test_generation_ends_soon_after_a_stop_string(loaded):
    model, tokenizer = loaded
    harness = TesseraLM(model, tokenizer)
    options = {"until": [], "max_gen_toks": 30}
    [text] = harness.generate_until(requests_of("generate_until", ("The quick", options)), True)
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    try:
        stop = {"until": [text[:2]], "max_gen_toks": 30}
        assert harness.generate_until(requests_of("generate_until", ("The quick", stop)), True) == [""]
    finally:
        hook.remove()
    assert len(steps) < 6


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_change_answers(any_model, batch_size):
    prompts = [" ".join(WORDS[i : i + 1 + i % 4]) for i in range(9)]
    options = {"until": ["\n"], "max_gen_toks": 10}
    continuations = requests_of("generate_until", *((p, options) for p in prompts))
    answers = requests_of("loglikelihood", *((p, f" {w}") for p, w in zip(prompts, WORDS, strict=False)))
    rolling = requests_of("loglikelihood_rolling", *((p * 5,) for p in prompts))
    one, other = (TesseraLM(*any_model, batch_size=size) for size in (3, batch_size))
    assert one.generate_until(continuations, True) == other.generate_until(continuations, True)
    theirs = other.loglikelihood(answers, True)
    for (ours, greedy), (value, same) in zip(one.loglikelihood(answers, True), theirs, strict=True):
        assert (ours, greedy) == (pytest.approx(value, rel=1e-5), same)
    assert one.loglikelihood_rolling(rolling, True) == pytest.approx(
        other.loglikelihood_rolling(rolling, True), rel=1e-5
    )


def test_an_empty_context_is_what_stands_before_a_text(any_model):
    model, tokenizer = any_model
    harness = TesseraLM(model, tokenizer)
    [(found, _)] = harness.loglikelihood(requests_of("loglikelihood", ("", "box five")), True)
    start = ord("\n") if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    assert found == pytest.approx(likelihood(model, [start], tokenizer.encode("box five")), rel=1e-5)


def test_padding_of_bytes_is_within_the_vocabulary_and_the_given_tokenizer_stays(byte_model):
    model, tokenizer = byte_model
    harness = TesseraLM(model, tokenizer)
    assert len(harness.tokenizer) == 256 and harness.tokenizer.pad_token_id < 256
    assert tokenizer.pad_token_id is None
    assert harness.tok_encode("aĀb") == list("aĀb".encode())


def test_likelihoods_are_computed_in_fp32_whatever_the_weights_are(byte_model):
    model = tiny_model("llama-tiny", vocab_size=256).to(torch.bfloat16)
    harness = TesseraLM(model, byte_model[1])
    [(found, _)] = harness.loglikelihood(requests_of("loglikelihood", ("abc", "defghij")), True)
    ids = list(b"abcdefghij")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    expected = sum(logits[i, ids[i + 1]].item() for i in range(2, 9))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_request_is_cut_when_its_inputs_are_more_than_the_context(byte_model):
    lm = TesseraLM(*byte_model, batch_size=1, max_length=8)
    lm.loglikelihood(requests_of("loglikelihood", ("a" * 7, "bc")))  # the last token is no input
    assert lm.truncated == 0
    lm.loglikelihood(requests_of("loglikelihood", ("a" * 8, "bc")))
    assert lm.truncated == 1


def test_examples_come_before_items_and_cut_requests_are_counted(loaded, write_task):
    data = {"fewshot_split": "test", "num_fewshot": 1}
    folder = write_task("shots", ITEMS, **CHOICE, **data)
    write_task("never", ITEMS, **CHOICE, num_fewshot=0)
    one, none = (run_tasks(*loaded, load_tasks(["shots"], folder, n), limit=4) for n in (None, 0))
    assert (one[0]["shots"]["fewshot"], none[0]["shots"]["fewshot"]) == (1, 0)
    assert one[0]["shots"]["items"] == 4
    many, truncated = run_tasks(*loaded, load_tasks(["shots", "never"], folder, 5), limit=4)
    assert (many["shots"]["fewshot"], many["never"]["fewshot"]) == (5, 0)
    assert truncated == 4 * 3, "every request of the task with examples, none of the other"


def test_chat_gives_items_through_the_template(loaded, write_task, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    seen = []
    monkeypatch.setattr(
        TesseraLM, "generate_until", lambda self, requests: [seen.append(r.args[0]) or "x" for r in requests]
    )
    folder = write_task("talk", ITEMS[:2], **GENERATE, fewshot_split="test")
    run_tasks(model, tokenizer, load_tasks(["talk"], folder), chat=True)
    questions = [f"[user]{item['question']}[assistant]" for item in ITEMS[:2]]
    assert seen == questions
    seen.clear()
    run_tasks(model, tokenizer, load_tasks(["talk"], folder, num_fewshot=1), chat=True)
    # The example is the other item, with its answer.
    answers = [item["choices"][item["answer"]] for item in ITEMS[:2]]
    assert seen == [f"{questions[1 - i]}{answers[1 - i]}{questions[i]}" for i in range(2)]


def test_an_unknown_task_is_refused_with_its_neighbours(write_task):
    folder = write_task("zebra_boxes", ITEMS, **CHOICE)
    with pytest.raises(ValueError, match="there is no task zebra_boxs; did you mean zebra_boxes"):
        load_tasks(["zebra_boxs"], folder)
    with pytest.raises(ValueError, match="there is no folder /nowhere with task files"):
        load_tasks(["zebra_boxes"], "/nowhere")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"doc_to_text": "{{problem}}"}, "broken cannot be loaded: UndefinedError: 'problem' is undefined"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "broken cannot be loaded"),
        ({"test_split": "dev"}, "broken cannot be loaded: KeyError: 'dev'"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_refused(change, sentence, write_task):
    folder = write_task("broken", ITEMS, **{**CHOICE, **change})
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_tasks(["broken"], folder)


def test_a_task_without_items_is_refused(write_task):
    with pytest.raises(ValueError, match="empty cannot be loaded"):
        load_tasks(["empty"], write_task("empty", [], **CHOICE))


def test_a_column_that_only_some_items_have_is_refused(loaded, write_task):
    rows = [*ITEMS[:2], {**ITEMS[2], "choices": None}]
    with pytest.raises(ValueError, match="ragged cannot be run: "):
        run_tasks(*loaded, load_tasks(["ragged"], write_task("ragged", rows, **CHOICE)))


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("loglikelihood", ("a", " x" * 60), "longer than the model's context of 48"),
        ("loglikelihood", ("a", ""), "an answer without tokens"),
        ("generate_until", ("a", {"until": [], "max_gen_toks": 48}), "set a smaller max_gen_toks"),
    ],
)
def test_a_request_beyond_the_context_is_refused(loaded, kind, arguments, sentence):
    harness = TesseraLM(*loaded)
    with pytest.raises(ValueError, match=sentence):
        getattr(harness, kind)(requests_of(kind, arguments), True)


def test_a_context_is_at_most_the_models(loaded):
    assert TesseraLM(*loaded).max_length == CONTEXT
    assert TesseraLM(*loaded, max_length="20").max_length == 20
    for given in (0, CONTEXT + 1):
        with pytest.raises(
            ValueError, match=f"the context must be between 1 and the model's {CONTEXT} tokens"
        ):
            TesseraLM(*loaded, max_length=given)


def test_the_harness_knows_the_model_by_name():
    assert get_model("tessera") is TesseraLM


@pytest.mark.distributed
def test_the_harness_own_command_runs_the_model(folder, write_task):
    tasks = write_task("outside", ITEMS[:3], **CHOICE)
    command = [sys.executable, "-m", "tessera.evaluation.harness", "run", "--model", "tessera"]
    command += ["--model_args", f"pretrained={folder}", "--tasks", "outside", "--include_path", tasks]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\|outside *\|.*acc", done.stdout)


def test_bytes_and_their_file_are_one_tokenizer(byte_model, tmp_path):
    """As `AutoTokenizer` loads it, without this package's own class."""
    model, tokenizer = byte_model
    model.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    requests = requests_of("loglikelihood", ("héllo", " wörld"), ("", "x y"))
    ours = TesseraLM(model, tokenizer).loglikelihood(requests, True)
    assert TesseraLM(tmp_path, device="cpu").loglikelihood(requests, True) == ours
