# Generated from serving/proto/admin.proto by tools/generate_protos.py. Do not edit.
"""Messages of package xlarank.admin.v1, in a descriptor pool of their own."""

from google.protobuf import message_factory

from xlarank_serving._proto.grpc_service_pb2 import POOL

DESCRIPTOR = POOL.AddSerializedFile(
    b'\n\x0badmin.proto\x12\x10xlarank.a'
    b'dmin.v1\x1a\x12grpc_service.pr'
    b'oto"\x99\x01\n\x11UpdateRowsReques'
    b't\x12\x1d\n\nmodel_name\x18\x01 \x01(\tR\tm'
    b'odelName\x12#\n\rmodel_versio'
    b'n\x18\x02 \x01(\tR\x0cmodelVersion\x12\x14\n'
    b'\x05table\x18\x03 \x01(\tR\x05table\x12\x12\n\x04r'
    b'ows\x18\x04 \x03(\x03R\x04rows\x12\x16\n\x06value'
    b's\x18\x05 \x01(\x0cR\x06values"^\n\x12Updat'
    b'eRowsResponse\x12#\n\rmodel_v'
    b'ersion\x18\x01 \x01(\tR\x0cmodelVersi'
    b'on\x12#\n\rtable_version\x18\x02 \x01('
    b'\x03R\x0ctableVersion"b\n\x16Updat'
    b'eFeaturesResponse\x12#\n\rmod'
    b'el_version\x18\x01 \x01(\tR\x0cmodelV'
    b'ersion\x12#\n\rstore_version\x18'
    b'\x02 \x01(\x03R\x0cstoreVersion"\x80\x01\n\x15'
    b'RemoveFeaturesRequest\x12\x1d\n'
    b'\nmodel_name\x18\x01 \x01(\tR\tmodel'
    b'Name\x12#\n\rmodel_version\x18\x02 '
    b'\x01(\tR\x0cmodelVersion\x12#\n\rcan'
    b'didate_ids\x18\x03 \x03(\x03R\x0ccandid'
    b'ateIds"^\n\x16RemoveFeatures'
    b'Response\x12#\n\rmodel_versio'
    b'n\x18\x01 \x01(\tR\x0cmodelVersion\x12\x1f\n'
    b'\x0bnum_removed\x18\x02 \x01(\x03R\nnumR'
    b'emoved2\xfd\x02\n\x05Admin\x12Y\n\nUpda'
    b'teRows\x12#.xlarank.admin.v'
    b'1.UpdateRowsRequest\x1a$.xl'
    b'arank.admin.v1.UpdateRow'
    b'sResponse"\x00\x12Z\n\x0eUpdateFea'
    b'tures\x12\x1c.inference.ModelI'
    b'nferRequest\x1a(.xlarank.ad'
    b'min.v1.UpdateFeaturesRes'
    b'ponse"\x00\x12e\n\x0eRemoveFeature'
    b"s\x12'.xlarank.admin.v1.Rem"
    b'oveFeaturesRequest\x1a(.xla'
    b'rank.admin.v1.RemoveFeat'
    b'uresResponse"\x00\x12V\n\x0fFeatur'
    b'eMetadata\x12\x1f.inference.Mo'
    b'delMetadataRequest\x1a .inf'
    b'erence.ModelMetadataResp'
    b'onse"\x00b\x06proto3'
)
_types = DESCRIPTOR.message_types_by_name

UpdateRowsRequest = message_factory.GetMessageClass(_types["UpdateRowsRequest"])
UpdateRowsResponse = message_factory.GetMessageClass(_types["UpdateRowsResponse"])
UpdateFeaturesResponse = message_factory.GetMessageClass(_types["UpdateFeaturesResponse"])
RemoveFeaturesRequest = message_factory.GetMessageClass(_types["RemoveFeaturesRequest"])
RemoveFeaturesResponse = message_factory.GetMessageClass(_types["RemoveFeaturesResponse"])
