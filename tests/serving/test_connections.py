"""Who connects and sends nothing, or half of something, keeps nobody else waiting."""

import contextlib
import socket
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lora_dpo.serving import connections, http
from lora_dpo.serving.address import listen

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"


arrived = threading.Event()


async def answer(request):
    await request.body()
    if request.query_params:
        arrived.set()
    await anyio_sleep(request.query_params.get("seconds", "0"))
    return PlainTextResponse("fine")


async def anyio_sleep(seconds):
    import anyio

    await anyio.sleep(float(seconds))


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_TIME", 0.3)
    monkeypatch.setattr(connections, "SILENCE", 0.3)
    arrived.clear()
    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
    server = connections.Server(connections.server_config(app, lifespan="off"))
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        yield sock.getsockname()[1]
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def served_by_the_command(app, sock):
    """As `lora-dpo serve` does, which ends at a signal alone."""
    host = SimpleNamespace(stop_answering=lambda: None)
    thread = threading.Thread(target=http.run, args=(app, sock, host), daemon=True)
    thread.start()
    yield lambda: thread.join(20)


@contextlib.contextmanager
def served_as_the_demo(app, sock):
    http_server = pytest.importorskip("gradio.http_server")
    from lora_dpo.demo.server import serving_on

    with serving_on(sock, "127.0.0.1"):
        *_, server = http_server.start_server(app)
    yield server.close


@contextlib.contextmanager
def connected(port, sent=b""):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as found:
        found.sendall(sent)
        yield found


def ended(connection):
    """Whether the other side ended it, without a word."""
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


def answered(connection):
    found = b""
    while not found.endswith(b"fine") and (part := connection.recv(4096)):
        found += part
    return b"200 OK" in found and found.endswith(b"fine")


@pytest.mark.parametrize("served", [served_by_the_command, served_as_the_demo])
def test_serve_and_demo_wait_for_no_request_without_end(served, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_TIME", 0.3)
    begun = []
    startup = connections.Server.startup

    async def watched(self, sockets=None):
        begun.append(self)
        await startup(self, sockets)

    monkeypatch.setattr(connections.Server, "startup", watched)
    app = Starlette(routes=[Route("/", answer)])
    with listen("127.0.0.1", 0) as sock, served(app, sock) as close:
        with connected(sock.getsockname()[1], GET) as whole, connected(sock.getsockname()[1], b"GET /") as half:
            assert answered(whole)
            assert ended(half)
        [server] = begun
        server.should_exit = True
        close()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc", POST, POST + b"half"])
def test_what_is_no_whole_request_ends_in_time(port, sent):
    with connected(port, sent) as one:
        assert ended(one)


def test_a_head_that_comes_letter_by_letter_ends_too(port):
    with connected(port) as one:
        one.settimeout(0.05)
        for _ in range(400):  # 20 s against a hang
            try:
                one.sendall(b"G")
                assert one.recv(1) == b""
                return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    pytest.fail("it is still there")


def test_the_second_request_of_a_connection_has_an_end_as_well(port):
    with connected(port, GET) as one:
        assert answered(one)
        one.sendall(b"GET / HT")
        assert ended(one)


def test_an_answer_may_take_its_time(port):
    with connected(port, GET.replace(b"/ ", b"/?seconds=1 ")) as one:
        assert answered(one)


def test_of_too_many_the_one_that_has_waited_longest_goes(port, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_TIME", 600)
    monkeypatch.setattr(connections, "most_connections", lambda: 3)
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(connected(port, GET.replace(b"/ ", b"/?seconds=2 ")))
        assert arrived.wait(20)
        first, *others = (stack.enter_context(connected(port, b"GET")) for _ in range(5))
        assert ended(first)
        last = stack.enter_context(connected(port, GET))
        assert answered(last)
        assert answered(busy)  # who has sent a whole request stays
        assert ended(others[0])


HALF_OPEN = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from lora_dpo.serving.address import listen
    from lora_dpo.serving.connections import Server, server_config

    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("fine"))])
    with listen("127.0.0.1", 0) as sock:
        print(sock.getsockname()[1], flush=True)
        Server(server_config(app, lifespan="off")).run(sockets=[sock])
"""


def test_more_half_open_connections_than_files_leave_the_others_answered(tmp_path):
    resource = pytest.importorskip("resource")  # Windows has no such limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this process may not open that many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-c", textwrap.dedent(HALF_OPEN)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        port = int(server.stdout.readline())
        with contextlib.ExitStack() as stack:
            for number in range(1100):
                stack.enter_context(connected(port, b"GET / HTTP/1.1\r\n" if number % 2 else b""))
                if number % 100 == 99:
                    with connected(port, GET) as polite:
                        assert answered(polite)
            with connected(port, GET) as polite:
                assert answered(polite)
            assert server.poll() is None
        log.seek(0)
        assert len(log.read()) < 1000
    finally:
        server.kill()
        server.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_connection_that_cannot_be_taken_is_said_once(caplog):
    complain, said = connections._Complaints(), []

    class Loop:
        def default_exception_handler(self, context):
            said.append(context)

    for _ in range(100):
        complain(Loop(), {"exception": OSError(24, "Too many open files"), "message": "accept"})
    assert len(caplog.records) == 1
    assert "ulimit -n" in caplog.text
    complain(Loop(), {"exception": ValueError("a bug")})
    assert len(said) == 1
