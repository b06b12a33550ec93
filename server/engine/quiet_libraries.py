"""Imported for its effect: libraries that others import along do not warn of what is not used here.

transformers imports torchao wherever it is installed, and torchao warns of each of its kernels that
is not for this machine. It has to come before transformers.
"""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
