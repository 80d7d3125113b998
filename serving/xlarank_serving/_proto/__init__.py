"""Generated wire messages; `python tools/generate_protos.py` writes them from serving/proto."""
