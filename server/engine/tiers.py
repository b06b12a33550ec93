"""Opens what the cache keeps beyond the arena: memory of the host, and a folder."""

from dataclasses import dataclass
from pathlib import Path

from headlong.cache.arena import Arena
from headlong.cache.block_files import block_shapes
from headlong.cache.block_tiers import BlockTiers
from headlong.cache.disk_tier import DiskTier, prepare_folder
from headlong.cache.host_tier import HostTier
from headlong.cache.transfers import PinnedBuffer, make_mover
from headlong.kernels.layout import ArenaLayout
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OpenTiers:
    """Tiers, and the memory that they use."""

    blocks: BlockTiers
    buffer: PinnedBuffer

    def close(self) -> None:
        """End all copies, then let go of the memory."""
        self.blocks.close()
        self.buffer.close()


def open_tiers(config: EngineConfig, arena: Arena) -> OpenTiers | None:
    """Allocate the host's memory and open the folder.

    Args:
        config: Their sizes.
        arena: Where blocks come from.

    Returns:
        None if there are to be no tiers.

    Raises:
        ConfigError: A size is too small, there is no such memory, or the folder cannot be used.
    """
    if config.host_cache_bytes == 0:
        return None
    layout = arena.layout
    sizes = [layout.block_bytes(group) for group in range(layout.num_groups)]
    try:
        HostTier(config.host_cache_bytes, sizes)
    except ValueError as error:
        raise ConfigError(f"host_cache_bytes: {error}", "host_cache_bytes") from error
    disk = _open_disk(config, layout)
    try:
        buffer = PinnedBuffer(config.host_cache_bytes, pinned=arena.memory.device.type == "cuda")
    except MemoryError as error:
        if disk is not None:
            disk.close()
        raise ConfigError(f"host_cache_bytes: {error}", "host_cache_bytes") from error
    mover = make_mover(arena.memory, layout, buffer.memory)
    return OpenTiers(BlockTiers(layout, buffer.memory, mover, disk), buffer)


def _open_disk(config: EngineConfig, layout: ArenaLayout) -> DiskTier | None:
    if config.disk_cache_dir is None:
        return None
    shapes = block_shapes(layout)
    largest = max(shape.file_bytes for shape in shapes)
    if config.disk_cache_bytes < largest:
        raise ConfigError(
            f"disk_cache_bytes must hold a block of {largest} bytes, got {config.disk_cache_bytes}",
            "disk_cache_bytes",
        )
    try:
        return DiskTier(Path(config.disk_cache_dir), config.disk_cache_bytes, shapes)
    except OSError as error:
        raise _unusable(config, error) from error


def check_folder(config: EngineConfig) -> None:
    """See whether the folder can be used, before a model is loaded for minutes.

    Raises:
        ConfigError: It cannot.
    """
    if config.disk_cache_dir is None:
        return
    try:
        prepare_folder(Path(config.disk_cache_dir))
    except OSError as error:
        raise _unusable(config, error) from error


def _unusable(config: EngineConfig, error: OSError) -> ConfigError:
    why = error.strerror or error
    return ConfigError(
        f"disk_cache_dir: {config.disk_cache_dir!r} cannot be used: {why}", "disk_cache_dir"
    )
