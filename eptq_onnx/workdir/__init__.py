"""A folder that keeps the results of a run, so that the run can resume after it was killed.

Values are stored by content: each is named by its digest, and shared parts are stored once. The result of a
pass is stored with everything that the pass read, and reused only if all of that is unchanged.
"""

from eptq_onnx.workdir.codec import HashOnly, decode, encode
from eptq_onnx.workdir.partial import Partial
from eptq_onnx.workdir.store import Workdir

__all__ = ["HashOnly", "Partial", "Workdir", "decode", "encode"]
