"""Loaders that can go on inside an epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from kd_common.errors import UserError


class ResumableLoader(ABC):
    """Batches of an epoch that is a function of its number, from any of them on.

    Iterating to the end moves on to the next epoch; `sampler.set_epoch`, which Lightning calls, chooses one.
    `state_dict` lets a run that stopped inside an epoch continue at its next batch.
    """

    batch_sampler: Any = None  # Lightning reads it next to `sampler`
    sampler: Any
    _delivered = 0
    _resume: dict[str, Any] = {}  # noqa: RUF012  (replaced, never changed)

    @abstractmethod
    def batches(self, first: int) -> Iterator[Any]:
        """Yield the batches of the chosen epoch from one of them on."""

    @abstractmethod
    def sample(self, count: int) -> Any:
        """Return a batch of only a few rows, made in this process."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of all that decides which rows a batch of a given number holds."""

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches delivered so far, and what they are cut from."""
        return {"epoch": self.sampler.epoch, "batch": self._delivered, "data": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stored epoch behind its last delivered batch; choosing another epoch starts that one anew.

        An epoch that was `finished`, all of it or as much as the trainer asks for, has no batches left.

        Raises:
            UserError: If the state lies inside an epoch of other data, batch size, seed or number of processes.
        """
        if state["batch"] and not state.get("finished") and state["data"] != self.fingerprint():
            raise UserError(
                f"the checkpoint was written {state['batch']} batches into epoch {state['epoch']} with other data, "
                "batch size, packing, seed or number of processes: resume with the same ones, or from a checkpoint "
                "written at the end of an epoch"
            )
        self.sampler.set_epoch(state["epoch"])
        self._resume = dict(state)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing is drawn before the first batch is asked for, hence after Lightning has set the epoch.
        epoch = self.sampler.epoch
        resume, self._resume = self._resume, {}
        here = resume.get("epoch") == epoch
        self._delivered = resume["batch"] if here else 0
        if not (here and resume.get("finished")):
            for batch in self.batches(self._delivered):
                self._delivered += 1
                yield batch
        self.sampler.set_epoch(epoch + 1)
        self._delivered = 0


class WorkerLoader(ResumableLoader, DataLoader):  # type: ignore[misc]  # two ways to iterate, the first of which wins
    """A `DataLoader`, with worker processes or without, that can go on inside an epoch.

    Its sampler is a function of its `epoch`, and starts at its row `first` once.
    """

    def batches(self, first: int) -> Iterator[Any]:
        """Yield the batches of the chosen epoch from one of them on; those before are not even read."""
        self.sampler.first = first * (self.batch_size or 1)
        yield from DataLoader.__iter__(self)

    def sample(self, count: int) -> Any:
        """Return a batch of a few rows, made in this process."""
        return self.collate_fn([self.dataset[row] for row in islice(self.sampler, count)])

    def fingerprint(self) -> str:
        """Return a digest of dataset size, sampler and batch size."""
        return repr((len(self.dataset), self.batch_size, vars(self.sampler)["num_replicas"], self.sampler.seed))  # type: ignore[arg-type]
