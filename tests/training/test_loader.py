"""`GEKOLoader`: the loop of a run without a trainer."""

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import geko_kernels as gk
from geko_kernels.training.loop_batches import Batch, moved
from geko_kernels.zero_share import ZeroShare

N, CLASSES, BATCH = 96, 3, 16


class Toy(torch.utils.data.Dataset):
    """Inputs that a linear model tells apart; their labels."""

    def __init__(self, size=N):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(size) % CLASSES
        self.inputs = torch.eye(CLASSES)[self.labels] * 4 + torch.randn(size, CLASSES, generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]


class Run:
    """A model, its optimizer and a loader."""

    def __init__(self, num_epochs=6, **named):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(CLASSES, CLASSES)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.loader = gk.GEKOLoader(Toy(), batch_size=BATCH, num_epochs=num_epochs, device="cpu", **named)
        self.seen = []

    def step(self, batch):
        self.seen.append((batch.epoch, batch.trains, batch.ids.tolist()))
        self.model.train(batch.trains)
        with torch.set_grad_enabled(batch.trains):
            inputs, labels = batch.data
            loss = gk.weighted_loss(self.model(inputs), labels, batch.ids, self.loader.state, update=True)
        if batch.trains:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state_dict(self):
        copied = {name: value.clone() for name, value in self.model.state_dict().items()}
        return {"loader": self.loader.state_dict(), "model": copied}

    def load_state_dict(self, values):
        self.loader.load_state_dict(values["loader"])
        self.model.load_state_dict(values["model"])


def test_loop_trains_every_sample_first_and_leaves_out_the_frozen():
    dataset = Toy()
    torch.manual_seed(0)
    model = torch.nn.Linear(CLASSES, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = gk.GEKOLoader(dataset, batch_size=BATCH, num_epochs=8, device="cpu", collate_fn=None, seed=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - loader.progress)
    trained, probed, progress = [0] * 8, 0, []
    for batch in loader:
        model.train(batch.trains)
        with torch.set_grad_enabled(batch.trains):
            inputs, labels = batch.data
            loss = gk.weighted_loss(model(inputs), labels, batch.ids, loader.state, update=True)
        if batch.trains:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert batch.ids.dtype == torch.int64
        assert torch.equal(inputs, dataset.inputs[batch.ids])
        assert batch.epoch == loader.epoch
        trained[batch.epoch] += len(batch.ids) * batch.trains
        probed += len(batch.ids) * (not batch.trains)
        progress.append(loader.progress)
    assert trained[0] == N
    assert min(trained) < N / 2
    assert probed > 0
    assert progress == sorted(progress) and progress[0] == 0.0 and progress[-1] < 1
    assert loader.progress == 1.0 and loader.epoch == 8
    assert int(loader.state.times_seen.sum()) == sum(trained) + probed
    assert list(loader) == []


def test_first_epoch_is_the_order_of_randperm():
    loader = gk.GEKOLoader(Toy(), batch_size=BATCH, num_epochs=1, device="cpu", seed=3)
    ids = []
    for batch in loader:
        ids += batch.ids.tolist()
        gk.weighted_loss(torch.zeros(len(batch.ids), CLASSES), batch.data[1], batch.ids, loader.state, update=True)
    assert ids == torch.randperm(N, generator=torch.Generator().manual_seed(3)).tolist()


def test_epochs_is_the_same():
    flat, nested = Run(), Run()
    for batch in flat.loader:
        flat.step(batch)
    ends = []
    for epoch in nested.loader.epochs():
        for batch in epoch:
            nested.step(batch)
        ends.append(nested.loader.epoch)
    assert nested.seen == flat.seen
    assert ends == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_bit_for_bit(workers):
    whole = Run(num_workers=workers)
    saved = []
    for batch in whole.loader:
        saved.append(whole.state_dict())  # before the batch is trained
        whole.step(batch)
    probes = [at for at, (_, trains, _) in enumerate(whole.seen) if not trains]
    places = range(len(saved)) if workers == 0 else [3, probes[0]]
    for at in places:
        resumed = Run(num_workers=workers)
        resumed.load_state_dict(saved[at])
        for batch in resumed.loader:
            resumed.step(batch)
        assert resumed.seen == whole.seen[at:]
        assert torch.equal(resumed.model.weight, whole.model.weight)
        for name, column in whole.loader.state.state_dict().items():
            assert torch.equal(resumed.loader.state.state_dict()[name], column), name
        assert resumed.loader.progress == 1.0


def test_resumes_bit_for_bit_from_behind_each_batch():
    """The same where the checkpoint is taken after the optimizer step; the report's counts come along."""
    whole, saved = Run(), []
    for batch in whole.loader:
        whole.step(batch)
        saved.append(whole.state_dict())
    expected = whole.loader.counts.report()
    for at, values in enumerate(saved):
        resumed = Run()
        resumed.load_state_dict(values)
        for batch in resumed.loader:
            resumed.step(batch)
        assert resumed.seen == whole.seen[at + 1 :]
        assert torch.equal(resumed.model.weight, whole.model.weight)
        for name, column in whole.loader.state.state_dict().items():
            assert torch.equal(resumed.loader.state.state_dict()[name], column), name
        found = resumed.loader.counts.report()
        for part in ("samples_forward", "samples_backward", "tokens_forward", "samples_standard", "saved_compute"):
            assert found[part] == expected[part], part
        for ours, theirs in zip(found["epochs"], expected["epochs"], strict=True):
            assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_taking_a_checkpoint_changes_nothing():
    plain, saving = Run(), Run()
    for batch in plain.loader:
        plain.step(batch)
    for batch in saving.loader:
        saving.state_dict()
        saving.step(batch)
        saving.state_dict()
    assert saving.seen == plain.seen
    assert torch.equal(saving.model.weight, plain.model.weight)
    drop = {"seconds": 0, "epochs": 0}
    assert {**saving.loader.counts.report(), **drop} == {**plain.loader.counts.report(), **drop}


def test_refuses_a_loop_that_counts_no_visit():
    loader = gk.GEKOLoader(Toy(), batch_size=BATCH, device="cpu")
    with pytest.raises(RuntimeError, match=r"weighted_loss\(logits, labels, batch.ids, loader.state, update=True\)"):
        list(loader)


def test_moves_nested_data():
    items = [{"x": torch.ones(2), "more": (i, "text")} for i in range(4)]
    batch = next(iter(gk.GEKOLoader(items, batch_size=4, device="cpu")))
    assert batch.data["x"].shape == (4, 2)
    assert batch.data["more"][0].tolist() == batch.ids.tolist()
    assert list(batch.data["more"][1]) == ["text"] * 4


def test_moves_packed_sequences_and_named_tuples():
    """On the meta device: `PackedSequence` keeps its batch sizes on the CPU."""
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    result = moved({"packed": packed, "pair": Batch(torch.ones(2), torch.ones(1), 0, True)}, torch.device("meta"))
    assert result["packed"].data.is_meta and result["packed"].batch_sizes.device.type == "cpu"
    assert isinstance(result["pair"], Batch) and result["pair"].ids.is_meta


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"num_epochs": 1.5}, TypeError, "num_epochs must be an int, got 1.5"),
        ({"config": {}}, TypeError, "config must be a GEKOConfig, got dict"),
        ({"collate_fn": 3}, TypeError, "collate_fn must be callable, got int"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0, got -1"),
        ({"dataset": iter([1])}, TypeError, r"dataset must have len\(\) and \[\], got list_iterator"),
        ({"dataset": DataLoader(Toy())}, TypeError, "got DataLoader: give its dataset, loader.dataset"),
        ({"dataset": []}, ValueError, "dataset must have at least one sample, got none"),
        ({"dataset": {"x": [1], "y": [2]}}, TypeError, r"dataset\[0\] to dataset\[len - 1\], got dict: give one split"),
        ({"dataset": "data.jsonl"}, TypeError, r"dataset\[0\] to dataset\[len - 1\], got str: .* load a file"),
    ],
)
def test_refuses_wrong_arguments(named, error, message):
    with pytest.raises(error, match=message):
        gk.GEKOLoader(**{"dataset": Toy(), "device": "cpu", **named})


def test_refuses_the_state_of_another_run():
    saved = gk.GEKOLoader(Toy(), batch_size=8, device="cpu").state_dict()
    with pytest.raises(
        ValueError, match=r"state_dict\['batch_size'\] is 8, .* batch_size is 4: go on with the loader's arguments"
    ):
        gk.GEKOLoader(Toy(), batch_size=4, device="cpu").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state_dict\['num_samples'\] is 96"):
        gk.GEKOLoader(Toy(90), batch_size=8, device="cpu").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state_dict\['num_epochs'\] is 10, but this loader's num_epochs is 3"):
        gk.GEKOLoader(Toy(), batch_size=8, num_epochs=3, device="cpu").load_state_dict(saved)
    config = gk.GEKOConfig.recommended(light_interval=3)
    with pytest.raises(ValueError, match=r"has light_interval=2, but this loader's config has 3"):
        gk.GEKOLoader(Toy(), batch_size=8, config=config, device="cpu").load_state_dict(saved)
    other = Toy()
    other.inputs = other.inputs + 1
    with pytest.raises(ValueError, match=r"of a run over other data: 64 of 64 items compared differ"):
        gk.GEKOLoader(other, batch_size=8, device="cpu").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state_dict lacks .*'due', .*GEKOLoader.state_dict"):
        gk.GEKOLoader(Toy(), batch_size=8, device="cpu").load_state_dict({"num_samples": N})


def test_iterating_anew_goes_on_with_the_batch_at_hand():
    whole, broken = Run(), Run()
    for batch in whole.loader:
        whole.step(batch)
    while broken.loader.progress < 1:
        for count, batch in enumerate(broken.loader):
            if count == 3:
                break
            broken.step(batch)
    assert broken.seen == whole.seen
    assert torch.equal(broken.model.weight, whole.model.weight)


def test_state_dict_passes_a_file_and_is_a_copy(tmp_path):
    run = Run()
    batches = iter(run.loader)
    for _ in range(8):
        run.step(next(batches))
    at_hand = next(batches)
    run.loader.state.zero_share = ZeroShare([3, 1, 7.5, 9, 0, 2])
    saved = run.loader.state_dict()
    torch.save(saved, tmp_path / "loader.pt")
    run.step(at_hand)
    run.step(next(batches))
    loaded = torch.load(tmp_path / "loader.pt", weights_only=True)
    for name, column in loaded["state"].items():
        assert torch.equal(column, saved["state"][name]), name
    resumed = Run()
    resumed.loader.load_state_dict(loaded)
    assert next(iter(resumed.loader)).ids.tolist() == at_hand.ids.tolist()
    assert resumed.loader.state.zero_share.values() == [3, 1, 7.5, 9, 0, 2]
    del loaded["zero_share"]  # as an earlier release wrote it
    resumed.loader.load_state_dict(loaded)
    assert resumed.loader.state.zero_share.values() == [0] * 6


def test_refuses_probes_that_count_no_visit():
    run = Run()
    with pytest.raises(RuntimeError, match=r"no visit was counted in the probes of epoch \d: .*update=True"):
        for batch in run.loader:
            if batch.trains:
                run.step(batch)


def test_comes_without_transformers():
    names = "gk.GEKOLoader, gk.IdDataset, gk.IdCollator"
    code = f"import sys, geko_kernels as gk; {names}; print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_refuses_epochs_that_are_not_iterated():
    with pytest.raises(RuntimeError, match="no batch of epoch 0 was consumed before the next epoch was fetched"):
        list(gk.GEKOLoader(Toy(), device="cpu").epochs())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"due": torch.tensor([N])}, r"state_dict\['due'\] must hold ids in \[0, 96\), got 96..96"),
        ({"due": torch.tensor([0.5])}, r"state_dict\['due'\] must be None or a tensor of int64 ids"),
        ({"probed": -1}, r"state_dict\['probed'\] must be an int from 0"),
        ({"zero_share": [1]}, r"zero_share must be six numbers as a state has them, got \[1\]"),
        ({"visits": {}}, r"state_dict\['visits'\] is damaged: it must hold the columns of each visit"),
    ],
)
def test_refuses_a_damaged_state(damage, message):
    loader = gk.GEKOLoader(Toy(), device="cpu")
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**loader.state_dict(), **damage})


def test_a_state_that_is_none_of_its_own():
    with pytest.raises(TypeError, match=r"must be what GEKOLoader.state_dict\(\) returned, got NoneType"):
        gk.GEKOLoader(Toy(), device="cpu").load_state_dict(None)


def test_refuses_a_table_whose_rows_have_no_number():
    table = pytest.importorskip("pandas").DataFrame({"x": [1]})
    with pytest.raises(TypeError, match=r"got DataFrame: .*zip columns .*to_dict\('records'\)"):
        gk.GEKOLoader(table, device="cpu")


def test_a_row_by_number_may_come_from_a_dict():
    batch = next(iter(gk.GEKOLoader({i: i for i in range(4)}, 4, 1, device="cpu")))
    assert sorted(batch.data.tolist()) == [0, 1, 2, 3]


def test_a_script_that_ends_within_an_epoch_ends_quietly():
    script = "import geko_kernels as gk\nloader = gk.GEKOLoader([1] * 8, 2, 1)\nfor batch in loader:\n    break\n"
    script += "batches = iter(loader)\nnext(batches)\nraise SystemExit"
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loader_does_not_find_the_run_s_length():
    with pytest.raises(ValueError, match="config.auto_stop must be False, got True: GEKOLoader cannot end a loop"):
        gk.GEKOLoader([0] * 8, 2, 1, config=gk.GEKOConfig.auto())
