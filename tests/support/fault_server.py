"""``headlong serve`` with faults, its settings as JSON on standard input.

What the command line offers is all that an operator may ask for, so that a test that needs more
puts the same pieces together here.
"""

import json
import socket
import sys

from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.faults import Faults
from headlong.server.engine_process import EngineProcess
from headlong.server.listen import bind, listen
from headlong.server.telemetry.logs import log_config


def main() -> int:
    settings = json.load(sys.stdin)
    config = ServerConfig(served_model_name=("demo",), port=0, **settings["server"])
    with bind(config.host, config.port) as sock:
        # Connections inherit it: a client that does not read is then felt after a few chunks.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        process = EngineProcess(
            EngineConfig(**settings["engine"]), log_config(config), Faults(**settings["faults"])
        )
        engine = AsyncEngine(
            process,
            max_num_queued_reqs=config.max_num_queued_reqs,
            hang_timeout=config.hang_timeout,
        )
        return listen(create_app(engine, config), engine, sock, config)


if __name__ == "__main__":
    sys.exit(main())
