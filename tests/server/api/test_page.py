import re

import pytest

from headlong.server.api.routes_page import PAGE_DIR, PAGE_FILES, SECURITY_HEADERS

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.mark.parametrize(("path", "expected"), PAGE_FILES.items())
def test_every_file_is_served_with_its_type_and_headers(client, path, expected):
    name, media_type = expected
    response = client.get(path)
    assert response.status_code == 200
    assert response.content == (PAGE_DIR / name).read_bytes()
    assert response.headers["content-type"] == media_type
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"


def test_all_files_of_the_page_are_served_and_no_others():
    assert sorted(name for name, _ in PAGE_FILES.values()) == sorted(
        file.name for file in PAGE_DIR.iterdir()
    )


def test_a_browser_gets_a_file_once(client):
    etag = client.get("/").headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = client.get("/", headers={"if-none-match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
        for name, value in SECURITY_HEADERS.items():
            assert response.headers[name] == value
    for other in ('"other"', etag.strip('"'), ""):
        assert client.get("/", headers={"if-none-match": other}).status_code == 200
    assert client.get("/page/main.js").headers["etag"] != etag


def test_head_is_answered_without_a_body(client):
    response = client.head("/")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(client.get("/").content))


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/index.html",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e%2fapp.py",
        "/page/main.js/",
        "/page/main.js%00",
        "/page//etc/passwd",
        "/server/app.py",
        "//page/main.js",
    ],
)
def test_nothing_else_is_served(client, path):
    response = client.get(path, follow_redirects=False)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_the_page_is_only_read(client, method):
    assert client.request(method, "/").status_code == 405


def test_the_page_is_no_part_of_the_api(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert [path for path in paths if path in PAGE_FILES] == []


@pytest.mark.parametrize("name", sorted(name for name, _ in PAGE_FILES.values()))
def test_nothing_comes_from_elsewhere_and_nothing_is_parsed_as_html(name):
    text = (PAGE_DIR / name).read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                   "Function(", "DOMParser", "createContextualFragment"):  # fmt: skip
        assert unsafe not in text
    # What the policy forbids would fail without a word.
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=", text)
    assert "<style" not in text
    assert not re.search(r"<script(?![^>]*\ssrc=)", text)


def test_scripts_import_files_that_are_served():
    served = set(PAGE_FILES)
    for name in (name for name, _ in PAGE_FILES.values() if name.endswith(".js")):
        text = (PAGE_DIR / name).read_text(encoding="utf-8")
        imported = set(re.findall(r'from "\./([\w.]+)"', text))
        assert {f"/page/{each}" for each in imported} <= served
    page = (PAGE_DIR / "index.html").read_text(encoding="utf-8")
    assert {f"/{each}" for each in re.findall(r'(?:src|href)="([^"]+)"', page)} <= served


def test_scripts_ask_for_elements_that_the_page_has():
    page = (PAGE_DIR / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    asked = {
        each
        for name, _ in PAGE_FILES.values()
        if name.endswith(".js")
        for each in re.findall(r'byId\("([^"]+)"\)', (PAGE_DIR / name).read_text(encoding="utf-8"))
    }
    assert asked
    assert asked <= set(ids)
