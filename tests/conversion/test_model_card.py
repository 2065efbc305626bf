"""The card of a release says what the files of the run say, and its code runs."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.models import tiny_model
from huggingface_hub import ModelCard
from PIL import Image

from tessera import build_byte_tokenizer
from tessera.conversion.convert import convert
from tessera.conversion.model_card import draw
from tessera.conversion.release import build_release, find_origin
from tessera.evaluation.report import write_report

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_run(folder: Path, preset: str = "llama-tiny", records: list[dict] | None = None) -> Path:
    model = tiny_model(preset)
    model.save_pretrained(folder / "final")
    build_byte_tokenizer().save_pretrained(folder / "final")
    recipe = {"config": "/srv/me/tiny.json", "data_file": ["/srv/me/books.txt:0.7", "/srv/me/web:0.3"]}
    recipe |= {"steps": 7, "save_path": "/x/run", "optimizer": "muon"}
    recipe |= {
        "optimizer_options": {"path": "/srv/me/secret", "lr": 1},
        "note": "see /srv/me/notes and /srv/me/k",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "config.json").write_text("{}")
    if records is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_scores(run: Path, sha256: str) -> None:
    bpb = {"value": 1.2345, "stderr": 0.0123, "tokens": 4321, "window": 128}
    report = {"model": {"path": "/srv/me", "sha256": {"model.safetensors": sha256}}, "results": {"bpb": bpb}}
    write_report(report, run / "eval.json")


def release(
    model: Path, folder: Path, on_hub=lambda name, kind: False, repo_id="someone/it", **options
) -> str:
    """The card of a model's release."""
    folder.mkdir()
    license, family = options.get("license"), options.get("family")
    checkpoint, origin = find_origin(model, family, options.get("dtype"))
    build_release(checkpoint, folder, repo_id, origin=origin, license=license, on_hub=on_hub)
    return (folder / "README.md").read_text(encoding="utf-8")


def records(last: int = 60) -> list[dict]:
    values = []
    for step in range(0, last + 1, 20):
        seen = {"step": step, "tokens": step * 100, "seconds": step * 6.0}
        values += [{**seen, "val_loss": 5 - step / 20, "val_bits_per_byte": 7 - step / 20}]
        values += [{**seen, "loss": 5.5 - step / 20}]
    return values


def test_the_card_says_what_the_run_says(tmp_path):
    run = make_run(tmp_path / "run", "bytegpt-tiny", records())
    weights = (run / "final/model.safetensors").read_bytes()
    write_scores(run, hashlib.sha256(weights).hexdigest())
    (run / "final/tokenizer_meta.json").write_text(json.dumps({"type": "bpe", "bytes_per_token": 1.0}))
    text = release(run, tmp_path / "release", license="mit")
    head = ModelCard(text).data.to_dict()
    assert (head["library_name"], head["license"]) == ("transformers", "mit")
    assert head["pipeline_tag"] == "text-generation" and head["tags"] == ["tessera", "custom_code"]
    parameters = tiny_model("bytegpt-tiny").num_parameters()
    assert f"{parameters:,} parameters" in text and "latent" in text
    for row in ("steps | 7", "optimizer | muon", "config | tiny.json", "data_file | books.txt:0.7, web:0.3"):
        assert f"| {row} |" in text
    assert "| optimizer_options | {'lr': 1, 'path': 'secret'} |" in text
    assert "| note | see notes and k |" in text
    for row in (
        "tokens seen | 6,000",
        "steps done | 60",
        "time | 6.0 minutes",
        "tokenizer | BPE, 256 tokens, 1.00 bytes each",
    ):
        assert f"| {row} |" in text
    assert "| validation at the end, bits per byte | 4 |" in text
    assert "bits per byte  1.2345" in text and "4,321 tokens, windows of 128" in text
    assert "/srv/me" not in text and "/x/run" not in text, "paths are of one machine"
    assert "![The course of the training](loss.png)" in text
    with Image.open(tmp_path / "release/loss.png") as picture:
        assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 16)) > 50
    assert b"/srv" not in (tmp_path / "release/loss.png").read_bytes()


def test_scores_of_other_weights_are_not_on_it(tmp_path):
    run = make_run(tmp_path / "run")
    write_scores(run, "0" * 64)
    assert "Evaluation" not in release(run, tmp_path / "release")


def test_an_evaluation_that_cannot_be_read_is_told(tmp_path):
    run = make_run(tmp_path / "run")
    weights = hashlib.sha256((run / "final/model.safetensors").read_bytes()).hexdigest()
    report = {"model": {"sha256": {"model.safetensors": weights}}, "results": {"bpb": {"value": 1}}}
    (run / "eval.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="eval.json is no report of `tessera eval`"):
        release(run, tmp_path / "release")


def test_of_an_unfinished_run_its_checkpoint_goes_and_the_card_says_so(tmp_path):
    run = make_run(tmp_path / "run", records=records())
    checkpoint = run / "checkpoints/step-000040"
    checkpoint.parent.mkdir()
    (run / "final").rename(checkpoint)
    (checkpoint / "optimizer.safetensors").write_bytes(b"state")
    (checkpoint / "state.json").write_text('{"step": 40}')
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps(hashes))
    text = release(run, tmp_path / "release")
    assert "A checkpoint of step 40 of a run that goes on." in text
    assert "| steps done | 40 |" in text and "| tokens seen | 4,000 |" in text
    checkpoint.rename(checkpoint.with_name("best"))
    with pytest.raises(ValueError, match="checkpoints/best: of a checkpoint the name says its step"):
        find_origin(checkpoint.with_name("best"))
    assert not {"optimizer.safetensors", "manifest.json"} & {p.name for p in (tmp_path / "release").iterdir()}


def test_a_record_that_is_no_number_is_told_with_its_file(tmp_path):
    run = make_run(tmp_path / "run", records=[{"step": 1, "tokens": "many"}])
    with pytest.raises(ValueError, match="metrics.jsonl has a record whose tokens is 'many'"):
        release(run, tmp_path / "release")


def test_a_card_that_was_written_here_is_written_anew_and_keeps_what_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    first = release(make_run(tmp_path / "run", records=records()), tmp_path / "first", license="mit")
    assert "trust_remote_code=True" in first
    text = release(tmp_path / "first", tmp_path / "second", family="llama", repo_id="other/b")
    assert text.count("# b\n") == 1 and '"other/b"' in text and "someone/it" not in text
    assert "trust_remote_code" not in text and "custom_code" not in text
    assert "| optimizer | muon |" in text and ModelCard(text).data.license == "mit"
    assert text.count("## Training") == 1 and "From tessera to llama" in text
    assert (tmp_path / "second/loss.png").read_bytes() == (tmp_path / "first/loss.png").read_bytes()
    # Somebody's words in it make it somebody's.
    own = first.replace("## Use", "Mine.\n\n## Use")
    (tmp_path / "first/README.md").write_text(own)
    checkpoint, origin = find_origin(tmp_path / "first", "llama")
    (tmp_path / "third").mkdir()
    told = build_release(checkpoint, tmp_path / "third", "other/b", origin=origin)
    assert (tmp_path / "third/README.md").read_text() == own
    assert told == [f"the card is {tmp_path}/first/README.md as it is, which says nothing of the conversion"]


def test_what_the_hub_has_is_linked(tmp_path):
    run = make_run(tmp_path / "run")
    recipe = {"model": "someone/base", "data": "someone/chats", "learning_rate": 1e-5}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    there = {("someone/base", "model"), ("someone/chats", "dataset")}
    text = release(run, tmp_path / "release", on_hub=lambda name, kind: (name, kind) in there)
    head = ModelCard(text).data
    assert (head.base_model, head.datasets) == ("someone/base", ["someone/chats"])
    (tmp_path / "someone/chats").mkdir(parents=True)
    head = ModelCard(release(run, tmp_path / "folder", on_hub=lambda *_: True)).data
    assert (head.base_model, head.datasets) == ("someone/base", None), "a folder where the run was started"
    head = ModelCard(release(run, tmp_path / "again")).data
    assert (head.base_model, head.datasets) == (None, None)


def test_the_tokens_that_a_run_read_are_described(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "tokens").mkdir()
    meta = {"train": {"tokens": 12345, "documents": 67}, "val": {"tokens": 89}, "sources": []}
    meta["sources"] = [{"source": "/srv/me/books.jsonl"}]
    (tmp_path / "tokens/data_meta.json").write_text(json.dumps(meta))
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data_file": [f"{tmp_path}/tokens:0.5"]}))
    text = release(run, tmp_path / "release")
    told = "12,345 tokens for training; 67 documents for training; 89 tokens for validation; books.jsonl"
    assert f"| data in tokens | {told} |" in text


def test_somebodys_own_card_is_taken_and_gets_the_license_that_it_lacks(tmp_path):
    run = make_run(tmp_path / "run")
    own = "---\ntags:\n- mine\n---\n\n# My own words\n\n![curve](loss.png)\n"
    (run / "final/README.md").write_text(own)
    (run / "final/loss.png").write_bytes(b"mine")
    assert release(run, tmp_path / "plain") == own
    assert (tmp_path / "plain/loss.png").read_bytes() == b"mine"
    text = release(run, tmp_path / "licensed", license="mit")
    assert "# My own words" in text and ModelCard(text).data.license == "mit"
    assert (run / "final/README.md").read_text() == own
    (run / "final/README.md").write_text("---\nlicense: gpl\n---\n# My own\n")
    with pytest.raises(ValueError, match="README.md names the license gpl, and --license says mit"):
        release(run, tmp_path / "other", license="mit")
    (run / "final/README.md").write_text("---\n: [\n---\n# My own\n")
    with pytest.raises(ValueError, match="README.md is no model card"):
        release(run, tmp_path / "broken")


def test_a_conversion_is_told_without_paths(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    run = make_run(tmp_path / "run")
    weights = (run / "final/model.safetensors").read_bytes()
    write_scores(run, hashlib.sha256(weights).hexdigest())
    text = release(run, tmp_path / "release", family="llama", dtype="float16")
    assert "From tessera to llama in float16; the logits differ by at most" in text
    assert "Measured before the conversion" in text and "1.2345" in text
    assert "custom_code" not in ModelCard(text).data.tags
    assert "| tokenizer | 256 tokens, equal ids |" in text, "from the report of the conversion"
    convert(run / "final", tmp_path / "llama", to="llama")
    text = release(tmp_path / "llama", tmp_path / "again")
    assert "From tessera to llama. Compared were:" in text and str(tmp_path) not in text
    assert "| weights, read back | equal bit for bit |" in text
    assert not list((tmp_path / "again").glob("conversion_report*"))
    tiny_model("nanochat-tiny").save_pretrained(tmp_path / "other")
    report = (tmp_path / "llama/conversion_report.json").read_text()
    (tmp_path / "other/conversion_report.json").write_text(report)
    assert "Conversion" not in release(tmp_path / "other", tmp_path / "others"), "of other weights"


def test_the_code_on_the_card_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    run = make_run(tmp_path / "run")
    assert "TRL" not in release(run, tmp_path / "plain")
    (run / "final/chat_template.jinja").write_text(TEMPLATE)
    assert "TRL" not in release(run, tmp_path / "no-padding"), "TRL needs a token to pad with"
    tokenizer = build_byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(run / "final")
    code = "import sys; sys.modules['tessera'] = None\n"
    for family in (None, "llama"):
        text = release(run, tmp_path / f"as-{family}", family=family)
        assert "conversational" in ModelCard(text).data.tags
        assert ("vllm serve someone/it" in text) == (family == "llama"), "only what is known is said"
        load, train = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        assert ("trust_remote_code=True" in load) == ("trust_remote_code=True" in train) == (family is None)
        compile(train, "train", "exec")
        code += load.replace('"someone/it"', repr(str(tmp_path / f"as-{family}")))
        code += "print('module', type(model).__module__)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Hello!") == 2, "the prompt and what the model says to it"
    modules = re.findall(r"^module (\S+)$", done.stdout, flags=re.MULTILINE)
    assert modules[0].startswith("transformers_modules.")
    assert modules[1] == "transformers.models.llama.modeling_llama"


@pytest.mark.parametrize(
    ("keys", "drawn"),
    [
        (("loss", "val_loss"), True),
        (("loss", "reward_accuracy"), True),
        (("reward", "mean_reward"), True),
        ((), False),
    ],
)
def test_fine_tuning_has_curves_of_its_own(keys, drawn, tmp_path):
    values = [{"step": step, "tokens": step, "seconds": 1, **dict.fromkeys(keys, 1.0)} for step in range(3)]
    assert draw(values, tmp_path / "loss.png", "someone/it") == drawn
    assert (tmp_path / "loss.png").is_file() == drawn


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = make_run(tmp_path / "run", records=records())
    text = release(run, tmp_path / "release")
    assert "loss.png" not in text and "| steps done | 60 |" in text
    assert not (tmp_path / "release/loss.png").exists()
