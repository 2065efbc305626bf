"""What a run reads: packed and isolated rows, mixtures, any number of processes, and resuming."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import tiny_config
from helpers.runs import tiny_arguments, tiny_run, untimed_records, write_prepared, write_words

from tessera.data.text import Tokens
from tessera.data.training_rows import IGNORED
from tessera.evaluation.bits_per_byte import TextLoss
from tessera.training.feed import Feed
from tessera.training.inputs import Corpus, open_corpora
from tessera.training.pretrain import Run
from tessera.training.pretrain_arguments import PretrainArguments, gather_arguments

GIVEN = {"config": "llama-tiny", "sequence_length": 16, "steps": 6, "log_steps": 1}


def write_documents(folder: Path, tokenizer: Path, sizes: list[int], seed: int = 0) -> str:
    """A prepared folder of documents of random words, each ended by `<eos>`, which is 1."""
    generator = np.random.default_rng(seed)
    sizes = np.asarray(sizes)
    ids = generator.integers(2, 10, sizes.sum())
    ids[sizes.cumsum() - 1] = 1
    path = write_prepared(folder, ids.tolist(), generator.integers(2, 10, 60 + seed).tolist(), 300, tokenizer)
    starts = np.concatenate([[0], sizes.cumsum()]).astype("<u8")
    Path(path, "train.idx").write_bytes(starts.tobytes())
    meta = json.loads(Path(path, "data_meta.json").read_text())
    meta["train"]["documents"] = len(sizes)
    Path(path, "data_meta.json").write_text(json.dumps(meta))
    return path


@pytest.fixture
def words(tmp_path) -> Path:
    return write_words(tmp_path / "words")


@pytest.fixture
def wiki(tmp_path, words) -> str:
    return write_documents(tmp_path / "wiki", words, [5, 40, 9, 13, 3, 17, 60, 2, 8] * 8)


@pytest.fixture
def web(tmp_path, words) -> str:
    return write_documents(tmp_path / "web", words, [11, 7, 25, 4] * 9, seed=1)


# ---- which process reads what ----


def make_feeds(processes: int, **given) -> list[Feed]:
    sizes = np.random.default_rng(0).integers(1, 30, 60)
    starts = np.concatenate([[0], sizes.cumsum()])
    ids = np.arange(1, starts[-1] + 1)
    ids[starts[1:] - 1] = 0
    corpus = Corpus(None, None, Tokens(ids, len(ids), starts), Tokens(ids, len(ids)))
    args = PretrainArguments(config="x", data_file="x", packing="best-fit", isolate_documents=True, **given)
    return [Feed([corpus], args, 8, rank, processes) for rank in range(processes)]


@pytest.mark.parametrize(
    ("processes", "given"),
    [
        (1, {"batch_size": 7, "accumulation": 2}),
        (2, {"batch_size": 7, "accumulation": 3}),
        (3, {"batch_size": 7}),
        (3, {"batch_size": 11, "micro_batch_size": 2}),
        (4, {"batch_size": 8, "micro_batch_size": 1}),
    ],
)
def test_any_split_of_a_step_reads_each_row_once(processes, given):
    device = torch.device("cpu")
    for step in (0, 1, 30):
        (whole,) = make_feeds(1, batch_size=given["batch_size"])[0].micro_batches(step, device)
        feeds = make_feeds(processes, **given)
        parts = [list(feed.micro_batches(step, device)) for feed in feeds]
        assert {len(of_process) for of_process in parts} == {feeds[0].accumulation}
        assert all(len(part["input_ids"]) for of_process in parts for part in of_process)
        if most := given.get("micro_batch_size"):
            assert max(len(part["input_ids"]) for of_process in parts for part in of_process) <= most
        for name, expected in whole.items():
            assert torch.equal(torch.cat([part[name] for parts_ in parts for part in parts_]), expected)
        counted = int((whole["shift_labels"] != IGNORED).sum())
        assert {feed.counted(step) for feed in feeds} == {counted}


def test_fewer_rows_than_processes_are_refused():
    with pytest.raises(ValueError, match=r"batch_size 3 is less than a row .* \(1 x 4\); give 4 or more"):
        make_feeds(4, batch_size=3)


# ---- schedules ----


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_schedule_of_batches_reads_the_rows_of_a_run_without_one(processes):
    """Row after row, in larger and larger steps, and no micro-batch is larger than it may be."""
    device = torch.device("cpu")
    schedule = {"batch_schedule": ["0:3", "0.5:6", "0.75:9"], "micro_batch_size": 2}
    feeds = make_feeds(processes, steps=8, **schedule)
    plain = make_feeds(1, steps=40, batch_size=1)[0]
    assert [len(feeds[0].rows_of(step)) for step in range(10)] == [3, 3, 3, 3, 6, 6, 9, 9, 9, 9]
    read, shapes = [], set()
    for step in range(8):
        assert feeds[0].tokens_before(step) == 8 * sum(map(len, read))
        parts = [list(feed.micro_batches(step, device)) for feed in feeds]
        assert {len(of_process) for of_process in parts} == {feeds[0].parts_of(step)}
        shapes |= {tuple(part["input_ids"].shape) for of_process in parts for part in of_process}
        read.append(torch.cat([part["input_ids"] for of_process in parts for part in of_process]))
        assert feeds[0].counted(step) == sum(
            int((part["labels"] != IGNORED).sum()) for of_process in parts for part in of_process
        )
    assert shapes == feeds[0].shapes(0) and max(shapes)[0] <= 2
    expected = [next(plain.micro_batches(i, device))["input_ids"] for i in range(feeds[0].rows_before(8))]
    assert torch.equal(torch.cat(read), torch.cat(expected))


def test_a_schedule_of_lengths_cuts_the_same_rows():
    device = torch.device("cpu")
    schedule = {"length_schedule": ["0:2", "0.25:4", "0.5:8"], "batch_size": 3, "steps": 8}
    (feed,), (whole,) = make_feeds(1, **schedule), make_feeds(1, batch_size=3)
    assert feed.args.sequence_length == 8
    for step, length in enumerate([2, 2, 4, 4, 8, 8, 8, 8]):
        (short,), (rows,) = feed.micro_batches(step, device), whole.micro_batches(step, device)
        assert feed.length_at(step) == short["input_ids"].shape[1] == length
        for name in ("input_ids", "shift_labels"):
            assert torch.equal(short[name].flatten(), rows[name].flatten())
        assert feed.counted(step) == whole.counted(step) and feed.tokens_before(step) == step * 24
        cut, positions = short["position_ids"], rows["position_ids"].reshape(-1, length)
        assert (cut[:, 0] == 0).all()
        # A document goes on where it went on before, and starts where it started.
        edges = (positions.diff(dim=1) != 1), (cut.diff(dim=1) != 1)
        assert torch.equal(*edges) and torch.equal(cut[positions == 0], positions[positions == 0])
    assert feed.shapes(0) == {(12, 2), (6, 4), (3, 8)} and feed.shapes(3) == {(6, 4), (3, 8)}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"batch_schedule": ["0:2", "0.5:4"], "minutes": 1}, "need a length in steps, epochs or tokens"),
        ({"length_schedule": ["0:3", "0.5:8"], "steps": 4}, "windows of 3 do not divide rows of 8"),
        ({"batch_schedule": ["0:1", "0.5:4"], "steps": 4}, "1 rows leave some of 2 processes without one"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_feeds(2, **given)


def test_tokens_and_epochs_are_counted_with_the_batches_of_a_schedule():
    stages = ["0:2", "0.5:6"]
    (feed,) = make_feeds(1, tokens=8 * 400, batch_schedule=stages)
    assert feed.total_steps == 100 and feed.tokens_before(100) == 8 * 400
    (feed,) = make_feeds(1, epochs=2, batch_schedule=stages)
    assert feed.epochs(feed.total_steps)["epoch"] == pytest.approx(2, abs=0.05)
    (feed,) = make_feeds(1, epochs=2, steps=3, minutes=1, batch_schedule=stages)
    assert feed.total_steps == 3


def test_a_run_with_schedules_goes_on_to_the_bit(wiki, tmp_path, monkeypatch):
    """Stopped in one stage of lengths, before one of batches."""
    given = {
        **GIVEN,
        "data_file": wiki,
        "steps": 8,
        "length_schedule": ["0:8", "0.5:16"],
        "isolate_documents": True,
    }
    given |= {"batch_schedule": ["0:2", "0.75:4"], "batch_size": 4, "schedule": "wsd", "momentum_end": 0.9}
    given |= {"weight_decay": 0.1, "weight_decay_schedule": "cosine"}
    whole = tiny_run(tmp_path, **given)
    step = Run._optimizer_step

    def killed(self, progress):
        if self.step == 3:
            raise SystemExit
        return step(self, progress)

    halves = {**given, "save_path": str(tmp_path / "halves"), "checkpoint_steps": 3}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "_optimizer_step", killed)
        tiny_run(tmp_path, **halves)
    with pytest.raises(ValueError, match="it differs in batch_schedule.*, length_schedule"):
        tiny_run(tmp_path, resume=True, **{**halves, "steps": 80})
    rest = tiny_run(tmp_path, resume=True, **halves)
    assert rest.after == whole.after and rest.tokens == 16 * (6 * 2 + 2 * 4)


# ---- runs ----


def test_an_epoch_of_packed_rows_trains_on_every_token_once(wiki, tmp_path, monkeypatch):
    seen = Counter()
    micro_batches = Feed.micro_batches

    def noted(self, step, device):
        for batch in micro_batches(self, step, device):
            assert batch["position_ids"][0, 0] == 0
            targets = batch["shift_labels"]
            seen.update(targets[targets != IGNORED].tolist())
            yield batch

    monkeypatch.setattr(Feed, "micro_batches", noted)
    given = {**GIVEN, "steps": None, "epochs": 1, "packing": "best-fit", "isolate_documents": True}
    given["sequence_length"] = 64
    result = tiny_run(tmp_path, data_file=wiki, batch_size=1, **given)
    assert seen == Counter(np.fromfile(Path(wiki, "train.bin"), dtype="<u2").tolist())
    assert untimed_records(result.folder, "loss")[-1]["epoch"] == 1.0


def test_isolation_changes_what_is_learned_and_packing_does(wiki, tmp_path):
    losses = []
    for packing in ("contiguous", "best-fit"):
        for isolate in (False, True):
            save = str(tmp_path / f"{packing}-{isolate}")
            given = {**GIVEN, "packing": packing, "isolate_documents": isolate, "save_path": save}
            losses.append(tiny_run(tmp_path, data_file=wiki, **given).after.nats)
    assert len(set(losses)) == 4 and all(map(math.isfinite, losses))


def test_a_mixture_trains_counts_epochs_and_scores_each_corpus(wiki, web, tmp_path, monkeypatch):
    given = {**GIVEN, "data_file": [f"{wiki}:0.75", f"{web}:0.25"], "packing": "best-fit"}
    result = tiny_run(tmp_path, **given)
    run = Run(tiny_arguments(tmp_path, **given, save_path=str(tmp_path / "other")))
    rows = [made.per_epoch for made in run.feed.sequence.corpora]
    last = untimed_records(result.folder, "loss")[-1]
    assert last["epoch/wiki"] == pytest.approx(18 / rows[0], abs=1e-6)
    assert last["epoch/web"] == pytest.approx(6 / rows[1], abs=1e-6)
    scored = untimed_records(result.folder, "val_loss")[-1]
    assert scored["val_loss"] == pytest.approx(0.75 * scored["val_loss/wiki"] + 0.25 * scored["val_loss/web"])
    assert result.after.nats == pytest.approx(scored["val_loss"], abs=1e-6)
    whole = Run._optimizer_step

    def optimizer_step(self, progress):
        if self.step == 3:
            raise SystemExit  # as if killed
        return whole(self, progress)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "_optimizer_step", optimizer_step)
        tiny_run(tmp_path, **given, save_path=str(tmp_path / "halves"), checkpoint_steps=1)
    halves = tiny_run(tmp_path, resume=True, **given, save_path=str(tmp_path / "halves"))
    # but the loss, whose average over steps begins anew where the run does
    ours, theirs = (
        [{**r, "loss": 0} for r in untimed_records(run.folder, "loss")] for run in (halves, result)
    )
    assert ours == theirs and len(ours) == 6
    assert halves.after == result.after


def test_the_loss_of_a_mixture_is_that_of_its_shares():
    feed = make_feeds(1)[0]
    feed.sequence.schedule = type("Schedule", (), {"shares": np.array([0.75, 0.25])})
    one, two = TextLoss(2.0, 100, 400.0, 0.1), TextLoss(4.0, 50, 100.0, 0.2)
    mixed = feed.mixed([one, two])
    assert mixed.nats == 2.5
    # a token of it stands for 0.75 * 4 + 0.25 * 2 bytes
    assert mixed.bits_per_byte == pytest.approx(2.5 / 3.5 / math.log(2))
    assert mixed.stderr == pytest.approx(math.hypot(0.075, 0.05))
    assert feed.mixed([one]) is one


def test_a_recipe_says_packing_and_shares_and_a_flag_lies_over_it(tmp_path):
    (recipe := tmp_path / "train.yaml").write_text(
        "config: llama-tiny\ndata_dir: [web:0.7, wiki:0.3]\npacking: best-fit\nisolate_documents: true\n"
    )
    args = gather_arguments({}, str(recipe))
    assert args.data_file == ["web:0.7", "wiki:0.3"]
    assert (args.packing, args.isolate_documents) == ("best-fit", True)
    args = gather_arguments({"data_file": ["one"], "isolate_documents": False}, str(recipe))
    assert (args.data_file, args.isolate_documents) == ("one", False)


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"packing": "contiguous"}, "packing"),
        ({"isolate_documents": True}, "isolate_documents"),
        ({"data_file": ["{wiki}:0.5", "{web}:0.5"]}, "weights"),
        ({"data_file": ["{web}:0.25", "{wiki}:0.75"]}, "sha256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resuming_in_another_order_is_refused_and_says_what_differs(change, named, wiki, web, tmp_path):
    given = {**GIVEN, "data_file": [f"{wiki}:0.75", f"{web}:0.25"], "packing": "best-fit", "steps": 1}
    tiny_run(tmp_path, **given)
    if "data_file" in change:
        change = {"data_file": [one.format(wiki=wiki, web=web) for one in change["data_file"]]}
    with pytest.raises(ValueError, match=f"trained on other data, .*: it differs in .*{named}"):
        tiny_run(tmp_path, resume=True, **{**given, "steps": 3, **change})


def test_resuming_with_another_batch_says_both_sizes(wiki, tmp_path):
    given = {**GIVEN, "data_file": wiki, "steps": 1}
    tiny_run(tmp_path, **given)
    with pytest.raises(ValueError, match=r"batch_size \(4 there, 5 here\); resume with what the run was"):
        tiny_run(tmp_path, resume=True, **{**given, "batch_size": 5})


def test_documents_packed_otherwise_are_another_order(wiki, tmp_path):
    """The same tokens with other boundaries."""
    given = {**GIVEN, "data_file": wiki, "packing": "best-fit", "steps": 1}
    tiny_run(tmp_path, **given)
    starts = np.fromfile(Path(wiki, "train.idx"), dtype="<u8")
    meta = json.loads(Path(wiki, "data_meta.json").read_text())
    meta["train"]["documents"] = 1
    Path(wiki, "data_meta.json").write_text(json.dumps(meta))
    starts[[0, -1]].tofile(Path(wiki, "train.idx"))
    with pytest.raises(ValueError, match="it differs in .*documents"):
        tiny_run(tmp_path, resume=True, **{**given, "steps": 3})


def test_one_folder_alone_may_have_a_weight(wiki, tmp_path):
    corpora, _ = open_corpora(f"{wiki}:0.5", None, tiny_config("llama-tiny"), follow=True)
    assert [corpus.name for corpus in corpora] == ["wiki"]


def test_mixtures_that_make_no_sense_are_refused(wiki, web, tmp_path):
    (text := tmp_path / "text.txt").write_text("some text")
    other = write_documents(
        tmp_path / "other", write_words(tmp_path / "others", pad_token="<pad>"), [9, 9, 9]
    )
    bytes_ = write_prepared(tmp_path / "bytes", list(b"abc" * 90), list(b"abc"), 3)
    for data, sentence in (
        ([f"{wiki}:0.5", f"{wiki}:0.5"], "wiki is given twice"),
        ([wiki, f"{web}:0.5"], "wiki has no weight; of several folders each needs one"),
        ([f"{wiki}:1", f"{text}:1"], "text.txt is no folder of prepared tokens"),
        ([f"{wiki}:1", f"{other}:1"], "wiki and .*other were encoded with different tokenizers"),
        ([f"{bytes_}:1", f"{wiki}:1"], "bytes and .*wiki were encoded with different tokenizers"),
        ([f"{wiki}:0", f"{web}:1"], "weight of .*wiki must be positive"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny_run(tmp_path, data_file=data, **GIVEN)
    assert not (tmp_path / "run").exists()


def test_documents_are_found_by_their_ends_where_no_index_says_them(wiki, tmp_path):
    given = {**GIVEN, "packing": "best-fit", "isolate_documents": True, "data_file": wiki}
    expected = tiny_run(tmp_path, **given).after
    Path(wiki, "train.idx").unlink()
    meta = json.loads(Path(wiki, "data_meta.json").read_text())
    del meta["train"]["documents"]
    Path(wiki, "data_meta.json").write_text(json.dumps(meta))
    assert tiny_run(tmp_path, **given, save_path=str(tmp_path / "second")).after == expected
    bytes_ = write_prepared(tmp_path / "bytes", list(b"abc" * 90), list(b"abc"), 3)
    Path(bytes_, "train.idx").unlink()
    meta = json.loads(Path(bytes_, "data_meta.json").read_text())
    del meta["train"]["documents"]
    Path(bytes_, "data_meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="nobody knows where the documents of these tokens start"):
        tiny_run(tmp_path, **{**given, "data_file": bytes_, "save_path": str(tmp_path / "third")})


# ---- several processes ----


@pytest.mark.distributed
def test_a_mixture_goes_on_with_the_same_rows_on_another_number_of_processes(wiki, web, tmp_path):
    """Five rows a step on one process; on two, three steps; and the rest on three."""
    options = (
        f"--config llama-tiny --data {wiki}:0.7 --data {web}:0.3 --packing best-fit --batch-size 5".split()
    )
    options += "--sequence-length 16 --isolate-documents --optimizer adamw --learning-rate 1e-4".split()
    options += "--evaluations 0".split()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "log_steps: 1\nfloor: 1.0\nwarmup: 0.0\nsample_tokens: 0\n"
    )  # a schedule that knows no end
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def train(folder: str, processes: int, steps: int, *more: str) -> Path:
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
        command = [sys.executable, *(launch if processes > 1 else []), "-m", "tessera.training.pretrain"]
        command += [
            *options,
            "--recipe",
            str(recipe),
            "--steps",
            str(steps),
            "--save-path",
            str(tmp_path / folder),
        ]
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return tmp_path / folder

    one = train("one", 1, 6)
    train("elastic", 2, 3)
    elastic = train("elastic", 3, 6, "--resume")
    ours, theirs = untimed_records(elastic, "loss"), untimed_records(one, "loss")
    assert [record["step"] for record in ours] == [1, 2, 3, 4, 5, 6]
    for key in ("epoch/wiki", "epoch/web", "tokens"):
        assert [record[key] for record in ours] == [record[key] for record in theirs]
    # not the loss, whose average over steps begins anew where the run does
    norms = [[record["grad_norm"] for record in run] for run in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    after = [untimed_records(run, "val_loss")[-1]["val_loss"] for run in (elastic, one)]
    assert after[0] == pytest.approx(after[1], abs=1e-4)
