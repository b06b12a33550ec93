"""Where a token lies, by the rule that `GroupBatch` states for kernels."""

from headlong.cache.block_table import BlockTable


def slot(table: BlockTable, position: int) -> int:
    """block * block_size + offset of a token whose block the table still owns."""
    logical, offset = divmod(position, table.block_size)
    block = table.find(logical)
    assert block is not None, f"the block of token {position} was given back or does not exist"
    return block * table.block_size + offset
