"""Writes the Python code of serving/proto into serving/xlarank_serving/_proto.

    python tools/generate_protos.py           write it
    python tools/generate_protos.py --check   exit 1 if what is there differs

protoc's own Python code registers `inference.*` in protobuf's default descriptor pool, where tritonclient,
kserve and others register messages of the same names: the second import in a process would fail. The code
written here keeps the messages in a pool of its own. It holds protoc's descriptor and builds the classes
from it through protobuf's public API, so it runs under protobuf 6 and 7; the stub file is protoc's.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROTOS = tuple(ROOT / "serving" / "proto" / name for name in ("grpc_service.proto", "admin.proto"))
OUT = ROOT / "serving" / "xlarank_serving" / "_proto"

_BYTES_A_LINE = 24

_MODULE = '''\
# Generated from serving/proto/{proto} by tools/generate_protos.py. Do not edit.
"""Messages of package {package}, in a descriptor pool of their own."""

{imports}

{pool}DESCRIPTOR = POOL.AddSerializedFile(
{literal}
)
_types = DESCRIPTOR.message_types_by_name

{classes}
'''


_OWN_POOL = (
    "from google.protobuf import descriptor_pool, message_factory",
    "POOL = descriptor_pool.DescriptorPool()\n",
)
_OTHER_POOL = """\
from google.protobuf import message_factory

from xlarank_serving._proto.{module} import POOL"""


def generate() -> dict[str, str]:
    """The generated files, text by file name.

    Raises:
      RuntimeError: if protoc refuses a file; it has printed why.
    """
    return {name: text for proto in PROTOS for name, text in _generate(proto).items()}


def _generate(proto: pathlib.Path) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        arguments = ["protoc", f"-I{proto.parent}", f"--pyi_out={out}", f"--descriptor_set_out={out / 'set'}"]
        if protoc.main([*arguments, proto.name]) != 0:
            raise RuntimeError(f"protoc refuses {proto}")
        files = descriptor_pb2.FileDescriptorSet.FromString((out / "set").read_bytes()).file
        stub = (out / f"{proto.stem}_pb2.pyi").read_text()
    (descriptor,) = files
    serialized = descriptor.SerializeToString(deterministic=True)
    chunks = [serialized[i : i + _BYTES_A_LINE] for i in range(0, len(serialized), _BYTES_A_LINE)]
    # A file that imports another joins its pool.
    others = [f"{pathlib.Path(name).stem}_pb2" for name in descriptor.dependency]
    imports, pool = _OWN_POOL if not others else (_OTHER_POOL.format(module=others[0]), "")
    for other in others:
        stub = stub.replace(f"import {other} as", f"from xlarank_serving._proto import {other} as")
    module = _MODULE.format(
        imports=imports,
        pool=pool,
        proto=proto.name,
        package=descriptor.package,
        literal="\n".join(f"    {chunk!r}" for chunk in chunks),
        classes="\n".join(
            f'{message.name} = message_factory.GetMessageClass(_types["{message.name}"])'
            for message in descriptor.message_type
        ),
    )
    return {f"{proto.stem}_pb2.py": module, f"{proto.stem}_pb2.pyi": stub}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="example: python tools/generate_protos.py --check"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    check = parser.parse_args().check
    differing = []
    for name, text in generate().items():
        path = OUT / name
        if path.is_file() and path.read_text() == text:
            continue
        differing.append(name)
        if not check:
            path.write_text(text)
    verb = "differ" if check else "wrote"
    print(f"{verb}: {', '.join(differing) or 'nothing'}")
    return 1 if check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
