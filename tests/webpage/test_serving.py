"""The page as it is served: on this machine alone, with no way to other files, and nothing from elsewhere."""

import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import reftheads as rh

pytest.importorskip("gradio", reason="needs the extra demo: Gradio")


@pytest.fixture
def served(model, words, demonstrations, tmp_path):
    page = rh.page(
        model, words, demonstrations=demonstrations, directory=tmp_path, prevent_thread_lock=True, quiet=True
    )
    yield page
    page.close()


def status(url: str, data: bytes | None = None, **headers: str) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_is_served_here_alone_and_nothing_is_shared(served):
    assert served.local_url.startswith("http://127.0.0.1:")
    assert served.share_url is None and not served.share
    assert served.server.config.host == "127.0.0.1"
    assert not served.analytics_enabled and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert served.allowed_paths == [] and not served.run_history
    assert served.max_threads == 8 and served._queue.max_size == 32


def test_no_file_is_served_and_none_is_taken(served, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (secret.parent / "mine").mkdir()
    for path in (secret, "/etc/passwd", "../../etc/passwd", os.path.join(os.getcwd(), "pyproject.toml"), "README.md"):
        assert status(f"{served.local_url}gradio_api/file={path}") in (403, 404), path
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
    assert (
        status(f"{served.local_url}gradio_api/upload", form, **{"Content-Type": "multipart/form-data; boundary=x"})
        == 413
    )
    assert status(f"{served.local_url}gradio_api/proxy=http://example.org/") in (400, 403, 404)


def test_the_page_names_nothing_that_is_called_from_outside(served):
    described = served.get_api_info()
    assert not described["named_endpoints"] and not described["unnamed_endpoints"]


def test_a_second_page_takes_the_next_port(served, model, words, tmp_path):
    other = rh.page(model, words, directory=tmp_path, prevent_thread_lock=True, quiet=True)
    assert other.local_url != served.local_url
    other.close()


def test_a_model_without_a_graph_is_refused_before_anything_is_served(words):
    with pytest.raises(ValueError, match="needs an InterventionModel"):
        rh.page(rh.load_base("tiny-chat")[0], words)


def test_without_gradio_the_error_says_what_to_install(model, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio.themes", None)
    with pytest.raises(ImportError, match=r"rh.page needs Gradio: pip install 'reftheads\[demo\]'"):
        rh.page(model, words)


@pytest.mark.slow
def test_gradio_is_imported_when_a_page_is_made_and_not_before():
    code = "import sys, reftheads as rh; rh.page; from reftheads.webpage import Session; print('gradio' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
