"""TLS: what uvicorn is told, and whether it can work with that."""

import ssl
from typing import Any

from headlong.server.config import ServerConfig
from headlong.server.errors import ConfigError


def tls_options(config: ServerConfig) -> dict[str, Any]:
    """Returns uvicorn's arguments for TLS; none without a certificate."""
    if config.ssl_certfile is None:
        return {}
    options: dict[str, Any] = {"ssl_certfile": config.ssl_certfile}
    if config.ssl_keyfile is not None:
        options["ssl_keyfile"] = config.ssl_keyfile
    if config.ssl_keyfile_password is not None:
        options["ssl_keyfile_password"] = config.ssl_keyfile_password.get_secret_value()
    if config.ssl_ca_certs is not None:
        options |= {"ssl_ca_certs": str(config.ssl_ca_certs), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def check_tls(config: ServerConfig) -> None:
    """Reads certificate and key, before anything slow is done.

    Raises:
        ConfigError: One of them cannot be used; `param` names it.
    """
    if config.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    password = config.ssl_keyfile_password
    for name, file in (
        ("ssl_certfile", config.ssl_certfile),
        ("ssl_keyfile", config.ssl_keyfile),
        ("ssl_ca_certs", config.ssl_ca_certs),
    ):
        if file is not None and not file.is_file():
            raise ConfigError(f"{file} is no file", name)
    try:
        context.load_cert_chain(
            config.ssl_certfile,
            config.ssl_keyfile,
            # Without one OpenSSL would ask on the terminal.
            password="" if password is None else password.get_secret_value(),
        )
    except (OSError, ValueError) as error:
        files = " with ".join(
            str(each) for each in (config.ssl_certfile, config.ssl_keyfile) if each
        )
        raise ConfigError(f"cannot use {files}: {_reason(error)}", "ssl_certfile") from error
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except OSError as error:
            message = f"cannot use {config.ssl_ca_certs}: {_reason(error)}"
            raise ConfigError(message, "ssl_ca_certs") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)
