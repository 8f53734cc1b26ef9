"""DeviceLoader and EpochSampler: what a batch holds for any rank, epoch and interruption."""

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from vision_kd.data.augment import identity, random_crop_flip
from vision_kd.data.loader import DeviceLoader, EpochSampler

# Lightning 2.6 calls a function that torch 2.15 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

COUNT = 50
IMAGES = torch.randint(1, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(COUNT)  # the label tells which image it is


def loader(batch_size=4, *, shuffle=True, drop_last=True, views=None, **options):
    views = {"weak": random_crop_flip} if views is None else views
    return DeviceLoader(IMAGES, LABELS, batch_size, views, shuffle=shuffle, drop_last=drop_last, **options)


def targets(batches):
    return [target.tolist() for _, target in batches]


def same(a, b):
    assert len(a) == len(b) > 0
    for (views_a, target_a), (views_b, target_b) in zip(a, b, strict=True):
        assert torch.equal(target_a, target_b)
        assert views_a.keys() == views_b.keys()
        assert all(torch.equal(views_a[name], views_b[name]) for name in views_a)


def test_validation_batches_are_the_images_in_order():
    batches = list(loader(7, shuffle=False, drop_last=False, views={"clean": identity}))
    assert [len(target) for _, target in batches] == [7] * 7 + [1]
    images = torch.cat([views["clean"] for views, _ in batches])
    assert images.dtype == torch.float32
    assert torch.equal(images, IMAGES.float() / 255)
    assert torch.equal(torch.cat([target for _, target in batches]), LABELS)


def test_an_epoch_holds_every_image_once_in_a_new_order():
    data = loader(4, drop_last=False)
    epochs = [torch.cat([target for _, target in data]).tolist() for _ in range(2)]
    assert len(data) == 13
    assert [sorted(epoch) for epoch in epochs] == [LABELS.tolist()] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != LABELS.tolist()


def test_drop_last_leaves_out_the_incomplete_batch():
    data = loader(4)
    assert len(data) == len(list(data)) == 12
    assert len({label for batch in targets(data) for label in batch}) == 48


def test_views_are_independent_and_weak_does_not_depend_on_strong():
    both = list(loader(views={"weak": random_crop_flip, "strong": random_crop_flip}))
    assert all(not torch.equal(views["weak"], views["strong"]) for views, _ in both)
    same([({"weak": views["weak"]}, target) for views, target in both], list(loader()))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_each_change_order_and_views(changed):
    first, second = loader(seed=0), loader(seed=changed.get("seed", 0))
    second.sampler.set_epoch(changed.get("epoch", 0))
    a, b = list(first), list(second)
    assert targets(a) != targets(b)

    def by_image(batches):
        return {label.item(): view for views, target in batches for label, view in zip(target, views["weak"])}  # noqa: B905

    views_a, views_b = by_image(a), by_image(b)
    assert any(not torch.equal(views_a[label], views_b[label]) for label in views_a.keys() & views_b.keys())


def test_a_chosen_epoch_equals_that_epoch_of_an_uninterrupted_run():
    uninterrupted = loader()
    epochs = [list(uninterrupted) for _ in range(4)]
    torch.manual_seed(99)  # the global state has no say
    resumed = loader()
    resumed.sampler.set_epoch(3)
    same(list(resumed), epochs[3])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_compose_the_global_batch(drop_last, world_size):
    whole = list(loader(4 * world_size, drop_last=drop_last))
    ranks = [list(loader(4, drop_last=drop_last, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    complete = COUNT // (4 * world_size)
    assert complete > 1
    for (views, target), *parts in list(zip(whole, *ranks, strict=True))[:complete]:
        for rank, (part_views, part_target) in enumerate(parts):
            assert torch.equal(part_target, target[rank::world_size])
            assert torch.equal(part_views["weak"], views["weak"][rank::world_size])


def test_ranks_wrap_around_to_equally_many_images():
    ranks = [
        [x for batch in targets(loader(4, drop_last=False, rank=r, world_size=3)) for x in batch] for r in range(3)
    ]
    assert [len(rank) for rank in ranks] == [17] * 3
    assert {x for rank in ranks for x in rank} == set(LABELS.tolist())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_validation_slices_cover_every_image_once(world_size):
    loaders = [loader(4, shuffle=False, drop_last=False, rank=r, world_size=world_size) for r in range(world_size)]
    assert [len(list(data)) for data in loaders] == [len(data) for data in loaders]
    seen = [label for data in loaders for batch in targets(data) for label in batch]
    assert sorted(seen) == LABELS.tolist()


def test_state_continues_inside_an_epoch():
    whole, interrupted, resumed = loader(), loader(), loader()
    for data in (whole, interrupted):
        data.sampler.set_epoch(2)
    expected = list(whole)
    batches = iter(interrupted)
    for _ in range(5):
        next(batches)
    resumed.load_state_dict(interrupted.state_dict())
    same(list(resumed), expected[5:])
    resumed.sampler.set_epoch(2)
    same(list(resumed), expected)  # the position is used once


def test_a_chosen_epoch_drops_the_stored_position():
    data = loader()
    data.load_state_dict(data.state_dict() | {"epoch": 2, "batch": 5})
    data.sampler.set_epoch(3)
    assert len(list(data)) == len(data)


def test_sampler_gives_a_dataloader_the_same_order_and_seeds():
    options = {"shuffle": True, "drop_last": True, "seed": 3, "rank": 1, "world_size": 2}
    sampler = EpochSampler(COUNT, 4, **options)
    pairs = [pair for batch in DataLoader(_Pairs(), 4, sampler=sampler, collate_fn=list) for pair in batch]
    order, seeds = EpochSampler(COUNT, 4, **options).rows()
    assert pairs == list(zip(order.tolist(), seeds[0].tolist(), strict=True))
    assert [row for row, _ in pairs] == [x for batch in targets(loader(**{**options, "batch_size": 4})) for x in batch]


class _Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, pair):
        return pair


def test_too_few_images_name_the_setting():
    message = r"data\.batch_size 26: the 50 training images do not fill .* of 2 processes; lower it to at most 25"
    with pytest.raises(ValueError, match=message):
        loader(26, world_size=2)


@pytest.mark.parametrize(("images", "labels"), [(IMAGES.float(), LABELS), (IMAGES, LABELS[1:]), (IMAGES[0], LABELS)])
def test_wrong_tensors_are_refused(images, labels):
    with pytest.raises(ValueError, match="images must be uint8"):
        DeviceLoader(images, labels, 4, {"weak": identity}, shuffle=True, drop_last=True)


class _Recorder(LightningModule):
    """Remembers the targets of every training batch by epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        views, target = batch
        self.seen.append((self.trainer.current_epoch, batch_idx, target.tolist(), views["weak"].sum().item()))
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


def _trainer(folder, *callbacks, **options):
    return Trainer(
        max_epochs=3,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _every_epoch(folder):
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def _loaders():
    return loader(), loader(7, shuffle=False, drop_last=False)


@pytest.fixture
def uninterrupted(tmp_path):
    model = _Recorder()
    _trainer(tmp_path, _every_epoch(tmp_path)).fit(model, *_loaders())
    return model.seen


@pytest.mark.parametrize("step", [5, 17])
def test_lightning_resumes_inside_an_epoch(tmp_path, uninterrupted, step):
    path = tmp_path / "inside.ckpt"
    with pytest.raises(KeyError, match="killed"):
        _trainer(tmp_path, _StopAt(step, path), enable_checkpointing=False).fit(_Recorder(), *_loaders())
    model = _Recorder()
    _trainer(tmp_path, enable_checkpointing=False).fit(model, *_loaders(), ckpt_path=path, weights_only=False)
    assert model.seen == uninterrupted[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")  # the resumed run continues in its folder
def test_lightning_resumes_after_an_epoch(tmp_path, uninterrupted):
    model = _Recorder()
    path = tmp_path / "epoch=1.ckpt"
    _trainer(tmp_path, _every_epoch(tmp_path)).fit(model, *_loaders(), ckpt_path=path, weights_only=False)
    assert model.seen == uninterrupted[24:]
    assert [row[2] for row in uninterrupted[:12]] != [row[2] for row in uninterrupted[12:24]]
