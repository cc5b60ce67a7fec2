"""Made by `make stubs` from the .proto files here, which are Triton's: repository
triton-inference-server/common, folder protobuf, commit 83adf7c; BSD-3-Clause, as their heads say.
"""
