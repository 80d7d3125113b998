"""Answers as HTTP carries them."""

import json

import numpy as np
import pytest
from xlarank_serving.http_messages import HttpRequest, encode_response
from xlarank_serving.tensors import DTYPES


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("datatype", ["BOOL", "FP32", "FP64", "INT8", "INT32", "INT64", "UINT64"])
def test_an_answer_is_what_one_call_would_write(wire, monkeypatch, datatype, count):
    rng = np.random.default_rng(count)
    values = rng.normal(scale=100, size=count).astype(DTYPES[datatype])
    if datatype.startswith("FP"):
        values[1:4] = [np.nan, np.inf, -0.0][: len(values[1:4])]
    names = ["like", "share \N{SNOWMAN}", "binary"]
    response = wire.messages.ModelInferResponse(model_name="feed", model_version="3", id="x")
    response.parameters["n"].int64_param = 7
    for name in names:
        response.outputs.add(name=name, datatype=datatype, shape=[count])
        response.raw_output_contents.append(values.tobytes())
    heads = [{"name": name, "datatype": datatype, "shape": [count]} for name in names]
    rests = [{"data": values.tolist()}] * 2 + [{"parameters": {"binary_data_size": values.nbytes}}]
    outputs = [head | rest for head, rest in zip(heads, rests, strict=True)]
    head = {"model_name": "feed", "model_version": "3", "id": "x", "parameters": {"n": 7}, "outputs": outputs}
    expected = json.dumps(head).encode()
    request = HttpRequest(wire.messages.ModelInferRequest(), {"binary": True}, False)

    def bounded(value, own=json.dumps):
        assert len(value) <= 1000  # no other thread has a turn meanwhile
        assert not isinstance(value, dict) or not {"data", "outputs"} & set(value)
        return own(value)

    monkeypatch.setattr(json, "dumps", bounded)
    assert encode_response(response, request) == (expected + values.tobytes(), len(expected))


def test_an_answer_without_outputs_is_what_one_call_would_write(wire):
    response = wire.messages.ModelInferResponse(model_name="feed")
    request = HttpRequest(wire.messages.ModelInferRequest(), {}, False)
    expected = b'{"model_name": "feed", "model_version": "", "outputs": []}'
    assert encode_response(response, request) == (expected, None)
