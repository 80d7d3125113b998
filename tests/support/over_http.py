"""A server over HTTP, asked by hand."""

import http.client
import json

import numpy as np
from tritonclient.utils import np_to_triton_dtype
from xlarank_serving.config import HttpConfig
from xlarank_serving.server import RankingServer, ServerConfig


class Over:
    """A server over HTTP and what is behind it."""

    def __init__(self, wire, security=None, is_managed=False, observers=(), **options):
        self.repository = wire.repository()
        self.engine = self.repository.add(wire.spec, 3)
        self.server = RankingServer(
            self.repository,
            self.repository.metrics.text,
            ServerConfig(port=0, http_port=0),
            http=HttpConfig(port=0, **options),
            security=security,
            manager=self.repository if is_managed else None,
            observers=observers,
        )
        self.address = self.server.rest.address

    def call(self, method, path, body=None, headers=()):
        """Status, headers and body."""
        connection = http.client.HTTPConnection(self.address, timeout=20)
        try:
            body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def infer(self, body, path="/v2/models/feed/infer", **headers):
        status, _, answer = self.call("POST", path, body, headers.items())
        return status, json.loads(answer)

    def num_refused(self):
        (family,) = self.server.refusals.collect()
        return {sample.labels["status"]: sample.value for sample in family.samples}


def as_json(wire, n=3, **changes):
    """The valid request as JSON; values of an input may be given."""
    inputs = []
    for name, value in wire.valid(n).items():
        array = np.array(value, np.object_) if isinstance(value, list) else value
        data = [item.decode() for item in value] if isinstance(value, list) else array.tolist()
        inputs.append(
            {
                "name": name.replace("__", "."),
                "shape": list(array.shape),
                "datatype": np_to_triton_dtype(array.dtype),
                "data": data,
            }
            | changes.get(name, {})
        )
    return {"id": "r1", "inputs": inputs}
