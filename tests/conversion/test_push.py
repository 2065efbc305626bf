"""What is pushed is complete: others load it, without Tessera, and it is the same model."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import tiny_model
from huggingface_hub import HfApi
from local_hub import TOKEN, LocalHub
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from tessera import build_byte_tokenizer
from tessera.conversion import push as pushing
from tessera.conversion.aside import claimed
from tessera.conversion.convert import convert
from tessera.conversion.journal import Journal
from tessera.conversion.push import push
from tessera.conversion.release import build_release, check_release, left_out, list_release, write_release
from tessera.conversion.sources import open_checkpoint

# A stranger: transformers, a Hub, and nothing called tessera.
STRANGER = """
import sys
sys.modules["tessera"] = None
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision, remote, folder = sys.argv[1:]
remote = remote == "True"
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=remote)
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=remote)
ids = tokenizer("Hello, stranger!", return_tensors="pt").input_ids
with torch.no_grad():
    out = {"ids": ids, "logits": model(ids, use_cache=False).logits.float().contiguous()}
save_file(out, folder + "/out.safetensors")
print(type(model).__module__)
card = open(hf_hub_download(name, "README.md", revision=revision), encoding="utf-8").read()
exec(card.split("```python")[1].split("```")[0].replace("print(", "repr("))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def in_process(hub, monkeypatch):
    """Makes `push` in this process talk to the Hub."""
    monkeypatch.setattr(pushing, "get_token", lambda: TOKEN)
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint=hub.url, token=TOKEN))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub


def python(hub: LocalHub, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **hub.environment, **environment},
    )


def save_model(folder: Path, preset: str = "nanochat-tiny", **overrides) -> torch.nn.Module:
    model = tiny_model(preset, **overrides)
    model.save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return model


def stranger_loads(hub, name: str, remote: bool, folder: Path, revision: str = "main"):
    home = {"HF_HOME": str(folder / "home")}
    done = python(hub, "-c", STRANGER, name, revision, remote, folder, **home)
    assert done.returncode == 0, done.stderr
    out = load_file(folder / "out.safetensors")
    return done.stdout.strip(), out["ids"], out["logits"]


@pytest.mark.distributed
def test_a_run_is_pushed_and_a_stranger_loads_it(hub, tmp_path):
    run = tmp_path / "run"
    model = save_model(run / "final")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"steps": 7, "data_file": "/srv/me/books.txt"}))
    # As pretraining leaves it in the run: no model of its own.
    (run / "config.json").write_text("{}")
    words = ("--license", "mit", "--message", "It begins")
    done = python(hub, "-m", "tessera", "push", run, "someone/first", *words)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/someone/first/commit/" in done.stdout
    module, ids, logits = stranger_loads(hub, "someone/first", True, tmp_path)
    assert module.startswith("transformers_modules.")
    assert ids.tolist() == [list(b"Hello, stranger!")]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)
    repository = hub.find("models", "someone/first")
    commits = list((repository.folder / "commits").iterdir())
    assert len(commits) == 2, "one to create the repository, one with everything"
    assert repository.commit(repository.resolve("main"))["title"] == "It begins"


def test_pushed_as_llama_to_a_branch_it_needs_no_code(in_process, tmp_path, monkeypatch):
    hub = in_process
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    model = save_model(tmp_path / "ours", "llama-tiny")
    lines = []
    push(tmp_path / "ours", "someone/llama", family="llama", revision="first", private=True, say=lines.append)
    module, ids, logits = stranger_loads(hub, "someone/llama", False, tmp_path, revision="first")
    assert module == "transformers.models.llama.modeling_llama"
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)
    repository = hub.find("models", "someone/llama")
    assert not repository.commit(repository.resolve("main"))["files"]
    assert repository.about["private"]
    files = repository.commit(repository.resolve("first"))["files"]
    assert not any(name.endswith(".py") for name in files)
    card = repository.blob(files["README.md"]["sha256"]).read_text()
    assert 'AutoModelForCausalLM.from_pretrained("someone/llama", revision="first")' in card
    assert "From tessera to llama; the logits differ by at most" in card and "trust_remote_code" not in card
    assert any(line.startswith("converted: tessera to llama") for line in lines)
    assert not list((tmp_path / "cache/tessera/push").iterdir()), "nothing is kept after success"


def test_what_cannot_be_the_family_is_told_with_the_field(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    save_model(tmp_path / "ours", "llama-tiny")
    with pytest.raises(ValueError, match="cannot be a gpt2: .*norm_type is 'rms_norm'"):
        push(tmp_path / "ours", "someone/gpt", family="gpt2")
    with pytest.raises(ValueError, match="--as gguf: transformers loads tessera, llama"):
        push(tmp_path / "ours", "someone/gpt", family="gguf")
    assert not (in_process.root / "models/someone/gpt").exists()
    assert not list((tmp_path / "cache/tessera/push").iterdir())


def test_no_path_of_this_machine_travels_in_a_configuration(tmp_path):
    save_model(tmp_path / "ours", "llama-tiny")
    convert(tmp_path / "ours", tmp_path / "llama", to="llama")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "special_tokens_map_file")):
        file = tmp_path / "llama" / name
        code = {"auto_map": {"AutoModelForCausalLM": "someone/else--code.Model"}}
        file.write_text(json.dumps({**json.loads(file.read_text()), key: "/srv/me/é", **code}))
    notes = {"type": "bpe", "source": ["/srv/me/books.txt", "someone/corpus"], "data": {"path": "/srv/me/x"}}
    (tmp_path / "llama/tokenizer_meta.json").write_text(json.dumps(notes))
    (tmp_path / "llama/tokenizer_private_corpus.json").write_text("{}")
    release = release_folder(tmp_path / "release")
    build_release(open_checkpoint(tmp_path / "llama"), release, "someone/it")
    for name in ("config.json", "tokenizer_config.json"):
        assert "/srv/me" not in (release / name).read_text()
        assert "auto_map" not in (release / name).read_text(), "of a release that needs no code"
    expected = {"type": "bpe", "source": ["books.txt", "someone/corpus"], "data": {"path": "x"}}
    assert json.loads((release / "tokenizer_meta.json").read_text()) == expected
    assert not (release / "tokenizer_private_corpus.json").exists()
    assert json.loads((release / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("generation_config.json", "{", "ours/generation_config.json is not JSON"),
        ("generation_config.json", '{"max_new_tokens": -1}', "ours/generation_config.json does not say how"),
        ("tokenizer_meta.json", "[]", "ours/tokenizer_meta.json must hold a JSON object"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_named(name, content, sentence, tmp_path):
    save_model(tmp_path / "ours", "llama-tiny")
    (tmp_path / "ours" / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        build_release(open_checkpoint(tmp_path / "ours"), release_folder(tmp_path / "release"), "someone/it")


def test_the_release_is_complete(tmp_path):
    run = tmp_path / "run"
    save_model(run / "final", "bytegpt-tiny")
    GenerationConfig(eos_token_id=3).save_pretrained(run / "final")
    (run / "final/chat_template.jinja").write_text("{{ messages }}")
    release = tmp_path / "release"
    build_release(open_checkpoint(run), release_folder(release), "someone/bytes")
    names = {path.name for path in release.iterdir()}
    code = {"modeling_tessera.py", "configuration_tessera.py", "attention.py", "layers.py", "feed_forward.py"}
    data = {"config.json", "generation_config.json", "model.safetensors", "README.md", "chat_template.jinja"}
    assert code | data | {"tokenizer.json", "tokenizer_config.json"} <= names
    auto_map = json.loads((release / "config.json").read_text())["auto_map"]
    assert all((release / f"{place.split('.')[0]}.py").is_file() for place in auto_map.values())


def release_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_release_can_be_written_instead_of_sent_and_no_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(pushing, "_on_hub", lambda *_: False)
    monkeypatch.setattr(pushing, "check_release", lambda *_: None)
    # Bytes need no tokenizer beside the model here, but others do.
    tiny_model("llama-tiny").save_pretrained(tmp_path / "ours")
    # What an earlier one left when it was killed.
    (tmp_path / ".dry.partial").mkdir()
    Journal(tmp_path / ".dry.partial", {"release": "killed"})
    (tmp_path / ".dry.partial/old.txt").write_text("old")
    with claimed(tmp_path / "dry"), pytest.raises(ValueError, match="another process is writing"):
        push(tmp_path / "ours", "someone/dry", output=tmp_path / "dry")
    place = push(tmp_path / "ours", "someone/dry", output=tmp_path / "dry")
    assert place == str(tmp_path / "dry")
    assert (tmp_path / "dry/tokenizer.json").is_file()
    assert not any(path.is_symlink() for path in (tmp_path / "dry").iterdir())
    assert not {"old.txt", "lock"} & {path.name for path in (tmp_path / "dry").iterdir()}
    with pytest.raises(ValueError, match="is there already"):
        push(tmp_path / "ours", "someone/dry", output=tmp_path / "dry")


def test_chat_templates_with_names_are_released_in_their_folder(tmp_path):
    save_model(tmp_path / "ours", "llama-tiny")
    (tmp_path / "ours/additional_chat_templates").mkdir()
    (tmp_path / "ours/additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    release = release_folder(tmp_path / "release")
    build_release(open_checkpoint(tmp_path / "ours"), release, "someone/it")
    files = list_release(release)
    assert "additional_chat_templates/tool_use.jinja" in {file.name for file in files}
    assert "additional_chat_templates/" not in left_out(tmp_path / "ours", files)
    write_release(release, tmp_path / "copy")
    assert (tmp_path / "copy/additional_chat_templates/tool_use.jinja").read_text() == "{{ messages }}"


def test_a_release_that_is_another_model_or_does_not_load_is_refused(tmp_path):
    save_model(tmp_path / "ours", "llama-tiny")
    checkpoint = open_checkpoint(tmp_path / "ours")
    release = release_folder(tmp_path / "release")
    build_release(checkpoint, release, "someone/it")
    state = load_file(release / "model.safetensors")
    (release / "model.safetensors").unlink()  # a link to the model's own file
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**state, name: state[name].flip(0)}, release / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the release loads as another model: logits differ by up to"):
        check_release(checkpoint, release, tmp_path)
    (release / "layers.py").unlink()
    with pytest.raises(ValueError, match="the release does not load without Tessera: .*layers.py"):
        check_release(checkpoint, release, tmp_path)


@pytest.mark.parametrize(
    ("name", "token", "url", "sentence"),
    [
        ("someone/it", "", None, "there is no token for the Hub: set HF_TOKEN"),
        ("someone/it", "hf_wrong", None, "the Hub does not know the token"),
        ("some one/it", TOKEN, None, "cannot be a name on the Hub"),
        ("it", TOKEN, None, "lacks the owner: give owner/name"),
        ("someone/it", TOKEN, "http://127.0.0.1:9", "the Hub at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_a_hub_that_cannot_take_it_gets_one_sentence(
    name, token, url, sentence, in_process, tmp_path, monkeypatch
):
    monkeypatch.setattr(pushing, "get_token", lambda: token)
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint=url or in_process.url, token=token))
    with pytest.raises(ValueError, match=sentence) as caught:
        push(tmp_path / "nothing", name)
    assert "\n" not in str(caught.value)


def test_what_transformers_does_not_load_is_refused_before_anything_is_created(in_process, tmp_path):
    save_model(tmp_path / "ours", "llama-tiny")
    convert(tmp_path / "ours", tmp_path / "native", mp=2)
    with pytest.raises(ValueError, match="in the layout 'native', .* convert it first"):
        push(tmp_path / "native", "someone/native")
    assert not (in_process.root / "models/someone/native").exists()
