"""The generated messages: reproducible, and at peace with other packages' messages of the same names."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from google.protobuf import descriptor_pool
from tritonclient.grpc import model_config_pb2 as triton_config
from tritonclient.grpc import service_pb2 as triton_messages
from xlarank_serving._proto import grpc_service_pb2 as messages

ROOT = pathlib.Path(__file__).resolve().parents[2]
GENERATED = pathlib.Path(messages.__file__).parent


@pytest.fixture(scope="module")
def generator():
    path = ROOT / "tools" / "generate_protos.py"
    spec = importlib.util.spec_from_file_location("generate_protos", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_code_is_what_the_proto_file_gives(generator):
    generated = generator.generate()
    names = ("admin_pb2", "grpc_service_pb2")
    assert sorted(generated) == [name + suffix for name in names for suffix in (".py", ".pyi")]
    for name, text in generated.items():
        assert (GENERATED / name).read_text() == text, f"{name}: run `python tools/generate_protos.py`"


@pytest.mark.parametrize("name", sorted(messages.DESCRIPTOR.message_types_by_name))
def test_field_numbers_and_types_are_those_of_tritonclient(name):
    files = [triton_messages.DESCRIPTOR, triton_config.DESCRIPTOR]
    (theirs,) = [f.message_types_by_name[name] for f in files if name in f.message_types_by_name]
    compare(messages.DESCRIPTOR.message_types_by_name[name], theirs)


def test_enums_are_those_of_tritonclient():
    (ours,) = messages.DESCRIPTOR.enum_types_by_name.values()
    theirs = triton_config.DESCRIPTOR.enum_types_by_name[ours.name]
    assert [(v.name, v.number) for v in ours.values] == [(v.name, v.number) for v in theirs.values]


def compare(ours, theirs):
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
    for enum in ours.enum_types:
        other = theirs.enum_types_by_name[enum.name]
        assert [(v.name, v.number) for v in enum.values] == [(v.name, v.number) for v in other.values]
    for nested in ours.nested_types:
        compare(nested, theirs.nested_types_by_name[nested.name])


def test_our_messages_are_not_in_the_default_pool():
    pool = descriptor_pool.Default()
    assert (
        pool.FindMessageTypeByName("inference.ModelInferRequest") is not messages.ModelInferRequest.DESCRIPTOR
    )
    assert messages.POOL is not pool


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tritonclient.grpc", "xlarank_serving.client"),
        ("xlarank_serving.client", "tritonclient.grpc"),
    ],
)
@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_one_process_may_use_both_clients_in_either_order(first, second, implementation):
    code = f"""
import google.protobuf.internal.api_implementation as api
assert api.Type() == {implementation!r}
import {first}, {second}
from xlarank_serving._proto import grpc_service_pb2 as ours
from tritonclient.grpc import service_pb2 as theirs
message = ours.ModelInferRequest(model_name="feed", raw_input_contents=[b"ab"])
message.inputs.add(name="age", datatype="FP32", shape=[-1, 3]).parameters["k"].uint64_param = 7
back = theirs.ModelInferRequest.FromString(message.SerializeToString())
assert str(back) == str(message), (back, message)
assert ours.ModelInferRequest.FromString(back.SerializeToString()) == message
"""
    run_python(code, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=implementation)


def run_python(code, **environment):
    path = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
