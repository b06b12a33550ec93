"""Which salt prefixes were computed under."""

from collections import OrderedDict

from headlong.cache.prefix_keys import PrefixKeys

REMEMBERED_PREFIXES = 4096
"""First blocks whose salt is remembered, to tell a miss that a salt explains."""


class Salts:
    """The salt that each prefix was seen with last."""

    def __init__(self) -> None:
        # By the first block of the prefix without its salt.
        self._last: OrderedDict[bytes, str] = OrderedDict()

    def note(self, keys: PrefixKeys) -> None:
        """Remember the salt of a prefix."""
        if keys.first_unsalted is None:
            return
        self._last[keys.first_unsalted] = keys.salt
        self._last.move_to_end(keys.first_unsalted)
        if len(self._last) > REMEMBERED_PREFIXES:
            self._last.popitem(last=False)

    def is_other(self, keys: PrefixKeys) -> bool:
        """Whether the prefix was seen last with another salt."""
        if keys.first_unsalted is None:
            return False
        return self._last.get(keys.first_unsalted, keys.salt) != keys.salt
