"""The runner of a bundle: needs Python 3.10, numpy and TVM's runtime, and imports nothing of gemmify.

The folder is packed into the bundle as it is; `script` says what it does.
"""
