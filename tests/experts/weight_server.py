"""A local server of weights: ranges, broken connections, redirects, and the hub's headers."""

import contextlib
import http.server
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """The served files, and simulated failures.

    Attributes:
      files: path to content.
      etag: of every file; '' sends none.
      break_after: bytes after which a connection ends, once each; emptied as they are used.
      redirect: path to the address that it redirects to.
      status: code that every request gets instead, 0 for none.
      length: whether Content-Length is sent.
      requests: (method, path, Range) of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.redirect, self.requests, self.break_after = {}, {}, [], []
        self.etag, self.status, self.length = '"v1"', 0, True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, body):
        server, wanted = self.server, self.headers.get("Range", "")
        server.requests.append((self.command, self.path, wanted))
        if self.path in server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.status or self.path not in server.files:
            self.send_error(server.status or 404)
            return
        content, start = server.files[self.path], 0
        if wanted and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        rest = content[start:]
        if server.break_after:
            rest = rest[: server.break_after.pop(0)]
        with contextlib.suppress(OSError):
            self.wfile.write(rest)
            self.wfile.flush()
        self.close_connection = True


@contextlib.contextmanager
def serving():
    """A running server."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
