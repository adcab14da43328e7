"""`vilam3 plan`: what a run would cost on a TPU slice that nobody has to own.

Importing this package sets what libtpu must find before JAX loads it: no accelerator of this host is used, no
metadata server is asked, and several processes may compile at once.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Anything here keeps libtpu from writing to stderr that it is on no TPU host.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
