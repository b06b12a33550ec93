"""Certificates for tests, made by the openssl command."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")

PASSWORD = "hush"


def make_certificates(folder: Path) -> Path:
    """Makes files for TLS on 127.0.0.1.

    Args:
        folder: Gets cert.pem (signed by itself), its key.pem, locked.pem (the key under
            `PASSWORD`), both.pem, other.pem (another key) and empty.pem.

    Returns:
        The folder.
    """

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem",
            "-out", "cert.pem")  # fmt: skip
    openssl(
        "rsa", "-aes256", "-passout", f"pass:{PASSWORD}", "-in", "key.pem", "-out", "locked.pem"
    )
    openssl("genrsa", "-out", "other.pem", "2048")
    both = (folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes()
    (folder / "both.pem").write_bytes(both)
    (folder / "empty.pem").touch()
    return folder
