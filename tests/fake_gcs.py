"""A server that answers as Google Cloud Storage does, as far as gcsfs, TensorStore and Google's client ask.

Written after the documentation of the JSON API (https://cloud.google.com/storage/docs/json_api/v1). Objects are whole
or not there, and nothing is a folder.
"""
import base64
import hashlib
import json
import re
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"


class FakeGCS(ThreadingHTTPServer):
    """`objects` are (bytes, generation) by name. Start it with `with`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.uploads, self.generation, self.lock = {}, {}, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):      # a client that has what it wanted hangs up
            super().handle_error(request, client_address)

    def put(self, name, data):
        """Writes an object."""
        with self.lock:
            self.generation += 1
            self.objects[name] = data, self.generation
        return self.about(name)

    def about(self, name):
        """The resource of an object."""
        data, generation = self.objects[name]
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return {"kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(data)), "md5Hash": digest,
                "generation": str(generation), "metageneration": "1", "contentType": "application/octet-stream",
                "updated": "2026-01-02T03:04:05.000Z", "timeCreated": "2026-01-02T03:04:05.000Z", "etag": digest}

    def listed(self, prefix, delimiter, start, end):
        """Names below a prefix, and the folders that a delimiter makes of them."""
        with self.lock:
            names = sorted(name for name in self.objects if name.startswith(prefix) and name >= start
                           and (not end or name < end))
        if not delimiter:
            return [self.about(name) for name in names], []
        rest = {name: name[len(prefix):].partition(delimiter) for name in names}
        folders = sorted({prefix + first + sign for first, sign, _ in rest.values() if sign})
        return [self.about(name) for name in names if not rest[name][1]], folders


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *about):
        pass

    def _answer(self, status, body=b"", **headers):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _asked(self):
        parsed = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(parsed.query, keep_blank_values=True).items()}
        path = re.sub("^(/upload|/download)?/storage/v1/", "", parsed.path)
        _, _, name = path.partition("/o/")
        return path, urllib.parse.unquote(name), query

    def do_GET(self):
        path, name, query = self._asked()
        if name:
            self._object(name, query)
        elif path.rstrip("/").endswith("/o"):
            items, folders = self.server.listed(query.get("prefix", ""), query.get("delimiter", ""),
                                                query.get("startOffset", ""), query.get("endOffset", ""))
            self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": folders})
        elif path == f"b/{BUCKET}":
            self._answer(200, {"kind": "storage#bucket", "id": BUCKET, "name": BUCKET, "locationType": "region"})
        else:
            self._answer(404, {"error": {"code": 404, "message": f"{path} not found"}})

    def _object(self, name, query):
        if name not in self.server.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        data, generation = self.server.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412, {"error": {"code": 412, "message": "generation"}})
        if query.get("alt") != "media":
            return self._answer(200, self.server.about(name))
        headers = {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not ranged:
            return self._answer(200, data, **headers)
        first, last = int(ranged[1]), min(int(ranged[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            return self._answer(416)
        return self._answer(206, data[first:last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)

    def do_POST(self):
        path, name, query = self._asked()
        body = self._body()
        if "upload_id" in query:
            return self._chunk(query["upload_id"], body)
        if "/rewriteTo/" in name or "/copyTo/" in name:
            source, target = re.split(r"/(?:rewriteTo|copyTo)/b/[^/]+/o/", name)
            done = self.server.put(target, self.server.objects[source][0])
            return self._answer(200, done if "/copyTo/" in name else {"done": True, "resource": done})
        kind, name = query["uploadType"], query.get("name")
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            key = str(len(self.server.uploads))
            self.server.uploads[key] = name, b""
            return self._answer(200, Location=f"{self.server.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={key}")
        if kind == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = body.split(b"--" + boundary)[1:3]
            line = b"\r\n" if b"\r\n" in about else b"\n"
            name = json.loads(about.partition(2 * line)[2])["name"]
            body = data.partition(2 * line)[2].removesuffix(line)
        return self._write(name, body, query)

    def _write(self, name, data, query):
        _, generation = self.server.objects.get(name, (b"", 0))
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412, {"error": {"code": 412, "message": "generation"}})
        return self._answer(200, self.server.put(name, data))

    def do_PUT(self):
        _, _, query = self._asked()
        self._chunk(query["upload_id"], self._body())

    def _chunk(self, key, body):
        name, before = self.server.uploads[key]
        whole = before + body
        self.server.uploads[key] = name, whole
        if self.headers.get("Content-Range", "/0").endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(whole) - 1}")
        return self._answer(200, self.server.put(name, whole))

    def do_DELETE(self):
        _, name, _ = self._asked()
        self._answer(204 if self.server.objects.pop(name, None) else 404)
