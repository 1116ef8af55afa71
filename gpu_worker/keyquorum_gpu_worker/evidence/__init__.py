"""Where evidence comes from: one module for each kind of hardware, and their composition (DESIGN §7).

Each source turns a :class:`~keyquorum_gpu_worker.evidence.source.Binding` into one item of the evidence document. What
it reads is the machine's own word about itself, taken as it comes: sizes and shapes are checked so that a confused
kernel or a hostile host is named as such here, and whether the evidence is any good is for every custodian to judge.
"""

from keyquorum_gpu_worker.evidence.collection import Collection
from keyquorum_gpu_worker.evidence.source import Binding, EvidenceSource

__all__ = ["Binding", "Collection", "EvidenceSource"]
