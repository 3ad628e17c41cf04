"""An endpoint of our own on 127.0.0.1 that answers like a captioner, or fails as it is told."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
import PIL.Image


class Server:
    """Answers with what `script` holds, a (status, headers) an entry, then with captions.

    What is in `bodies` is said instead of captions, as it is.
    """

    def __init__(self):
        self.script, self.requests, self.times, self.bodies = [], [], [], []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.times.append(time.monotonic())
                server.requests.append((self.path, dict(self.headers), body))
                status, headers = server.script.pop(0) if server.script else (200, {})
                if status == "hang up":
                    self.close_connection = True
                    return
                answer = {"choices": [{"message": {"content": f" caption {self.image(body)} "}}]}
                data = json.dumps(answer if status == 200 else {"error": "no"}).encode()
                if server.bodies:
                    data = server.bodies.pop(0)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            @staticmethod
            def image(body):
                url = body["messages"][0]["content"][1]["image_url"]["url"]
                file = io.BytesIO(base64.b64decode(url.split(",")[1]))
                return np.asarray(PIL.Image.open(file))[0, 0, 0]

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def stop(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def caption_server():
    """A running server."""
    server = Server()
    try:
        yield server
    finally:
        server.stop()
