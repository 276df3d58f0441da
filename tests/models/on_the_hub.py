"""Plays a hub on this machine, and tells as JSON what LanguageModel made of its answers. Run by test_hub.py."""

import http.server
import json
import os
import threading
import time
import traceback

ANSWERS = {
    "unknown": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "no-revision": (404, "RevisionNotFound"),
    "no-config": (404, "EntryNotFound"),
    "ill": (503, ""),
}
requests = []


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        requests.append(self.path)
        name = self.path.split("/")[2]
        if name not in ANSWERS:  # hangs up without a word
            return
        status, code = ANSWERS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

from nnsight import LanguageModel  # noqa: E402


def told(name, **options):
    requests.clear()
    start, error = time.monotonic(), None
    try:
        LanguageModel(name, dispatch=True, **options).trace("Rome", trace=False)
    except Exception as met:  # noqa: BLE001 - whatever it is, the test reads its name
        error = met
    return {
        "error": None if error is None else type(error).__name__,
        "text": str(error),
        "cause": None if error is None or error.__cause__ is None else type(error.__cause__).__name__,
        "lines": 0 if error is None else len(traceback.format_exception(error)),
        "requests": sum(name in path for path in requests),  # the client has one of its own, the first time
        "seconds": time.monotonic() - start,
    }


names = [f"tiny/{name}" for name in [*ANSWERS, "silent", "cached"]]
print(json.dumps({name: told(name) for name in names} | {"offline": told("tiny/x", local_files_only=True)}))
