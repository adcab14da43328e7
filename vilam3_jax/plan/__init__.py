"""`vilam3 plan`: memory, speed and cost of a run on a TPU slice, without the slice.

Importing this package sets the environment that libtpu reads when JAX loads it: no accelerator of this host,
no metadata server, and several compiling processes at once.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Any values silence libtpu's warning that this is not a TPU host.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
