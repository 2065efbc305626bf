"""`tessera eval` as a user types it: its table, its report, its refusals."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import sacrebleu
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers.utils import logging

from tessera import cli
from tessera.evaluation import report as reports
from tessera.evaluation.bits_per_byte import text_loss
from tessera.evaluation.documents import read_held_out

from .conftest import CONTEXT, TEXT

pytestmark = pytest.mark.usefixtures("offline")

WORDS = TEXT.split()
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
ITEMS = [{"question": WORDS[i], "choices": WORDS[i : i + 3], "answer": 1} for i in range(5)]


@pytest.fixture
def tessera(capsys):
    """Runs `tessera eval` in this process; gives its exit code and what it printed."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.run(["eval", "--device", "cpu", *map(str, arguments)])
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    yield run
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def run_folder(folder, tmp_path) -> Path:
    """A run whose model is the one of `folder`."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "final").symlink_to(folder, target_is_directory=True)
    return run


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def cell(table: str, name: str) -> float:
    return float(re.search(rf"^{re.escape(name)} +(\S+)", table, re.M)[1])


def test_everything_at_once_is_on_the_terminal_and_in_the_run(
    tessera, run_folder, folder, loaded, text, tmp_path, write_task
):
    pairs = write_lines(
        tmp_path / "pairs.jsonl", *({"prompt": w, "reference": f"{w} a b c"} for w in WORDS[:3])
    )
    arguments = ["--data", text, "--stride", 8, "--bleu-data", pairs, "--max-new-tokens", 6, "--limit", 2]
    arguments += ["--tasks", "pick", "--include-path", write_task("pick", ITEMS, **CHOICE)]
    code, out, err = tessera("--model", run_folder, *arguments)
    assert code == 0, err
    report = json.loads((run_folder / "eval.json").read_text())

    model, tokenizer = loaded
    stream = read_held_out(str(text), tokenizer).stream
    loss = text_loss(model, stream.ids, stream.num_bytes, CONTEXT)
    found = report["results"]["bpb"]
    assert found["value"] == pytest.approx(loss.bits_per_byte)
    assert found["stderr"] == pytest.approx(loss.bits_per_byte_stderr)
    assert cell(out, "bits per byte") == pytest.approx(loss.bits_per_byte, abs=1e-4)

    found = report["results"]["perplexity"]
    assert (found["context"], found["stride"]) == (CONTEXT, 8)
    assert cell(out, "token perplexity") == pytest.approx(found["token"]["value"], abs=1e-4)
    assert math.log2(found["byte"]["value"]) == pytest.approx(found["bits_per_byte"]["value"])

    found = report["results"]["bleu"]
    references = [[f"{w} a b c" for w in WORDS[:2]]]
    assert found["score"] == pytest.approx(sacrebleu.corpus_bleu(found["hypotheses"], references).score)
    assert found["pairs"] == 2
    assert f"BLEU signature: {found['signature']}" in out

    found = report["results"]["tasks"]["pick"]
    assert found["items"] == 2
    assert cell(out, "pick acc") == pytest.approx(found["metrics"]["acc"]["value"], abs=1e-4)

    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert report["model"]["sha256"] == {"model.safetensors": weights}
    assert report["model"]["dtype"] == "float32" and report["device"] == "cpu"
    assert {"tessera", "torch", "transformers", "sacrebleu", "lm_eval"} <= report["versions"].keys()
    assert report["settings"]["stride"] == 8 and report["settings"]["limit"] == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", report["date"])
    assert out.rstrip().endswith(f"report: {run_folder / 'eval.json'}")
    assert [path.name for path in run_folder.iterdir() if path.name != "final"] == ["eval.json"]


def test_the_column_of_a_table_is_measured(tessera, folder, text, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", {"id": 1, "body": text.read_text(encoding="utf-8")})
    cells = []
    for arguments in (["--data", text], ["--data", rows, "--column", "body"]):
        code, out, err = tessera("--model", folder, *arguments, "--metrics", "bpb")
        assert code == 0, err
        cells.append(cell(out, "bits per byte"))
    assert cells[0] == cells[1]


def test_perplexity_is_what_the_harness_finds_for_the_same_text(tessera, folder, tmp_path, write_task):
    documents = [TEXT * 2, TEXT[:100] + "\nAnd more.", "Seven wizards."]
    (tmp_path / "text").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "text" / f"{i}.txt").write_text(document, encoding="utf-8")
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    tasks = write_task("rolling", [{"text": document} for document in documents], **rolling)
    from lm_eval.evaluator import evaluate

    loaded = TaskManager(include_path=tasks, include_defaults=False).load(["rolling"])
    theirs = HFLM(pretrained=str(folder), device="cpu", backend="causal")
    expected = evaluate(theirs, task_dict=loaded)["results"]["rolling"]

    output = tmp_path / "deep" / "report.json"
    arguments = ["--data", tmp_path / "text", "--metrics", "perplexity", "--stride", CONTEXT]
    code, _, err = tessera("--model", folder, *arguments, "--output", output)
    assert code == 0, err
    found = json.loads(output.read_text())["results"]
    assert found.keys() == {"perplexity"}
    for ours, metric in (("word", "word_perplexity"), ("byte", "byte_perplexity")):
        assert found["perplexity"][ours]["value"] == pytest.approx(expected[f"{metric},none"], rel=1e-5)
    bits = found["perplexity"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(expected["bits_per_byte,none"], rel=1e-5)


def test_a_model_directory_stays_as_it_is(tessera, folder, text):
    before = sorted(folder.iterdir())
    code, out, _ = tessera("--model", folder, "--data", text, "--metrics", "bpb")
    assert code == 0 and "bits per byte" in out and "report:" not in out and "perplexity" not in out
    assert sorted(folder.iterdir()) == before


def test_context_and_batch_size_reach_what_is_measured(tessera, folder, loaded, text, tmp_path):
    output = tmp_path / "report.json"
    tessera("--model", folder, "--data", text, "--context", 16, "--batch-size", 2, "--output", output)
    found = json.loads(output.read_text())["results"]
    stream = read_held_out(str(text), loaded[1]).stream
    expected = text_loss(loaded[0], stream.ids, stream.num_bytes, 16).bits_per_byte
    assert found["bpb"]["value"] == pytest.approx(expected)
    assert (found["bpb"]["window"], found["perplexity"]["context"]) == (16, 16)
    assert found["perplexity"]["stride"] == 8, "half the context where nothing is said"


def test_an_infinite_figure_is_null_in_the_report(tmp_path):
    report = {"a": [1.5, math.inf], "b": {"c": math.nan, "d": (2,)}}
    reports.write_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "a": [1.5, None],
        "b": {"c": None, "d": [2]},
    }


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    reports.write_report({"a": 1}, path)

    def write_half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk full"):
        reports.write_report({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to measure: give --data, --bleu-data or --tasks"),
        (
            ["--data", "{text}", "--metrics", "bpb,rouge"],
            "no metric 'rouge'; there are bpb, perplexity, bleu",
        ),
        (["--metrics", "perplexity"], "the metric perplexity needs --data"),
        (["--data", "{text}", "--metrics", "bleu"], "the metric bleu needs --bleu-data"),
        (["--data", "{text}", "--stride", "49"], "stride 49 is longer than the context of 48 tokens"),
        (
            ["--data", "{text}", "--context", "20", "--stride", "21"],
            "stride 21 is longer than the context of 20",
        ),
        (["--data", "{text}", "--context", "49"], "context 49 is longer than the model's 48 positions"),
        (["--data", "{text}", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--data", "{text}", "--num-fewshot", "-1"], "num_fewshot must be 0 or more, got -1"),
        (["--data", "{text}", "--output", "{folder}"], "is a folder; give a file for the report"),
        (["--data", "{pairs}"], "there is no column 'text'; there are prompt, reference"),
        (["--data", "nothing.txt"], "there is no file or folder nothing.txt"),
        (["--data", "{one}"], "two tokens or more, got 1"),
        (["--data", "{one}", "--metrics", "perplexity"], "a perplexity needs two tokens or more, got 1"),
        (["--data", "{empty}"], "is empty: there is no text in it"),
        (["--bleu-data", "{empty}"], "holds no pairs of prompt and reference"),
        (["--bleu-data", "nothing.jsonl"], "there is no file or folder nothing.jsonl"),
        (["--bleu-data", "{lacking}"], "row 2: expected a text, or a list of texts, under reference"),
        (["--bleu-data", "{pairs}", "--max-new-tokens", "48"], "more than the model's context of 48"),
        (["--bleu-data", "{pairs}", "--chat"], "has no chat template; evaluate without --chat"),
        (["--tasks", "a", "--include-path", "nowhere"], "there is no folder nowhere with task files"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_sentence(
    tessera, run_folder, text, tmp_path, arguments, sentence
):
    files = {"text": text, "one": tmp_path / "one.txt", "empty": tmp_path / "empty.txt"}
    files["folder"] = tmp_path
    files["one"].write_text("x")
    files["empty"].write_text("\n")
    pair = {"prompt": "a", "reference": "b"}
    files["lacking"] = write_lines(tmp_path / "lacking.jsonl", pair, {"prompt": "a"})
    files["pairs"] = write_lines(tmp_path / "pairs.jsonl", pair)
    code, _, err = tessera("--model", run_folder, *(argument.format(**files) for argument in arguments))
    assert code == 2
    assert err.startswith("tessera: error: ") and err.count("\n") == 1
    assert sentence in err
    assert not (run_folder / "eval.json").exists()


def test_a_missing_model_is_told_before_anything_is_read(tessera, tmp_path, text):
    assert tessera("--model", tmp_path / "nowhere", "--data", text)[2] == (
        f"tessera: error: there is no checkpoint {tmp_path / 'nowhere'}\n"
    )
    (tmp_path / "other").mkdir()
    code, _, err = tessera("--model", tmp_path / "other", "--data", text)
    assert code == 2 and "holds no model.safetensors" in err
