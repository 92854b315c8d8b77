"""A folder in which a run keeps what it has done, so that the same run can go on from there after it was
killed.

Values are kept by what they are: each has the name of its digest, and what several results share is kept
once. A result of a pass is kept together with all that the pass read, and is taken again only where all of
that is the same.
"""

from eptq_onnx.workdir.codec import HashOnly, decode, encode
from eptq_onnx.workdir.partial import Partial
from eptq_onnx.workdir.store import Workdir

__all__ = ["HashOnly", "Partial", "Workdir", "decode", "encode"]
