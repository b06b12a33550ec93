"""Several ranks as one: what rank 0 computes, the others are told to compute at the same time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from headlong.cache.block_copy import BlockCopy
from headlong.kernels.batch import AttentionBatch
from headlong.server.engine.device import is_out_of_memory
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.follower_link import REAP_TIMEOUT_S, FollowerLink, OnDeath
from headlong.server.engine.messages import encode
from headlong.server.engine.model import LoadedModel
from headlong.server.engine.process_group import leave_group
from headlong.server.engine.rank_loading import OpenedModel, load_share, open_cut
from headlong.server.engine.rank_messages import CopyBlocks, Forward, RankCommand, Stage
from headlong.server.engine.runner import LocalRunner
from headlong.server.engine.tensor_parallel import check_num_ranks
from headlong.server.engine.weights import first_line
from headlong.server.errors import EngineDeadError, HeadlongError


class Ranks:
    """Rank 0 with all others, which are processes of this machine.

    What a rank cannot do ends all of them: the ranks wait for each other inside the model's layers,
    and there is no way back from there. Block tables and plans are the same on every rank, so one
    message a step is all that they need.

    Args:
        config: Its `tensor_parallel_size` is 2 or more.
        on_death: Called on another thread when a rank ends unasked, at which time this rank may be
            waiting for it inside a collective; by default the step that runs then, or the next one,
            raises.

    Raises:
        ConfigError: The model cannot have so many ranks.
    """

    def __init__(self, config: EngineConfig, on_death: OnDeath | None = None) -> None:
        check_num_ranks(config)
        self._config = config
        self._links: list[FollowerLink] = []
        self._folder = TemporaryDirectory(prefix="headlong-ranks-")
        self._store = Path(self._folder.name) / "store"
        self._runner: LocalRunner | None = None
        try:
            for rank in range(1, config.tensor_parallel_size):
                self._links.append(FollowerLink(config, rank, self._store, on_death))
        except BaseException:
            self.close(by_force=True)
            raise

    @property
    def model(self) -> LoadedModel:
        """Rank 0's part of the model."""
        return self._local.model

    @property
    def _local(self) -> LocalRunner:
        assert self._runner is not None, "opened before"
        return self._runner

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of the other ranks."""
        return tuple(link.pid for link in self._links)

    def open(self) -> OpenedModel:
        """Load the model, size the cache, and allocate every rank's part of both.

        Raises:
            ConfigError: The model cannot be loaded or cut as asked, or the profile or the memory of
                a rank do not allow it.
            HeadlongError: A rank failed to start for another reason.
        """
        # The other ranks do the same meanwhile; they meet once each has got so far.
        model = load_share(self._config, 0)
        self._wait("loaded")
        with self._blaming():
            opened = open_cut(self._config, model, self._store)
        self._wait("opened")
        # They have met: a rank that is killed from here on leaves no file behind.
        self._folder.cleanup()
        self._runner = opened.runner
        return opened

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """As `Runner.forward`, on all ranks; the logits are rank 0's.

        Raises:
            HeadlongError: A rank has ended, or could not compute its part: none will compute again.
        """
        self._tell(Forward.of(token_ids, positions, batch, rows))
        with self._blaming():
            return self._local.forward(token_ids, positions, batch, rows)

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """As `Runner.copy_blocks`, on all ranks.

        Raises:
            HeadlongError: A rank has ended.
        """
        same = list(copies)
        if same:
            self._tell(CopyBlocks(same))
            self._local.copy_blocks(same)

    def close(self, *, by_force: bool = False) -> None:
        """End the other ranks.

        Args:
            by_force: Without letting them finish what they compute.
        """
        for link in self._links:
            if by_force:
                link.kill()
            else:
                link.stop()
        for link in () if by_force else self._links:
            link.close()
        self._links.clear()
        leave_group()
        self._folder.cleanup()

    def _tell(self, command: RankCommand) -> None:
        frame = encode(command)
        for link in self._links:
            link.send(frame)

    def _wait(self, stage: Stage) -> None:
        for link in self._links:
            link.wait(stage)

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Say which rank it was, when something fails that all ranks do together."""
        try:
            yield
        except HeadlongError:
            raise
        except Exception as error:
            deaths = [link.death(REAP_TIMEOUT_S / len(self._links)) for link in self._links]
            for link in self._links:
                # It may wait for this rank inside a collective, for ever.
                link.kill()
            for death in filter(None, deaths):
                raise death from error
            what = "has no memory for its part" if is_out_of_memory(error) else "failed"
            raise EngineDeadError(f"rank 0 {what}: {first_line(error)}") from error
