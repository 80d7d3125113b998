# Generated from serving/proto/admin.proto by tools/generate_protos.py. Do not edit.
"""Messages of package xlarank.admin.v1, in a descriptor pool of their own."""

from google.protobuf import descriptor_pool, message_factory

POOL = descriptor_pool.DescriptorPool()
DESCRIPTOR = POOL.AddSerializedFile(
    b'\n\x0badmin.proto\x12\x10xlarank.a'
    b'dmin.v1"\x99\x01\n\x11UpdateRowsRe'
    b'quest\x12\x1d\n\nmodel_name\x18\x01 \x01('
    b'\tR\tmodelName\x12#\n\rmodel_ve'
    b'rsion\x18\x02 \x01(\tR\x0cmodelVersio'
    b'n\x12\x14\n\x05table\x18\x03 \x01(\tR\x05table\x12'
    b'\x12\n\x04rows\x18\x04 \x03(\x03R\x04rows\x12\x16\n\x06v'
    b'alues\x18\x05 \x01(\x0cR\x06values"^\n\x12U'
    b'pdateRowsResponse\x12#\n\rmod'
    b'el_version\x18\x01 \x01(\tR\x0cmodelV'
    b'ersion\x12#\n\rtable_version\x18'
    b'\x02 \x01(\x03R\x0ctableVersion2b\n\x05A'
    b'dmin\x12Y\n\nUpdateRows\x12#.xla'
    b'rank.admin.v1.UpdateRows'
    b'Request\x1a$.xlarank.admin.'
    b'v1.UpdateRowsResponse"\x00b'
    b'\x06proto3'
)
_types = DESCRIPTOR.message_types_by_name

UpdateRowsRequest = message_factory.GetMessageClass(_types["UpdateRowsRequest"])
UpdateRowsResponse = message_factory.GetMessageClass(_types["UpdateRowsResponse"])
