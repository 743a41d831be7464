"""The runner of the GPU suite: needs Python 3.10, numpy and TVM's runtime libraries, and imports nothing of gemmify.

The folder is packed into the bundle as it is; `script` says what it does. PyTorch is used where it is installed: its
cuDNN is what the layers and networks are compared with.
"""
