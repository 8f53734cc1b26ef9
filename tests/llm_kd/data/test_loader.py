"""TextLoader: what a batch holds for any rank, epoch and interruption."""

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from llm_kd.data.example import Example
from llm_kd.data.loader import TextLoader

COUNT = 50
GENERATOR = torch.Generator().manual_seed(1)
LENGTHS = torch.randint(2, 12, (COUNT,), generator=GENERATOR).tolist()
# The second token tells which example it is.
EXAMPLES = [
    Example([1, 100 + n, *[2] * (length - 2)], [False, *[True] * (length - 1)], 1) for n, length in enumerate(LENGTHS)
]
NAMES = {example.key: n for n, example in enumerate(EXAMPLES)}


def loader(batch_size=4, *, shuffle=True, examples=EXAMPLES, **options):
    return TextLoader(examples, batch_size, pad_id=0, shuffle=shuffle, **options)


def names(batches):
    return [[NAMES[key] for key in batch.keys] for batch in batches]


def flat(batches):
    return [name for batch in names(batches) for name in batch]


def test_keys_are_distinct():
    assert len(NAMES) == COUNT


def test_an_epoch_holds_examples_once_in_a_new_order():
    data = loader(5)
    first, second = flat(data), flat(data)
    assert len(data) == 10
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second
    assert first != list(range(COUNT))


def test_the_incomplete_batch_is_left_out_and_counted():
    data = loader(4)
    assert (len(data), data.left_out) == (12, 2)
    epochs = [flat(data) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [48, 48]
    assert set(epochs[0]) != set(epochs[1])  # others each time


def test_validation_holds_every_example_in_order():
    data = loader(7, shuffle=False)
    batches = list(data)
    assert [len(batch.keys) for batch in batches] == [7] * 7 + [1]
    assert len(data) == 8
    assert flat(batches) == list(range(COUNT))
    assert data.left_out == 0


def test_batches_are_as_long_as_their_longest_row():
    for batch in loader(3):
        assert batch.input_ids.shape == (3, max(len(EXAMPLES[NAMES[key]].input_ids) for key in batch.keys))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_each_change_the_order(changed):
    first, second = loader(seed=0), loader(seed=changed.get("seed", 0))
    second.set_epoch(changed.get("epoch", 0))
    assert flat(first) != flat(second)


def test_a_chosen_epoch_equals_that_epoch_of_an_uninterrupted_run():
    uninterrupted = loader(seed=3)
    epochs = [names(uninterrupted) for _ in range(4)]
    torch.manual_seed(99)  # the global state has no say
    resumed = loader(seed=3)
    resumed.set_epoch(3)
    assert names(resumed) == epochs[3]


@pytest.mark.parametrize("pack_length", [None, 16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_compose_the_global_batch(world_size, pack_length):
    whole = list(loader(2 * world_size, pack_length=pack_length))
    ranks = [list(loader(2, pack_length=pack_length, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len(whole) > 1
    for batch, *parts in zip(whole, *ranks, strict=True):
        for rank, part in enumerate(parts):
            width = part.input_ids.shape[1]
            assert torch.equal(part.input_ids, batch.input_ids[rank::world_size, :width])
            assert not batch.input_ids[rank::world_size, width:].any()


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_validation_covers_every_example_once_in_equally_many_batches(world_size):
    loaders = [loader(4, shuffle=False, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [list(data) for data in loaders]
    assert {len(rank) for rank in batches} == {len(loaders[0])}
    assert all(len(batch.input_ids) for rank in batches for batch in rank)
    assert sorted(name for rank in batches for name in flat(rank)) == list(range(COUNT))


def test_a_rank_without_an_example_computes_on_one_without_a_loss():
    (batch,) = loader(4, shuffle=False, examples=EXAMPLES[:1], rank=1, world_size=2)
    assert batch.input_ids.shape == (1, 1)
    assert not batch.predict.any()
    assert (batch.keys, batch.prompts) == ([], [])


def test_packed_rows_hold_every_example_once_within_their_length():
    data = loader(1, pack_length=16)
    assert len(data) < COUNT * 0.6
    batches = list(data)
    assert sorted(flat(batches)) == list(range(COUNT))
    assert max(batch.input_ids.shape[1] for batch in batches) <= 16
    rows = {frozenset(batch) for batch in names(batches)}
    assert rows == {frozenset(batch) for batch in names(data)}  # the next epoch shuffles the same rows
    assert rows != {frozenset(batch) for batch in names(loader(1, pack_length=16, seed=1))}


def test_state_continues_inside_an_epoch():
    whole, interrupted, resumed = loader(), loader(), loader()
    for data in (whole, interrupted):
        data.set_epoch(2)
    expected = names(whole)
    batches = iter(interrupted)
    for _ in range(5):
        next(batches)
    resumed.load_state_dict(interrupted.state_dict())
    assert names(resumed) == expected[5:]
    resumed.set_epoch(2)
    assert names(resumed) == expected  # the position is used once


def test_a_chosen_epoch_drops_the_stored_position():
    interrupted, resumed = loader(), loader()
    next(iter(interrupted))
    resumed.load_state_dict(interrupted.state_dict())
    resumed.set_epoch(1)
    assert len(names(resumed)) == len(resumed)


@pytest.mark.parametrize(
    "other", [{"batch_size": 5}, {"seed": 1}, {"world_size": 2}, {"pack_length": 30}, {"examples": EXAMPLES[1:]}]
)
def test_a_position_inside_an_epoch_of_other_data_is_refused(other):
    saved, resumed = loader(), loader(**other)
    batches = iter(saved)
    next(batches)
    with pytest.raises(ValueError, match="written 1 batches into epoch 0 with other data, batch size, packing, seed"):
        resumed.load_state_dict(saved.state_dict())
    list(batches)
    resumed.load_state_dict(saved.state_dict())  # at the end of an epoch nothing is lost
    assert resumed.epoch == 1


def test_too_few_rows_name_the_setting():
    with pytest.raises(ValueError, match=r"batch_size 26: the 50 training rows .* of 2 processes; .* at most 25"):
        loader(26, world_size=2)


class _Recorder(LightningModule):
    """Remembers the examples of every training batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch_idx, batch.keys))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _StopAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("killed")


def _fit(model, folder, *callbacks, packing=None, ckpt_path=None, **options):
    trainer = Trainer(
        max_epochs=3,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loaders = loader(pack_length=packing), loader(7, shuffle=False)
    trainer.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else False)
    return model.seen


@pytest.mark.parametrize("packing", [None, 16])
@pytest.mark.parametrize("step", [2, 8])  # packed rows make 5 batches an epoch
def test_lightning_resumes_inside_an_epoch(tmp_path, step, packing):
    uninterrupted = _fit(_Recorder(), tmp_path, packing=packing, enable_checkpointing=False)
    assert len({tuple(keys) for _, _, keys in uninterrupted}) == len(uninterrupted) > step + 2
    path, killed = tmp_path / "inside.ckpt", _Recorder()
    with pytest.raises(KeyError, match="killed"):
        _fit(killed, tmp_path, _StopAt(step, path), packing=packing, enable_checkpointing=False)
    assert killed.seen == uninterrupted[:step]
    resumed = _fit(_Recorder(), tmp_path, packing=packing, ckpt_path=path, enable_checkpointing=False)
    assert resumed == uninterrupted[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")  # the resumed run continues in its folder
@pytest.mark.parametrize("when", ["validation", "epoch"])
def test_lightning_resumes_after_an_epoch(tmp_path, when):
    every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "epoch")
    uninterrupted = _fit(_Recorder(), tmp_path, every_epoch)
    resumed = _fit(_Recorder(), tmp_path, every_epoch, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed == uninterrupted[24:]
    assert len(resumed) == 12
