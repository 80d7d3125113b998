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
    b'\x03R\x0ctableVersion"J\n\x0fRollb'
    b'ackRequest\x12\x1d\n\nmodel_name'
    b'\x18\x01 \x01(\tR\tmodelName\x12\x18\n\x07ver'
    b'sion\x18\x02 \x01(\x03R\x07version",\n\x10R'
    b'ollbackResponse\x12\x18\n\x07versi'
    b'on\x18\x01 \x01(\x03R\x07version"b\n\x16Upd'
    b'ateFeaturesResponse\x12#\n\rm'
    b'odel_version\x18\x01 \x01(\tR\x0cmode'
    b'lVersion\x12#\n\rstore_versio'
    b'n\x18\x02 \x01(\x03R\x0cstoreVersion"\x80\x01'
    b'\n\x15RemoveFeaturesRequest\x12'
    b'\x1d\n\nmodel_name\x18\x01 \x01(\tR\tmod'
    b'elName\x12#\n\rmodel_version\x18'
    b'\x02 \x01(\tR\x0cmodelVersion\x12#\n\rc'
    b'andidate_ids\x18\x03 \x03(\x03R\x0ccand'
    b'idateIds"^\n\x16RemoveFeatur'
    b'esResponse\x12#\n\rmodel_vers'
    b'ion\x18\x01 \x01(\tR\x0cmodelVersion\x12'
    b'\x1f\n\x0bnum_removed\x18\x02 \x01(\x03R\nnu'
    b'mRemoved2\xd2\x03\n\x05Admin\x12Y\n\nUp'
    b'dateRows\x12#.xlarank.admin'
    b'.v1.UpdateRowsRequest\x1a$.'
    b'xlarank.admin.v1.UpdateR'
    b'owsResponse"\x00\x12Z\n\x0eUpdateF'
    b'eatures\x12\x1c.inference.Mode'
    b'lInferRequest\x1a(.xlarank.'
    b'admin.v1.UpdateFeaturesR'
    b'esponse"\x00\x12e\n\x0eRemoveFeatu'
    b"res\x12'.xlarank.admin.v1.R"
    b'emoveFeaturesRequest\x1a(.x'
    b'larank.admin.v1.RemoveFe'
    b'aturesResponse"\x00\x12V\n\x0fFeat'
    b'ureMetadata\x12\x1f.inference.'
    b'ModelMetadataRequest\x1a .i'
    b'nference.ModelMetadataRe'
    b'sponse"\x00\x12S\n\x08Rollback\x12!.x'
    b'larank.admin.v1.Rollback'
    b'Request\x1a".xlarank.admin.'
    b'v1.RollbackResponse"\x00b\x06p'
    b'roto3'
)
_types = DESCRIPTOR.message_types_by_name

UpdateRowsRequest = message_factory.GetMessageClass(_types["UpdateRowsRequest"])
UpdateRowsResponse = message_factory.GetMessageClass(_types["UpdateRowsResponse"])
RollbackRequest = message_factory.GetMessageClass(_types["RollbackRequest"])
RollbackResponse = message_factory.GetMessageClass(_types["RollbackResponse"])
UpdateFeaturesResponse = message_factory.GetMessageClass(_types["UpdateFeaturesResponse"])
RemoveFeaturesRequest = message_factory.GetMessageClass(_types["RemoveFeaturesRequest"])
RemoveFeaturesResponse = message_factory.GetMessageClass(_types["RemoveFeaturesResponse"])
