import pytest

from headlong.server.config import ServerConfig
from headlong.server.errors import ConfigError
from headlong.server.tls import check_tls, tls_options
from support.certificates import make_certificates, needs_openssl

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls"))


def config(files, **given):
    names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    return ServerConfig(
        **{name: files / each if name in names else each for name, each in given.items()}
    )


def test_without_tls_there_are_no_options():
    check_tls(ServerConfig())
    assert tls_options(ServerConfig()) == {}


@pytest.mark.parametrize(
    "given",
    [
        {"ssl_certfile": "both.pem"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem", "ssl_keyfile_password": "hush"},
        {"ssl_certfile": "both.pem", "ssl_ca_certs": "cert.pem"},
    ],
)
def test_what_works(files, given):
    check_tls(config(files, **given))
    assert set(tls_options(config(files, **given))) >= set(given)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"ssl_certfile": "none.pem"}, "ssl_certfile"),
        ({"ssl_certfile": "."}, "ssl_certfile"),
        ({"ssl_certfile": "empty.pem"}, "ssl_certfile"),
        ({"ssl_certfile": "cert.pem"}, "ssl_certfile"),
        ({"ssl_certfile": "key.pem"}, "ssl_certfile"),
        ({"ssl_certfile": "cert.pem", "ssl_keyfile": "none.pem"}, "ssl_keyfile"),
        ({"ssl_certfile": "cert.pem", "ssl_keyfile": "other.pem"}, "ssl_certfile"),
        ({"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem"}, "ssl_certfile"),
        (
            {"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem", "ssl_keyfile_password": "xx"},
            "ssl_certfile",
        ),
        ({"ssl_certfile": "both.pem", "ssl_ca_certs": "key.pem"}, "ssl_ca_certs"),
        ({"ssl_certfile": "both.pem", "ssl_ca_certs": "empty.pem"}, "ssl_ca_certs"),
    ],
)
def test_what_does_not_names_the_flag(files, given, param):
    with pytest.raises(ConfigError) as caught:
        check_tls(config(files, **given))
    assert caught.value.param == param
    assert ".pem" in str(caught.value) or "is no file" in str(caught.value)
    assert "hush" not in str(caught.value)
