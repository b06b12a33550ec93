#!/usr/bin/python3 -I
"""Asks the server beside it how it is: exit code 0 if it answers 200, else 1 and one line.

``headlong-probe /health`` is the image's health check. ``headlong-probe /ready`` is for
orchestrators: ``/ready`` needs an API key where the server has one, which an HTTP probe cannot read
from a secret. The first key of the server's own settings is sent; a client certificate is not.
"""

import http.client
import os
import ssl
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 4.0
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


def first_key(environment: Mapping[str, str]) -> str | None:
    """Finds a key that the server knows.

    Raises:
        OSError: The file of keys cannot be read.
    """
    if keys := environment.get("HEADLONG_API_KEY"):
        return keys.split(",")[0]
    if not (name := environment.get("HEADLONG_API_KEY_FILE")):
        return None
    for line in Path(name).read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            # NAME:KEY, or NAME: "KEY" in a YAML mapping.
            return text.partition(":")[2].strip().strip("'\"")
    return None


def probe_request(path: str, environment: Mapping[str, str]) -> urllib.request.Request:
    """Makes the request: where the server listens, and the key, are read from its variables."""
    host = environment.get("HEADLONG_HOST", "127.0.0.1")
    host = EVERYWHERE.get(host, f"[{host}]" if ":" in host else host)
    scheme = "https" if environment.get("HEADLONG_SSL_CERTFILE") else "http"
    request = urllib.request.Request(
        f"{scheme}://{host}:{environment.get('HEADLONG_PORT', '8000')}{path}"
    )
    if key := first_key(environment):
        request.add_header("Authorization", f"Bearer {key}")
    return request


def main() -> None:
    """Asks, and ends with the answer."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/health"
    # The certificate names the server as clients know it, and not the loopback address.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # A proxy that the container is given for downloads is none for this.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(probe_request(path, os.environ), timeout=TIMEOUT_S):
            return
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(f"headlong-probe: {path}: {error}")


if __name__ == "__main__":
    main()
