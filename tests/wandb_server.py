"""A server that speaks enough of W&B's protocol to take a run: its GraphQL calls, its stream of rows, its files.

What it was sent can be looked at. It may also misbehave: answer with an error, stall, or die.
"""

import gzip
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mood = Literal["well", "stalling", "failing"]
ENTITY = "team"


class WandbServer:
    """What runs have sent."""

    def __init__(self) -> None:
        self.mood: Mood = "well"
        self.released = threading.Event()
        self.buckets: dict[str, dict[str, Any]] = {}
        """The last `upsertBucket` of each run id, its fields merged."""
        self.streams: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        """Lines by run id, file and number."""
        self.files: dict[str, bytes] = {}
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.authorizations: set[str] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._http.block_on_close = False
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """Rows of a run in their order."""
        lines = self.streams[run_id]["wandb-history.jsonl"]
        return [json.loads(lines[number]) for number in sorted(lines)]

    def summary(self, run_id: str) -> dict[str, Any]:
        """The run's summary as of now."""
        lines = self.streams[run_id]["wandb-summary.json"]
        return json.loads(lines[max(lines)]) if lines else {}

    def config(self, run_id: str) -> dict[str, Any]:
        """The run's config without W&B's own part."""
        found = json.loads(self.buckets[run_id]["config"])
        return {key: entry["value"] for key, entry in found.items() if key != "_wandb"}

    def die(self) -> None:
        """Stop listening, and break what is open."""
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def graphql(self, name: str, variables: dict[str, Any], query: str) -> dict[str, Any]:
        """The answer to one call."""
        self.calls.append(name)
        project = {
            "id": "UA==",
            "name": variables.get("project") or "evenkeel",
            "entity": {"id": "RQ==", "name": ENTITY},
        }
        if name == "Viewer":
            return {
                "viewer": {
                    "id": "VQ==",
                    "entity": ENTITY,
                    "username": "u",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._resumable(variables["name"])}}
        if name == "UpsertBucket":
            run_id = variables["name"]
            inserted = run_id not in self.buckets
            given = {key: value for key, value in variables.items() if value is not None}
            self.buckets[run_id] = {**self.buckets.get(run_id, {}), **given}
            bucket = {
                "id": "UnVu", "name": run_id, "displayName": given.get("displayName"), "sweepName": None,
                "project": project, "historyLineCount": len(self.streams[run_id]["wandb-history.jsonl"]),
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if name == "CreateRunFiles":
            names = variables["files"]
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{variables['run']}/{file}"} for file in names]
            return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
        if name == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "ArtifactType":
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":
            latest = {"id": "QQ==", "versionIndex": 0}
            artifact = {
                "id": "QQ==",
                "digest": "",
                "state": "COMMITTED",
                "artifactSequence": {"id": "UQ==", "latestArtifact": latest},
            }
            return {"createArtifact": {"artifact": artifact}}  # "we have this one already"
        if "upsertView" in query:
            self.views.append(variables)
            return {
                "upsertView": {"view": {"id": "Vmlldzox", "name": "nw-abc-v", "type": "project-view"}, "inserted": True}
            }
        return {}

    def _resumable(self, run_id: str) -> dict[str, Any] | None:
        if run_id not in self.buckets:
            return None
        history = [json.dumps(row) for row in self.history(run_id)]
        return {
            "id": "UnVu", "name": run_id, "displayName": run_id, "logLineCount": 0, "eventsLineCount": 0,
            "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]), "eventsTail": "[]",
            "summaryMetrics": json.dumps(self.summary(run_id)), "config": self.buckets[run_id].get("config", "{}"),
            "tags": self.buckets[run_id].get("tags", []), "notes": None, "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # W&B leaves without a word
                super().handle()

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            server.files[self.path.removeprefix("/upload/")] = self._body()
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            server.authorizations.add(self.headers.get("Authorization", ""))
            if self.path.endswith("/graphql"):
                request = json.loads(body)
                name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                self._answer(
                    {"data": server.graphql(name[1] if name else "", request.get("variables") or {}, request["query"])}
                )
            elif stream := re.search(r"/([^/]+)/file_stream$", self.path):
                for file, part in (json.loads(body).get("files") or {}).items():
                    lines = server.streams[stream[1]][file]
                    lines.update(enumerate(part["content"], start=part["offset"]))
                self._answer({})
            else:
                self._answer({})

        def _body(self) -> bytes:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

        def _answer(self, value: dict[str, Any]) -> None:
            if server.mood == "stalling":
                server.released.wait(120)
                self.close_connection = True
                return
            text = json.dumps(value).encode()
            self.send_response(500 if server.mood == "failing" else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server for the time of a test."""
    server = WandbServer()
    try:
        yield server
    finally:
        server.die()
